"""Policies for this machine, the variables that override them, and the BLAS under MLX."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qchat.core.engine.engine import Engine
from qchat.core.errors import UsageError
from qchat.core.machine import backend, linux_cpu
from qchat.core.machine.backend import choose_policy, mx
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms
from tests.paths import ROOT

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a matter of MLX's Linux wheel")
cpu_only = pytest.mark.skipif(backend.on_gpu(), reason="about the CPU's policy")


@cpu_only
def test_a_cpu_keeps_weights_dense_where_they_fit(monkeypatch):
    monkeypatch.setattr(backend, "host_available_nbytes", lambda: 1_000_000)
    fits, too_large = choose_policy(100_000), choose_policy(200_000)
    assert (fits.dense, fits.activations) == (True, mx.float32)
    assert not too_large.dense
    assert "packed" in " ".join(too_large.notices)


@pytest.mark.parametrize(
    ("variable", "value", "field", "wanted"),
    [
        ("QCHAT_DENSE", "off", "dense", False),
        ("QCHAT_DENSE", "on", "dense", True),
        ("QCHAT_ACTIVATIONS", "bfloat16", "activations", mx.bfloat16),
        ("QCHAT_ACTIVATIONS", "float16", "activations", mx.float16),
    ],
)
def test_the_environment_forces_each_choice(monkeypatch, variable, value, field, wanted):
    monkeypatch.setenv(variable, value)
    assert getattr(choose_policy(10), field) == wanted
    monkeypatch.setenv(variable, "perhaps")
    with pytest.raises(UsageError, match=f"{variable} is 'perhaps', wanted auto"):
        choose_policy(10)


def test_every_forced_path_gives_the_same_logits(tmp_path, monkeypatch):
    write_checkpoint(tmp_path)
    ids = [5, 99, 17, 200, 3] * 9
    wanted = Engine.load(tmp_path).logits(ids)
    for variable, value in (("QCHAT_DENSE", "off"), ("QCHAT_COMPILE", "off"), ("QCHAT_DELTA", "reference")):
        with monkeypatch.context() as forced:
            forced.setenv(variable, value)
            assert relative_rms(Engine.load(tmp_path).logits(ids), wanted) <= 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_along_the_whole_stream(tmp_path, monkeypatch, dtype):
    """A stray float32 scalar promotes everything after it."""
    write_checkpoint(tmp_path)
    monkeypatch.setenv("QCHAT_ACTIVATIONS", dtype)
    model = Engine.load(tmp_path).model
    for ids in ([1, 2, 3], [4]):
        cache = model.new_cache()
        assert model.hidden(ids, cache).dtype == getattr(mx, dtype)
        kinds = {array.dtype for layer in cache.layers for array in layer.arrays()}
        assert kinds == {getattr(mx, dtype), mx.float32}


@linux_only
def test_the_blas_is_renamed_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = linux_cpu.renamed_openblas()
    stamp = first.stat().st_mtime_ns
    assert linux_cpu.renamed_openblas() == first
    assert first.stat().st_mtime_ns == stamp
    assert first.parent == tmp_path / "qchat" / "blas"


@linux_only
def test_a_blas_that_cannot_be_written_is_one_sentence_without_the_command(tmp_path, monkeypatch):
    program = tmp_path / "patchelf"
    program.write_text("#!/bin/sh\necho 'write: No space left on device' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(linux_cpu, "_find_patchelf", lambda: str(program))
    with pytest.raises(subprocess.SubprocessError) as problem:
        linux_cpu._rename_symbols(tmp_path / "libscipy.so", tmp_path / "blas.so")
    assert (
        str(problem.value)
        == f"patchelf could not write {tmp_path / 'blas.so'}: write: No space left on device"
    )


@linux_only
def test_a_relative_cache_folder_is_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert linux_cpu._blas_folder() == tmp_path / "home/.cache/qchat/blas"
    assert not (tmp_path / "here").exists()


@linux_only
def test_a_blas_that_cannot_be_opened_is_one_line_of_notice_and_no_failure(tmp_path):
    script = "from qchat.core.machine.backend import choose_policy; print(choose_policy(1).notices)"
    path = os.pathsep.join([str(ROOT / ".dev"), *sys.path])
    environment = os.environ | {"QCHAT_BLAS": str(tmp_path / "none.so"), "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert "slow reference BLAS" in run.stdout
    assert run.stdout.count("\n") == 1


@linux_only
def test_kernels_unknown_to_the_blas_are_reported():
    script = "from qchat.core.machine.backend import choose_policy; print(choose_policy(1).notices)"
    path = os.pathsep.join([str(ROOT / ".dev"), *sys.path])
    environment = os.environ | {"QCHAT_BLAS_CORE": "Abacus", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert "QCHAT_BLAS_CORE is Abacus, and OpenBLAS uses" in run.stdout


@linux_only
def test_opening_the_blas_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with linux_cpu._openblas_environment():
        assert os.environ["OPENBLAS_NUM_THREADS"].isdigit()
    assert os.environ["OPENBLAS_CORETYPE"] == "Haswell"
    assert "OPENBLAS_NUM_THREADS" not in os.environ


@linux_only
def test_an_unwritable_cache_folder_is_a_notice(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.delitem(sys.modules, "mlx.core")
    notice = linux_cpu.open_blas()
    assert notice is not None
    assert str(Path("qchat")) in notice


@linux_only
def test_a_user_without_a_home_is_a_notice(monkeypatch):
    """As in a container with a user id of its own: Path.home raises RuntimeError."""

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delitem(sys.modules, "mlx.core")
    assert "home directory" in (linux_cpu.open_blas() or "")


def test_an_unknown_word_for_malloc_is_refused(monkeypatch):
    monkeypatch.setenv("QCHAT_MALLOC", "perhaps")
    with pytest.raises(UsageError, match="QCHAT_MALLOC is 'perhaps', wanted auto, off"):
        linux_cpu.keep_freed_pages()


def test_compiled_cuda_kernels_are_kept_in_the_users_cache_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "/elsewhere")
    backend._keep_compiled_kernels()
    assert os.environ["MLX_PTX_CACHE_DIR"] == "/elsewhere"
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    backend._keep_compiled_kernels()
    assert Path(os.environ["MLX_PTX_CACHE_DIR"]).parent == tmp_path / "qchat"
