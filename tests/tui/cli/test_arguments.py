"""The command's words with a scripted session: files, settings of all sources, code blocks, what is quiet."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qchat.core as core
from qchat.core.errors import GenerationError
from qchat.core.events import Done, Event, Notice, Text
from qchat.tui.cli import choice, launch
from qchat.tui.cli.launch import Launch
from qchat.tui.cli.main import main
from qchat.tui.cli.oneshot import first_code

CODE = (
    "Two ways:\n\n~~~sh\nls -l\n~~~\n\n1. or\n\n   ```python title=x\n   if a:\n       b()\n   ```\n\nDone."
)


class Sessions:
    """Stands in for load_session: every session answers with `reply`."""

    def __init__(self) -> None:
        self.reply: list[Event] = [Notice("a notice"), Text("Yes."), Done("stop", text="Yes.")]
        self.loaded: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[str] = []

    def load(self, path: str, **settings: Any) -> "Sessions":
        self.loaded.append((path, settings))
        return self

    def stream(self, text: str) -> Iterator[Event]:
        self.asked.append(text)
        yield from self.reply

    def cancel(self) -> None: ...

    @property
    def settings(self) -> dict[str, Any]:
        """What the last one was loaded with."""
        return self.loaded[-1][1]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sessions:
    """A command in a folder of its own, with nothing piped in."""
    sessions = Sessions()
    monkeypatch.setitem(vars(core), "load_session", sessions.load)
    monkeypatch.setattr(choice, "choose_model", lambda name, *_, **__: (name or "usual", None))
    monkeypatch.chdir(tmp_path)
    pipe_in(monkeypatch, b"")
    return sessions


@pytest.fixture
def launched(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The chats begun, at a terminal."""
    assert sessions.asked == []
    begun: list[Launch] = []
    monkeypatch.setattr(launch, "run", lambda wanted: begun.append(wanted) or 0)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    return begun


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one sentence with which the command line is refused."""
    assert main(words) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    return err


# --- words and verbs ---


def test_words_after_the_model_are_the_prompt_wherever_options_stand(sessions: Sessions):
    assert main(["m", "--think", "what", "is", "--seed", "4", "this?"]) == 0
    assert sessions.asked == ["what is this?"]
    assert sessions.loaded == [("m", {"enable_thinking": True, "seed": 4})]


def test_at_a_terminal_words_are_sent_in_the_chat(launched: list[Launch]):
    assert main(["m", "what", "is", "this?", "-f", "a.txt", "--theme", "ember", "-c", "--yes"]) == 0
    wanted = launched[0]
    assert (wanted.model, wanted.text, wanted.files) == ("m", "what is this?", ("a.txt",))
    assert (wanted.session, wanted.stats, wanted.yes) == ("latest", False, True)
    assert wanted.settings["theme"] == "ember"


def test_the_prompt_is_not_given_twice(sessions: Sessions, capsys: pytest.CaptureFixture[str]):
    assert "given twice" in refused(capsys, "m", "word", "-p", "text")
    assert sessions.loaded == []


@pytest.mark.parametrize("path", ["./sessions", "models/", "/tmp/config"])
def test_a_path_with_a_slash_is_a_model_whatever_it_is_called(launched: list[Launch], path: str):
    assert main([path]) == 0
    assert launched[0].model == path


def test_a_verb_alone_is_the_verb(launched: list[Launch], capsys: pytest.CaptureFixture[str]):
    assert main(["config", "path"]) == 0
    assert capsys.readouterr().out.endswith("qchat/config.toml\n")
    assert launched == []


@pytest.mark.parametrize("flag", ["--plain", "--screen-reader"])
def test_a_chat_line_by_line_also_reads_from_a_pipe(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, flag: str
):
    begun: list[Launch] = []
    monkeypatch.setattr(launch, "run", lambda wanted: begun.append(wanted) or 0)
    assert main(["m", flag]) == 0
    assert begun[0].settings[flag.removeprefix("--").replace("-", "_")] is True
    assert sessions.asked == []


# --- files ---


def test_what_was_piped_comes_first_then_files_then_the_prompt(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
):
    Path("a.py").write_text("x = 1\n")
    Path("b.txt").write_text("a fence: ```\n")
    pipe_in(monkeypatch, b"piped\n")
    assert main(["m", "-f", "a.py", "-f", "b.txt", "-p", "Explain."]) == 0
    assert sessions.asked == [
        "piped\n\na.py:\n```py\nx = 1\n```\n\nb.txt:\n```txt\na fence: ```\n```\n\nExplain."
    ]


def test_a_file_alone_is_a_prompt(sessions: Sessions):
    Path("a.md").write_text("What is 2 + 2?")
    assert main(["m", "-f", "a.md"]) == 0
    assert "What is 2 + 2?" in sessions.asked[0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.txt", None, "there is no such file"),
        ("a.bin", b"\0\1", "not a text file"),
        (".", None, "folder"),
    ],
)
def test_a_file_that_is_no_text_is_refused_before_a_model_is_loaded(
    sessions: Sessions, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, said: str
):
    if content is not None:
        Path(name).write_bytes(content)
    sentence = refused(capsys, "m", "-f", name, "-p", "What?")
    assert f"{name} cannot be" in sentence
    assert said in sentence
    assert sessions.loaded == []


# --- settings ---


def test_flags_stand_over_options_over_variables_over_files(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, hermetic: Path
):
    user = hermetic / "config" / "qchat" / "config.toml"
    user.parent.mkdir(parents=True)
    user.write_text("temperature = 0.1\ntop_k = 1\nmin_p = 0.1\nseed = 1\nmax_tokens = 1\n")
    Path(".qchat.toml").write_text("temperature = 0.2\ntop_k = 2\nmin_p = 0.2\nseed = 2\n")
    monkeypatch.setenv("QCHAT_TEMPERATURE", "0.3")
    monkeypatch.setenv("QCHAT_TOP_K", "3")
    monkeypatch.setenv("QCHAT_MIN_P", "0.3")
    assert main(["m", "-p", "What?", "-o", "top_k=4", "-o", "temperature=0.4", "--temperature", "0.5"]) == 0
    assert sessions.settings == {
        "temperature": 0.5,
        "top_k": 4,
        "min_p": 0.3,
        "seed": 2,
        "max_new_tokens": 1,
    }


def test_options_of_the_session_arrive_as_it_names_them(sessions: Sessions):
    words = "--history strip --context-limit 4096 --kv-bits 8 -s Terse."
    assert main(["m", "-p", "What?", *words.split(), "--snapshot-budget", "2 GiB"]) == 0
    assert sessions.settings == {
        "history": "strip",
        "context_limit": 4096,
        "snapshot_budget": 2 << 30,
        "quantized_kv": True,
        "system": "Terse.",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-o", "temprature=1"), "-o: there is no setting temprature; did you mean temperature?"),
        (("-o", "temperature"), "-o temperature: wanted KEY=VALUE"),
        (("-o", "top_k=many"), "-o: top_k is 'many', wanted a whole number"),
        (("--snapshot-budget", "much"), "--snapshot-budget: snapshot_budget is 'much', wanted bytes"),
        (("--kv-bits", "7"), "--kv-bits"),
        (("--history", "keep"), "--history"),
        (("--context-limit", "3"), "--context-limit: context_limit is 3"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_was_wanted(
    sessions: Sessions, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
):
    assert said in refused(capsys, "m", "-p", "What?", *words)
    assert sessions.loaded == []


def test_a_project_cannot_choose_the_model(sessions: Sessions, capsys: pytest.CaptureFixture[str]):
    Path(".qchat.toml").write_text("model = '/tmp/evil'\n")
    assert "model may not be set by a project" in refused(capsys, "-p", "What?")
    assert sessions.loaded == []


@pytest.mark.usefixtures("sessions")
def test_a_broken_settings_file_does_not_stand_in_the_way_of_help(capsys: pytest.CaptureFixture[str]):
    Path(".qchat.toml").write_text("[")
    assert main(["--help"]) == 0
    assert main(["config", "path"]) == 0
    assert capsys.readouterr().err == ""


# --- what is printed ---


@pytest.mark.parametrize(
    ("words", "printed"),
    [(["-x"], "ls -l\n"), (["-x", "python"], "if a:\n    b()\n"), (["--extract=PYTHON"], "if a:\n    b()\n")],
)
def test_only_the_first_code_block_is_printed(
    sessions: Sessions, capsys: pytest.CaptureFixture[str], words: list[str], printed: str
):
    sessions.reply = [Text(CODE), Done("stop", text=CODE)]
    assert main(["m", "-p", "How?", *words]) == 0
    assert capsys.readouterr() == (printed, "")


@pytest.mark.parametrize(("language", "said"), [("", "no code block\n"), ("rust", "no code block in rust\n")])
def test_a_reply_without_the_wanted_block_fails(
    sessions: Sessions, capsys: pytest.CaptureFixture[str], language: str, said: str
):
    sessions.reply = [Done("stop", text="no code" if not language else CODE)]
    assert refused(capsys, "m", "-p", "How?", f"--extract={language}", code=1).endswith(said)


def test_a_block_that_the_reply_left_open_is_one():
    assert first_code("```py\nx = 1", "py").rstrip("\n") == "x = 1"
    with pytest.raises(GenerationError):
        first_code("inline ``` is none", "")


def test_one_form_of_output_at_a_time(sessions: Sessions, capsys: pytest.CaptureFixture[str]):
    assert "not allowed with" in refused(capsys, "m", "-p", "How?", "--json", "--extract=py")
    assert sessions.loaded == []


def test_quiet_leaves_the_answer_and_nothing_else(sessions: Sessions, capsys: pytest.CaptureFixture[str]):
    sessions.reply[-1] = Done("length", text="Yes.", detail="a loop was closed")
    assert main(["m", "-p", "What?", "--quiet"]) == 0
    assert capsys.readouterr() == ("Yes.\n", "")
    assert main(["m", "-p", "What?"]) == 0
    assert capsys.readouterr().err.count("\n") == 3


def test_quiet_does_not_hide_an_error(sessions: Sessions, capsys: pytest.CaptureFixture[str]):
    sessions.reply = [Done("error", detail="the logits are not finite")]
    assert "not finite" in refused(capsys, "m", "-p", "What?", "--quiet", code=1)


def test_u_is_short_for_stats(sessions: Sessions, capsys: pytest.CaptureFixture[str]):
    sessions.reply = [Text("Yes."), Done("stop", text="Yes.")]
    assert main(["m", "-p", "What?", "-u"]) == 0
    assert "prompt tokens" in capsys.readouterr().err


# --- going on ---


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("-c",), "there is no earlier conversation", 2),
        (("--session", "7"), "there is no conversation 7", 1),
        (("--session", "Nothing like it"), "no conversation's title begins with", 2),
    ],
)
def test_a_conversation_that_is_not_there_is_refused_before_a_model_is_loaded(
    sessions: Sessions,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
    code: int,
):
    assert said in refused(capsys, "m", "-p", "And then?", *words, code=code)
    assert sessions.loaded == []
