"""The tools of qchat's own: what they do, and the bounds that nothing passes."""

import asyncio
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.tui.tools import files, own, processes
from qchat.tui.tools.base import MAX_RESULT, ToolError, bound_result
from qchat.tui.tools.calculate import evaluate
from qchat.tui.tools.own import own_tools
from qchat.tui.user.settings import TOOL_NAMES
from tests.run_async import run_async


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working folder, with a secret beside it."""
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "work"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "a.py").write_text("one\ntwo\nthree\nfour")
    (folder / "notes.md").write_text("two words\n")
    return folder


def run(where: Path, tool: str, /, **arguments: Any) -> str:
    return run_async(own_tools(where)[tool].run(arguments))


def test_the_settings_name_the_tools_there_are(here: Path):
    assert tuple(own_tools(here)) == TOOL_NAMES
    asks = {name: tool.asks for name, tool in own_tools(here).items()}
    assert asks == {
        "read_file": "until allowed",
        "find_files": "until allowed",
        "shell": "always",
        "calculate": "never",
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "the argument path is missing"),
        ({"path": 3}, "the argument path is 3, wanted a value of type string"),
        ({"path": "notes.md", "lines": True}, "the argument lines is True, wanted a value of type integer"),
        ({"path": "notes.md", "mode": "w"}, "there is no argument 'mode', only path, first_line, lines"),
        ({"path": "notes.md", "lines": 0}, "first_line begins at 1, and lines is 1 to 2,000"),
    ],
)
def test_arguments_that_do_not_fit_are_a_sentence(here: Path, arguments: dict[str, Any], sentence: str):
    with pytest.raises(ToolError) as error:
        run(here, "read_file", **arguments)
    assert str(error.value) == sentence


# --- files ---


def test_a_file_is_read_whole_or_in_part(here: Path):
    assert run(here, "read_file", path="src/a.py") == "one\ntwo\nthree\nfour"
    part = run(here, "read_file", path="src/a.py", first_line=2, lines=2)
    assert part == "two\nthree\n[1 more lines]"
    with pytest.raises(ToolError, match="has 4 lines"):
        run(here, "read_file", path="src/a.py", first_line=9)


def test_nothing_outside_of_the_working_folder_is_read(here: Path):
    (here / "link").symlink_to(here.parent / "secret.txt")
    (here / "up").symlink_to(here.parent)
    (here / "inner").symlink_to(here / "notes.md")
    absolute = str(here.parent / "secret.txt")
    for path in (
        "../secret.txt",
        "src/../../secret.txt",
        absolute,
        "link",
        "up/secret.txt",
        "/etc/passwd",
        "..",
    ):
        with pytest.raises(ToolError, match="outside of the working folder"):
            run(here, "read_file", path=path)
    assert run(here, "read_file", path="inner") == "two words\n"
    with pytest.raises(ToolError, match="outside of the working folder"):
        run(here, "find_files", folder="up")


@pytest.mark.parametrize("has_ripgrep", [True, False])
def test_a_search_follows_no_link_out_of_the_folder(
    here: Path, has_ripgrep: bool, monkeypatch: pytest.MonkeyPatch
):
    choose_search(monkeypatch, has_ripgrep)
    (here / "link").symlink_to(here.parent / "secret.txt")
    (here / "up").symlink_to(here.parent)
    assert run(here, "find_files", text="secret") == "nothing was found"


def test_what_is_no_text_file_is_a_sentence(here: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(here / "pipe")
    (here / "binary").write_bytes(b"a\0b")
    (here / "latin").write_bytes(b"caf\xe9")
    monkeypatch.setattr(files, "MAX_FILE_NBYTES", 10)
    for path, words in (
        ("pipe", "is not a regular file"),
        ("src", "Is a directory"),
        ("binary", "is not a text file"),
        ("missing", "No such file"),
        ("a\0b", "it is no path"),
        ("src/a.py", "is larger than"),
    ):
        with pytest.raises(ToolError, match=words):
            run(here, "read_file", path=path)
    assert run(here, "read_file", path="latin") == "caf\ufffd"


def choose_search(monkeypatch: pytest.MonkeyPatch, has_ripgrep: bool) -> None:
    if has_ripgrep and shutil.which("rg") is None:
        pytest.skip("needs ripgrep")
    if not has_ripgrep:
        monkeypatch.setattr(shutil, "which", lambda _: None)


@pytest.mark.parametrize("has_ripgrep", [True, False])
def test_files_are_listed_and_searched_with_and_without_ripgrep(
    here: Path, has_ripgrep: bool, monkeypatch: pytest.MonkeyPatch
):
    choose_search(monkeypatch, has_ripgrep)
    assert sorted(run(here, "find_files").splitlines()) == ["notes.md", "src/a.py"]
    assert run(here, "find_files", glob="*.py") == "src/a.py"
    assert sorted(run(here, "find_files", text="two").splitlines()) == [
        "notes.md:1:two words",
        "src/a.py:2:two",
    ]
    assert run(here, "find_files", text="two", folder="src") == "src/a.py:2:two"
    assert run(here, "find_files", text="(two") == "nothing was found", "a text, not an expression"
    assert run(here, "find_files", text="--files") == "nothing was found", "a text, not an option"
    with pytest.raises(ToolError, match="is not a folder"):
        run(here, "find_files", folder="notes.md")
    for number in range(files.MAX_FILES + 10):
        (here / f"{number}.txt").write_text("many")
    for arguments in ({"glob": "*.txt"}, {"text": "many"}):
        lines = run(here, "find_files", **arguments).splitlines()
        assert len(lines) == files.MAX_FILES + 1
        assert lines[-1] == f"[only the first {files.MAX_FILES} are shown]"


# --- commands ---


def test_a_command_says_what_it_wrote_and_how_it_ended(here: Path):
    assert run(here, "shell", command="pwd; echo oops >&2; exit 3") == f"{here}\noops\n[exit code 3]"
    assert run(here, "shell", command="cat") == "", "nothing is on its input"
    with pytest.raises(ToolError, match="wanted 1 to 600"):
        run(here, "shell", command="true", seconds=601)
    with pytest.raises(ToolError, match="could not be started"):
        run(here, "shell", command="a\0b")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def has_ended(pid: int) -> bool:
    """Wait for the end of a process that was killed."""
    end = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.005)
    return not is_alive(pid)


@pytest.mark.slow
def test_a_command_that_takes_too_long_is_killed_with_its_children(here: Path):
    began = time.monotonic()
    said = run(here, "shell", command="sleep 300 & echo $!; trap '' TERM; sleep 300", seconds=1)
    child, ending = said.splitlines()
    assert ending == "[killed: it took longer than 1 s]"
    assert time.monotonic() - began < 30
    assert has_ended(int(child))


def test_what_a_command_leaves_in_the_background_is_ended_with_it(here: Path):
    said = run(here, "shell", command="sleep 300 & echo $!")
    assert has_ended(int(said))


def test_a_command_that_is_cancelled_while_it_starts_is_killed_too(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    """The loop may hear of the program only after the program has begun its own."""
    start, pid, cancelled = asyncio.create_subprocess_exec, here / "pid", asyncio.Event()

    async def start_slowly(*words: Any, **how: Any) -> asyncio.subprocess.Process:
        process = await start(*words, **how)
        await cancelled.wait()
        return process

    async def main() -> None:
        task = asyncio.create_task(own.run_command("sleep 300 & echo $! > pid; wait", here, 60))
        while not pid.exists() or not pid.read_text().strip():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_slowly)
    run_async(main())
    assert has_ended(int(pid.read_text()))


def test_a_cancelled_command_is_killed_with_its_children(here: Path):
    async def main() -> None:
        task = asyncio.create_task(own.run_command("sleep 300 & echo $! > pid; wait", here, 60))
        while not (here / "pid").exists() or not (here / "pid").read_text().strip():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_async(main())
    assert has_ended(int((here / "pid").read_text()))


def test_endless_output_keeps_its_beginning_and_its_end(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "MAX_OUTPUT_NBYTES", 100_000)
    said = run(here, "shell", command="echo begin; yes | head -c 5000000; echo end")
    assert said.startswith("begin\n") and said.endswith("end")
    assert len(said) <= 300_000


# --- arithmetic ---


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", 14),
        ("2^10", 1024),
        ("-(7 // 2) % 5", 2),
        ("sqrt(16) + abs(-3)", 7.0),
        ("round(pi, 2)", 3.14),
        ("max(1, 2, factorial(5))", 120),
        (" 1e3 ", 1000.0),
    ],
)
def test_an_expression_has_its_value(expression: str, value: float):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "1 +", "x", "__import__('os')", "(1).real", "[1][0]", "'a' * 9", "True", "1 if 1 else 2"),
        *("1 < 2", "lambda: 1", "sqrt(x=1)", "1j", "9**9**9**9", "10**5000 * 10**5000", "factorial(10**9)"),
        *("(-8)**0.5", "1/0", "sqrt(-1)", "exp(9999)", "(" * 500 + "1" + ")" * 500, "1+" * 2000 + "1"),
    ],
)
def test_what_has_no_value_is_a_sentence_at_once(expression: str):
    with pytest.raises(ToolError) as error:
        evaluate(expression)
    assert "\n" not in str(error.value)


@given(st.text(alphabet="0123456789.+-*/%^() ,episqrtfaclog", max_size=60))
def test_any_expression_is_a_number_or_a_sentence(expression: str):
    with suppress(ToolError):
        assert isinstance(evaluate(expression), int | float)


# --- results ---


def test_a_long_result_loses_its_middle_and_says_so():
    text = "a" * 600_000 + "b" * 400_000
    short = bound_result(text)
    assert len(short) < MAX_RESULT + 100
    assert short.startswith("a" * 1000) and short.endswith("b" * 1000)
    assert f"[{1_000_000 - MAX_RESULT:,} characters are left out here]" in short
    assert bound_result("") == "(no output)"


def test_a_result_moves_no_cursor_and_keeps_its_words():
    assert bound_result("\x1b[31mred\x1b[0m\x07 a\u202eb\tc\n<|im_end|>") == "red ab\tc\n<|im_end|>"
