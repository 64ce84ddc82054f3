"""How the library comes to be: compiled once, in the background, and kept; and where it cannot be."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qchat.core.errors import UsageError
from qchat.core.native import compiler
from qchat.core.native.library import Finder, Library, physical_cores
from tests.paths import ROOT

# a machine that many tests share
PATIENCE_SECONDS = 120.0
LOOK = """
from qchat.core.native.library import Finder
finder = Finder()
print(finder.find() is not None, finder.notice)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("QCHAT_NATIVE", "auto")
    return tmp_path / "cache/qchat/native"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Let a shell script be the only compiler there is."""
    program = folder / "bin/cc"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program


def find_in_time(finder: Finder) -> Library | None:
    """What a program sees that asks again and again."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end and not finder.find() and not finder.notice:
        time.sleep(0.02)
    return finder.find()


def copying(library: Library) -> str:
    """A compiler that gives what another one made: everything after `-o` is its output, then options."""
    note = 'echo run >> "$(dirname "$0")/runs"'
    return f'while [ "$1" != -o ]; do shift; done; {note}; cp {library.path} "$2"'


def runs(program: Path) -> int:
    return len((program.parent / "runs").read_text().splitlines())


@pytest.mark.slow
def test_nobody_waits_for_the_compiler(
    folder: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    allowed = tmp_path / "allowed"
    wait = f'until [ -e "{allowed}" ]; do sleep 0.02; done'
    program = install(tmp_path, monkeypatch, f"{wait}; {copying(library)}")
    finder = Finder()
    assert finder.find() is None
    assert finder.notice is None
    allowed.touch()
    begin = time.monotonic()
    assert find_in_time(finder) is not None
    assert runs(program) == 1
    while list(folder.glob("*.building")) and time.monotonic() < begin + PATIENCE_SECONDS:
        time.sleep(0.02)
    assert sorted(path.suffix for path in folder.iterdir()) == [".so"]


def test_later_processes_find_what_one_compiled(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = install(tmp_path, monkeypatch, copying(library))
    assert find_in_time(Finder()) is not None
    assert Finder().find() is not None
    assert runs(program) == 1
    program.write_text(program.read_text() + "# another version")
    compiler._digest.cache_clear()
    assert Finder().find() is None, "another compiler makes another library"


@pytest.mark.slow
def test_processes_at_the_same_time_compile_once(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = install(tmp_path, monkeypatch, f"sleep 1; {copying(library)}")
    command = [sys.executable, "-c", LOOK]
    env = os.environ | {"PYTHONPATH": str(ROOT / ".dev")}
    began = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert all(process.communicate()[0] in ("False None\n", "True None\n") for process in began)
    assert find_in_time(Finder()) is not None
    assert runs(program) == 1


def test_a_claim_that_a_killed_process_left_counts_no_more(
    folder: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = install(tmp_path, monkeypatch, copying(library))
    claim = compiler.library_path(folder, str(program)).with_suffix(".building")
    claim.parent.mkdir(parents=True)
    claim.touch()
    finder = Finder()
    assert finder.find() is None
    assert finder.find() is None
    old = time.time() - compiler.TIMEOUT_SECONDS - 1
    os.utime(claim, (old, old))
    assert find_in_time(Finder()) is not None


def test_without_a_compiler_one_sentence_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(folder))
    finder = Finder()
    assert finder.find() is None
    assert finder.notice == (
        "the decode step in C is not used, and decoding is slower: no C compiler was found"
    )
    monkeypatch.setenv("QCHAT_NATIVE", "on")
    with pytest.raises(UsageError, match=r"QCHAT_NATIVE is on, and .* no C compiler was found"):
        Finder().find()


def test_a_compiler_that_fails_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = 'echo run >> "$(dirname "$0")/runs"; echo "x.c:1: fatal error: no headers" >&2; exit 1'
    program = install(tmp_path, monkeypatch, script)
    finder = Finder()
    assert find_in_time(finder) is None
    assert finder.notice is not None
    assert finder.notice.endswith("cc failed: x.c:1: fatal error: no headers")
    assert Finder().find() is None
    assert runs(program) == 1


def test_a_compiler_that_makes_nothing_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, monkeypatch, "exit 0")
    finder = Finder()
    assert find_in_time(finder) is None
    assert "cc failed: it said nothing" in (finder.notice or "")


def test_what_is_no_library_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = 'while [ "$1" != -o ]; do shift; done; echo text > "$2"'
    install(tmp_path, monkeypatch, script)
    finder = Finder()
    assert find_in_time(finder) is None
    assert "decoding is slower" in (finder.notice or "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_cache_folder_that_cannot_be_written_to(
    folder: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install(tmp_path, monkeypatch, copying(library))
    folder.parent.mkdir(parents=True)
    folder.parent.chmod(0o500)
    finder = Finder()
    assert finder.find() is None
    assert "decoding is slower" in (finder.notice or "")


def test_a_cache_folder_that_is_a_file(
    folder: Path, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install(tmp_path, monkeypatch, copying(library))
    folder.parent.mkdir(parents=True)
    folder.touch()
    finder = Finder()
    assert finder.find() is None
    assert "decoding is slower" in (finder.notice or "")


def test_threads_are_as_many_as_physical_cores_unless_told(library: Library, monkeypatch: pytest.MonkeyPatch):
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    monkeypatch.setenv("QCHAT_NATIVE_THREADS", "none")
    with pytest.raises(UsageError, match="QCHAT_NATIVE_THREADS is 'none'"):
        Library(library.path)
