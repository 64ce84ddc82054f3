"""When functions run fused, and which folders of kernels are trusted."""

import ctypes
import os
import tempfile
from types import SimpleNamespace

import pytest

from qchat.core.errors import UsageError
from qchat.core.machine import fusion
from qchat.core.machine.backend import mx
from qchat.core.machine.fusion import Fused, Kernels, form_of, kernel_home, loading

libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p


def temporary_of_c() -> bytes | None:
    return libc.getenv(b"TMPDIR")


@pytest.fixture(autouse=True)
def nothing_is_loaded():
    before = temporary_of_c()
    fusion.forget()
    yield
    fusion.forget()
    libc.unsetenv(b"TMPDIR") if before is None else libc.setenv(b"TMPDIR", before, 1)


def marked(function):
    """Stands in for MLX's compiler: its functions say that they are compiled."""
    return lambda *arrays: ("fused", function(*arrays))


def double(x):
    return x + x


def test_a_function_runs_plain_until_its_kernels_are_loaded(tmp_path):
    fused, x = Fused(double, marked), mx.ones(4)
    assert isinstance(fused(x), mx.array)
    with loading(tmp_path):
        assert fused(x)[0] == "fused"
    assert fused(x)[0] == "fused"


def test_arguments_of_another_kind_stay_plain(tmp_path):
    """Each of these has MLX make another kernel."""
    fused = Fused(double, marked)
    with loading(tmp_path):
        fused(mx.ones((1, 8)))
    assert fused(mx.ones((1, 7)))[0] == "fused"
    for other in (
        mx.ones((2, 8)),
        mx.ones((1, 1)),
        mx.ones((1, 8), mx.bfloat16),
        mx.ones((1, 600)),
        mx.ones(8),
    ):
        assert isinstance(fused(other), mx.array)


def test_what_a_fused_function_calls_does_not_count_as_loaded(tmp_path):
    inner = Fused(double, marked)
    outer = Fused(lambda x: inner(x), marked)
    with loading(tmp_path):
        outer(mx.ones(4))
    assert isinstance(inner(mx.ones(4)), mx.array)


def test_layers_of_one_form_share_what_is_loaded(tmp_path):
    class Layer:
        __module__ = "qchat.core.model"

        def __init__(self, width: int):
            self.weight = mx.zeros(width)
            self.fused = Fused(self.step, marked)

        def step(self, x):
            return x

    first, alike, other = Layer(4), Layer(4), Layer(5)
    with loading(tmp_path):
        first.fused(mx.ones(2))
    assert alike.fused(mx.ones(2))[0] == "fused"
    assert isinstance(other.fused(mx.ones(2)), mx.array)
    assert form_of(first) == form_of(alike) != form_of(other)


def test_only_mlx_looks_into_the_private_folder(tmp_path):
    before, seen = os.environ.get("TMPDIR"), tempfile.gettempdir()
    with loading(tmp_path):
        pass
    assert temporary_of_c() == os.fsencode(tmp_path)  # also for what it looks up later
    assert os.environ.get("TMPDIR") == before
    assert tempfile.gettempdir() == seen


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path):
    home = kernel_home(tmp_path / "own")
    assert home is not None
    assert home.stat().st_mode & 0o777 == 0o700
    home.chmod(0o777)
    assert kernel_home(tmp_path / "own") is None
    home.chmod(0o700)
    (tmp_path / "own").chmod(0o777)  # the folder could be exchanged
    assert kernel_home(tmp_path / "own") is None
    (tmp_path / "own").chmod(0o1777)  # as /tmp is: what belongs to another cannot be renamed there
    assert kernel_home(tmp_path / "own") == home
    assert kernel_home(None) is None


def test_a_folder_of_another_user_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(fusion.os, "geteuid", lambda: 12345)
    home = tmp_path / "own"
    home.mkdir()
    found = SimpleNamespace(st_mode=home.stat().st_mode, st_uid=777)
    monkeypatch.setattr(type(home), "lstat", lambda _: found)
    assert not fusion.is_private(home)


def test_a_link_in_the_folders_place_is_not_trusted(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert not fusion.is_private(tmp_path / "link")


def make_kernels(work) -> None:
    folder = fusion.mlx_folder(work)
    folder.mkdir(parents=True)
    for name in ("liba.so", "libb.so"):
        (folder / name).write_text(name)


def test_kernels_are_complete_or_count_as_none(tmp_path):
    kernels = Kernels(tmp_path, "a model")
    assert kernels.layers() is None
    make_kernels(tmp_path / "work")
    kernels.keep(tmp_path / "work", [0, 3])
    assert Kernels(tmp_path, "a model").layers() == [0, 3]
    assert Kernels(tmp_path, "another model").layers() is None
    (kernels.folder / "libb.so").unlink()  # by whoever cleans caches
    assert kernels.layers() is None


def test_kernels_that_exist_are_not_replaced(tmp_path):
    """Another process may be running them."""
    kernels = Kernels(tmp_path, "a model")
    make_kernels(tmp_path / "work")
    kernels.folder.mkdir(parents=True)
    (kernels.folder / "liba.so").write_text("first")
    kernels.keep(tmp_path / "work", [0])
    assert (kernels.folder / "liba.so").read_text() == "first"


def test_a_failed_attempt_is_not_repeated_for_a_day(tmp_path, monkeypatch):
    kernels = Kernels(tmp_path, "a model")
    assert not kernels.failed_lately()
    kernels.note_failure()
    assert kernels.failed_lately()
    assert kernels.layers() is None
    now = fusion.time.time()
    monkeypatch.setattr(fusion.time, "time", lambda: now + fusion.RETRY_SECONDS + 1)
    assert not kernels.failed_lately()


def test_an_unknown_word_is_refused(monkeypatch):
    monkeypatch.setenv("QCHAT_COMPILE", "perhaps")
    with pytest.raises(UsageError, match="QCHAT_COMPILE is 'perhaps', wanted auto, on, off"):
        fusion.choice()
