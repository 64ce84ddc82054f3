"""Compiles the C source of this package into the cache folder: once per source, compiler and CPU.

The compiler runs in a process of its own that outlives its parent, so that short runs get a library as well:
this file is also that process's program and imports nothing of ours. Other processes that want the same
library wait for it as little as its parent does. A failure is kept beside the library and not tried again.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("source")
MAIN = SOURCE / "decode_step.c"
COMPILERS = ("cc", "gcc", "clang", "g++", "clang++")
FLAGS = ("-x", "c", "-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
LINKING = ("-shared", "-fPIC", "-fvisibility=hidden", "-pthread", "-lm")
TIMEOUT_SECONDS = 300.0
REASON_LENGTH = 200


def find_compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def command(compiler: str, output: Path) -> list[str]:
    """How `compiler` makes the library `output` for this very CPU."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    target = "-march=native" if x86 else "-mcpu=native"
    return [compiler, *FLAGS, target, str(MAIN), "-o", str(output), *LINKING]


def library_path(folder: Path, compiler: str) -> Path:
    """Where in `folder` the library lies or will lie."""
    return folder / f"decode_step-{_digest(compiler)}.so"


@cache
def _digest(compiler: str) -> str:
    """Changes with the source, the compiler, its flags and the CPU."""
    program = Path(compiler).resolve()
    status = program.stat()
    parts = [f"{path.name}\0{path.read_text()}" for path in sorted(SOURCE.iterdir())]
    parts += [str(program), f"{status.st_size} {status.st_mtime_ns}", *command("", Path()), _cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _cpu() -> str:
    """What `native` depends on: the first CPU's name and flags."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")
    return "\n".join(line for line in first.splitlines() if line.startswith(told))


def failure(library: Path) -> str | None:
    """Why compiling `library` failed earlier, in the compiler's words; None if it did not."""
    try:
        return library.with_suffix(".failed").read_text()
    except OSError:
        return None


def start(library: Path, compiler: str) -> None:
    """Have `library` compiled in the background unless another process is at it.

    Raises OSError where the folder cannot be written to.
    """
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    claim = _claim(library)
    if claim is None:
        return
    program = [sys.executable, "-I", __file__, str(library), str(claim), compiler]
    quiet = subprocess.DEVNULL
    try:
        process = subprocess.Popen(program, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    except OSError:
        claim.unlink(missing_ok=True)
        raise
    threading.Thread(target=process.wait, daemon=True).start()  # else it stays a zombie


def _claim(library: Path) -> Path | None:
    """A file that only one process can make; one that was left behind by a killed process counts no more."""
    claim = library.with_suffix(".building")
    with suppress(FileNotFoundError):
        if time.time() - claim.stat().st_mtime > TIMEOUT_SECONDS:
            claim.unlink()
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return None
    return claim


def compile_now(library: Path, compiler: str) -> None:
    """Write `library` whole, or why that failed beside it. Raises OSError where neither can be written."""
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        staged = Path(work) / library.name
        reason = _run(command(compiler, staged))
        if reason is None:
            staged.replace(library)
            return
        note = Path(work) / "reason"
        note.write_text(reason)
        note.replace(library.with_suffix(".failed"))


def _run(words: list[str]) -> str | None:
    """Why the compiler made nothing; None if it did."""
    try:
        done = subprocess.run(words, capture_output=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)[:REASON_LENGTH]
    if done.returncode == 0 and Path(words[words.index("-o") + 1]).exists():
        return None
    lines = done.stderr.decode(errors="replace").splitlines()
    told = next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")
    return f"{Path(words[0]).name} failed: {told.strip()[:REASON_LENGTH]}"


def main() -> None:
    library, claim, compiler = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    with suppress(OSError):
        os.nice(10)
    try:
        with suppress(OSError):
            compile_now(library, compiler)
    finally:
        claim.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
