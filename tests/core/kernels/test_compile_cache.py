"""CUDA kernels as machine code: whole programs, kept on disk, and left to MLX where nobody compiles them."""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qchat.core.kernels import compile_cache, launch
from qchat.core.kernels.launch import Kernel, cuda_program
from qchat.core.machine.backend import mx

ADD = Kernel("add", ("x", "bias"), ("y",), "y[tid] = x[tid * x_shape[1]] + float(bias[0]);", 32)
TYPES = ((mx.float32, 2), (mx.bfloat16, 1))
CODE = b"\x7fELF and so on"


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCHAT_TUNE", "auto")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Every name that was compiled, into the same bytes."""
    names: list[str] = []

    def compile(_source: str, name: str, _architecture: str) -> bytes:
        names.append(name)
        return CODE

    monkeypatch.setattr(compile_cache, "_compile", compile)
    monkeypatch.setattr(compile_cache, "_nvfatbin", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return names


def test_a_text_is_compiled_once_for_all_processes(compiled):
    for _ in range(2):
        assert compile_cache.machine_code("text", "one", "sm_90") == CODE
    assert compiled == ["one"]
    compile_cache.machine_code("text", "one", "sm_100")
    compile_cache.machine_code("other", "two", "sm_90")
    assert compiled == ["one", "one", "two"]


@pytest.mark.parametrize("damage", [b"", b"no machine code"])
def test_what_is_no_machine_code_is_compiled_again(damage, compiled, tmp_path):
    compile_cache.machine_code("text", "one", "sm_90")
    (kept,) = (tmp_path / "qchat/kernels").iterdir()
    kept.write_bytes(damage)
    assert compile_cache.machine_code("text", "one", "sm_90") == CODE
    assert kept.read_bytes() == CODE and len(compiled) == 2


def test_a_folder_that_takes_no_files_costs_nothing_but_time(compiled, tmp_path):
    (tmp_path / "qchat").write_text("a file where the folder should be")
    for _ in range(2):
        assert compile_cache.machine_code("text", "one", "sm_90") == CODE
    assert len(compiled) == 2


class Compressor:
    """Stands for nvFatbin; `refuses` names the call that fails."""

    def __init__(self, refuses: str = ""):
        self.refuses, self.destroyed, self.made = refuses, 0, compile_cache.FATBIN + b" small"

    def __getattr__(self, name: str):
        def call(*arguments: Any) -> int:
            if name == "nvFatbinSize":
                arguments[1]._obj.value = len(self.made)
            elif name == "nvFatbinGet":
                ctypes.memmove(arguments[1], self.made, len(self.made))
            elif name == "nvFatbinAddCubin":
                assert arguments[1] == CODE and arguments[3] == b"90"
            elif name == "nvFatbinDestroy":
                self.destroyed += 1
            return int(name == self.refuses)

        return call


def test_machine_code_is_kept_compressed_where_the_compressor_is_installed(compiled, monkeypatch, tmp_path):
    compressor = Compressor()
    monkeypatch.setattr(compile_cache, "_nvfatbin", lambda: compressor)
    for _ in range(2):
        assert compile_cache.machine_code("text", "one", "sm_90") == compressor.made
    (kept,) = (tmp_path / "qchat/kernels").iterdir()
    assert (kept.suffix, kept.read_bytes()) == (".fatbin", compressor.made)
    assert compiled == ["one"] and compressor.destroyed == 1


@pytest.mark.parametrize("call", ["nvFatbinCreate", "nvFatbinAddCubin", "nvFatbinSize", "nvFatbinGet"])
@pytest.mark.usefixtures("compiled")
def test_what_the_compressor_refuses_stays_as_it_is(call, monkeypatch):
    compressor = Compressor(refuses=call)
    monkeypatch.setattr(compile_cache, "_nvfatbin", lambda: compressor)
    assert compile_cache.machine_code("text", "one", "sm_90") == CODE
    assert compressor.destroyed == (call != "nvFatbinCreate")


def test_nvfatbin_compresses_machine_code():
    """Where its wheel is installed; it needs no GPU."""
    if compile_cache._nvfatbin() is None:
        pytest.skip("nvFatbin is not installed")
    assert compile_cache.compress(CODE, "sm_90") == CODE  # which it refuses, as it is none
    assert compile_cache._nvfatbin() is compile_cache._nvfatbin()


def test_a_program_has_the_lengths_that_its_body_asks_for():
    program, name = cuda_program(ADD, TYPES, [mx.float32])
    head = (
        "(const float* x, const __nv_bfloat16* bias, float* y, const int x_length_0, const int x_length_1) {"
    )
    assert f'extern "C" __global__ void {name}{head}' in program
    assert "const int x_shape[] = {x_length_0, x_length_1};" in program
    assert ADD.body in program


def test_programs_of_other_arrays_have_other_names():
    variants = [(TYPES, mx.float32), (TYPES, mx.bfloat16), (TYPES[::-1], mx.float32)]
    names = {cuda_program(ADD, types, [output])[1] for types, output in variants}
    assert len(names) == len(variants)


class Launches:
    """Stands for MLX's ways of running a kernel; `ran` says what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ran: list[dict] = []
        monkeypatch.setattr(launch, "_device", lambda: "cuda")
        monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", self.run)
        monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **_: self.run)
        launch._machine_code.cache_clear()
        launch._build.cache_clear()

    def run(self, output_shapes: Sequence, output_dtypes: Sequence, **given) -> list[mx.array]:
        self.ran.append(given)
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]


def launch_add() -> None:
    x, bias = mx.ones((32, 5)), mx.ones(1, mx.bfloat16)
    ADD([x, bias], blocks=(2, 3, 1), results=[((32,), mx.float32)])


def test_kernels_run_as_machine_code(compiled, monkeypatch):
    launches = Launches(monkeypatch)
    launch_add()
    (given,) = launches.ran
    assert (given["name"], given["compiled_source"]) == (compiled[0], CODE)
    assert given["scalars"] == [32, 5]
    assert (given["grid"], given["threadgroup"]) == ((64, 3, 1), (32, 1, 1))
    assert given["ensure_row_contiguous"]


def test_kernels_that_nobody_compiles_are_left_to_mlx(monkeypatch):
    launches = Launches(monkeypatch)
    monkeypatch.setattr(compile_cache, "_nvrtc", lambda: None)
    launch_add()
    (given,) = launches.ran
    assert "compiled_source" not in given and len(given["inputs"]) == 2


def test_nvrtc_compiles_a_kernel(monkeypatch, tmp_path):
    """Where CUDA's compiler is installed; it needs no GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with suppress(OSError):
        ctypes.CDLL(compile_cache.NVRTC[0])  # as MLX's CUDA library does
    compile_cache._nvrtc.cache_clear()
    if compile_cache._nvrtc() is None or not compile_cache._includes():
        pytest.skip("CUDA's compiler is not installed")
    program, name = cuda_program(ADD, TYPES, [mx.float32])
    code = compile_cache.machine_code(program, name, "sm_90")
    assert code is not None and code.startswith((compile_cache.ELF, compile_cache.FATBIN))
    assert compile_cache.machine_code("no program", "none", "sm_90") is None
