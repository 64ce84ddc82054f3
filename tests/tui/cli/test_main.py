"""The command with a scripted session: its streams, its arguments, its exit codes."""

import io
import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qchat.core as core
from qchat.core import BUILT_IN_MODEL
from qchat.core.errors import ContextLengthExceeded, ModelError, UsageError
from qchat.core.events import Done, Event, Notice, Performance, Prefill, Text, Thought
from qchat.tui.cli import choice
from qchat.tui.cli.main import main
from qchat.tui.text.output import printable

DONE = Done(
    "stop",
    text="Paris.",
    thinking="Hm.",
    prompt_tokens=9,
    cached_tokens=4,
    prefilled_tokens=5,
    reasoning_tokens=2,
    generated_tokens=5,
    performance=Performance(0.25, 100.0, 40.0, 0.5, peak_nbytes=2**30),
)
REPLY: list[Event] = [
    Notice("the template is built in"),
    Prefill(5, 9, 4),
    Prefill(9, 9, 4),
    Thought("Hm."),
    Text("Par"),
    Text("is."),
    DONE,
]


class ScriptedSession:
    """Plays `script`; an exception in it is raised at its place."""

    def __init__(self, script: list[Any]):
        self.script = script
        self.cancelled = False
        self.asked: list[str] = []

    def stream(self, text: str) -> Iterator[Event]:
        self.asked.append(text)
        for step in self.script:
            if isinstance(step, BaseException):
                raise step
            yield step

    def cancel(self) -> None:
        self.cancelled = True


class Loader:
    """Stands in for load_session and remembers what it was called with."""

    def __init__(self) -> None:
        self.session = ScriptedSession(REPLY)
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, path: str, **settings: Any) -> ScriptedSession:
        self.calls.append((path, settings))
        return self.session


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    loader = Loader()
    monkeypatch.setitem(vars(core), "load_session", loader)
    monkeypatch.setattr(choice, "choose_model", lambda name, *_, **__: (name or BUILT_IN_MODEL, None))
    monkeypatch.setattr(choice, "is_path_or_model", lambda _: True)
    pipe_in(monkeypatch, b"")
    return loader


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, *streams: str) -> None:
    for name in streams:
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda: True)


def one_sentence(stderr: str) -> str:
    """The only line on stderr, which must be ours."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("qchat: ")
    return lines[0].removeprefix("qchat: ")


# --- the answer and everything else ---


def test_the_answer_is_on_stdout_and_everything_else_on_stderr(loader: Loader, capsys: pytest.CaptureFixture):
    assert main(["model", "-p", "What?"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris.\n"
    assert err == "qchat: the template is built in\n"
    assert loader.session.asked == ["What?"]


def test_thoughts_are_shown_on_stderr_when_asked_for(loader: Loader, capsys: pytest.CaptureFixture):
    loader.session.script = [Thought("Hm"), Thought("."), Text("Yes.\n"), DONE]
    assert main(["model", "-p", "What?", "--show-thinking"]) == 0
    assert capsys.readouterr() == ("Yes.\n", "Hm.\n")


def test_a_reply_without_an_answer_prints_no_empty_line(loader: Loader, capsys: pytest.CaptureFixture):
    loader.session.script = [Thought("Hm"), Done("length", thinking="Hm", thinking_cut=True)]
    assert main(["model", "-p", "What?"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "inside its thought" in one_sentence(err)


@pytest.mark.parametrize(("reason", "said"), [("stop", "ended its reply inside"), ("cancelled", "")])
def test_a_thought_that_no_limit_cut_blames_no_limit(
    loader: Loader, capsys: pytest.CaptureFixture, reason, said
):
    loader.session.script = [Done(reason, thinking="Hm", thinking_cut=True)]
    main(["model", "-p", "What?"])
    err = capsys.readouterr().err
    assert said in err
    assert "--max-tokens" not in err


def test_a_schema_reaches_the_session_and_leaves_no_room_for_a_code_block(
    loader: Loader, capsys: pytest.CaptureFixture, tmp_path: Path
):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "string"}')
    assert main(["model", "-p", "What?", "--schema", str(path)]) == 0
    assert loader.calls == [("model", {"schema": {"type": "string"}})]
    capsys.readouterr()
    assert main(["model", "-p", "What?", "--schema", str(path), "-x"]) == 2
    assert "-x wants a code block" in one_sentence(capsys.readouterr().err)
    assert len(loader.calls) == 1


def test_without_the_extra_a_schema_is_refused_before_the_model_is_loaded(
    loader: Loader, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    (tmp_path / "schema.json").write_text('{"type": "string"}')
    assert main(["model", "-p", "What?", "--schema", str(tmp_path / "schema.json")]) == 2
    assert "extra `structured`" in one_sentence(capsys.readouterr().err)
    assert not loader.calls


def test_an_answer_cut_at_its_limit_is_said_to_be(loader: Loader, capsys: pytest.CaptureFixture):
    loader.session.script = [Text("Par"), Done("length", text="Par")]
    assert main(["model", "-p", "What?"]) == 0
    out, err = capsys.readouterr()
    assert out == "Par\n"
    assert "--max-tokens" in one_sentence(err)


def test_a_full_context_is_not_blamed_on_a_limit_that_could_be_raised(
    loader: Loader, capsys: pytest.CaptureFixture
):
    for thinking_cut in (True, False):
        loader.session.script = [
            Text("Par"),
            Done(
                "length",
                text="Par",
                context_full=True,
                thinking_cut=thinking_cut,
                detail="the context is full",
            ),
        ]
        assert main(["model", "-p", "What?"]) == 0
        assert "the context is full" in one_sentence(capsys.readouterr().err)


def test_stats_name_the_counts_and_speeds(loader: Loader, capsys: pytest.CaptureFixture):
    loader.session.script = REPLY[1:]
    assert main(["model", "-p", "What?", "--stats"]) == 0
    assert one_sentence(capsys.readouterr().err) == (
        "9 prompt tokens (4 cached) at 100.0/s · first token after 0.25 s · "
        "5 generated (2 thinking) at 40.0/s · 1.00 GiB at peak"
    )


def test_a_persona_shapes_one_answer_and_flags_come_before_it(
    loader: Loader, hermetic: Path, capsys: pytest.CaptureFixture
):
    folder = hermetic / "config" / "qchat" / "personas"
    folder.mkdir(parents=True)
    (folder / "poet.toml").write_text('system = "Answer in verse."\ntemperature = 1.2\nseed = 3\n')
    assert main(["model", "-p", "What?", "--persona", "poet", "--seed", "9"]) == 0
    ((_, settings),) = loader.calls
    given = {name: settings[name] for name in ("system", "temperature", "seed")}
    assert given == {"system": "Answer in verse.", "temperature": 1.2, "seed": 9}
    capsys.readouterr()
    assert main(["model", "-p", "What?", "--persona", "pot"]) == 2
    assert "did you mean poet?" in one_sentence(capsys.readouterr().err)


@pytest.mark.usefixtures("loader")
def test_json_is_one_object_and_thoughts_stay_in_it(capsys: pytest.CaptureFixture):
    assert main(["some/model", "-p", "What?", "--json", "--show-thinking"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "text": "Paris.",
        "thinking": "Hm.",
        "usage": {"prompt_tokens": 9, "cached_tokens": 4, "reasoning_tokens": 2, "completion_tokens": 5},
        "timings": {
            "seconds_to_first_token": 0.25,
            "prefill_tokens_per_s": 100.0,
            "decode_tokens_per_s": 40.0,
            "seconds": 0.5,
            "seconds_thinking": 0.0,
            "drafts_accepted": None,
            "drafts_by_place": [],
            "draft_cost": None,
            "draft_gain": None,
        },
        "finish_reason": "stop",
        "model": "some/model",
    }
    assert one_sentence(err) == "the template is built in"


@pytest.mark.usefixtures("loader")
def test_jsonl_is_one_event_a_line_and_exactly_one_done(capsys: pytest.CaptureFixture):
    assert main(["model", "-p", "What?", "--jsonl"]) == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == [type(event).__name__.lower() for event in REPLY]
    assert events[3] == {"event": "thought", "text": "Hm.", "tokens": 1}
    assert events[-1]["performance"]["decode_tokens_per_s"] == 40.0
    assert err == ""


# --- arguments ---


def test_options_arrive_as_the_session_names_them(loader: Loader):
    words = (
        "--system S --max-tokens 7 --temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1 --seed 4 --stop A "
        "--stop B --no-think --effort high --thinking-budget 0 --repetition-penalty 1.1 "
        "--presence-penalty -1 --frequency-penalty 0.25"
    )
    assert main(["model", "-p", "What?", *words.split()]) == 0
    assert loader.calls == [
        (
            "model",
            {
                "system": "S",
                "max_new_tokens": 7,
                "temperature": 0.5,
                "top_p": 0.9,
                "top_k": 3,
                "min_p": 0.1,
                "seed": 4,
                "stop": ["A", "B"],
                "enable_thinking": False,
                "reasoning_effort": "high",
                "thinking_token_budget": 0,
                "repetition_penalty": 1.1,
                "presence_penalty": -1.0,
                "frequency_penalty": 0.25,
            },
        )
    ]


def test_what_is_not_given_is_left_to_the_session(loader: Loader):
    assert main(["model", "-p", "What?"]) == 0
    assert main(["model", "-p", "What?", "--think"]) == 0
    assert loader.calls == [("model", {}), ("model", {"enable_thinking": True})]


@pytest.mark.parametrize(
    ("piped", "arguments", "asked"),
    [
        (b"piped\n", [], "piped"),
        (b"piped\n", ["-p", "given"], "piped\n\ngiven"),
        (b"", ["-p", "given"], "given"),
        (b"a\r\nb\n\n", [], "a\r\nb"),
        ("é 🙂\n".encode(), [], "é 🙂"),
    ],
)
def test_piped_text_comes_before_the_prompt(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, piped: bytes, arguments: list[str], asked: str
):
    pipe_in(monkeypatch, piped)
    assert main(["model", *arguments]) == 0
    assert loader.session.asked == [asked]


def test_a_terminal_on_stdin_is_not_waited_for(loader: Loader, monkeypatch: pytest.MonkeyPatch):
    at_a_terminal(monkeypatch, "stdin")
    assert main(["model", "-p", "given"]) == 0
    assert loader.session.asked == ["given"]


@pytest.mark.parametrize(
    ("arguments", "piped", "wanted"),
    [
        (["model", "-p", "  "], b"", "the prompt is empty"),
        (["model"], b"\n", "the prompt is empty"),
        (["model"], b"ab\xff", "byte 2 is 0xff"),
        (["model", "-p", "What?", "--temperature", "hot"], b"", "--temperature"),
        (["model", "-p", "What?", "--top-k", "1.5"], b"", "--top-k"),
        (["model", "-p", "What?", "--effort", "huge"], b"", "--effort"),
        (["model", "-p", "What?", "--json", "--jsonl"], b"", "not allowed with"),
        (["model", "-p", "What?", "--temp", "1"], b"", "unrecognized arguments: --temp"),
        (["model", "second", "-p", "What?"], b"", "the prompt was given twice"),
        (["model", "-p", "bad \udcff"], b"", "not valid UTF-8"),
        (["model", "-p"], b"", "expected one argument"),
    ],
)
def test_a_bad_command_line_is_one_sentence_and_code_2(
    loader: Loader,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    piped: bytes,
    wanted: str,
):
    pipe_in(monkeypatch, piped)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert wanted in one_sentence(err)
    assert loader.calls == []


@pytest.mark.parametrize(("arguments", "model"), [([], None), (["m", "--stats"], "m")])
def test_at_a_terminal_a_chat_begins(monkeypatch: pytest.MonkeyPatch, arguments: list[str], model: str):
    at_a_terminal(monkeypatch, "stdin", "stdout")
    begun = []
    monkeypatch.setattr("qchat.tui.cli.launch.run", lambda launch: begun.append(launch) or 0)
    assert main(arguments) == 0
    assert begun[0].model == model


def test_a_chat_is_not_printed_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    at_a_terminal(monkeypatch, "stdin", "stdout")
    assert main(["--json"]) == 2
    assert "print one reply" in capsys.readouterr().err


@pytest.mark.usefixtures("loader")
def test_too_much_piped_text_is_refused_before_it_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("qchat.tui.cli.main.MAX_STDIN_NBYTES", 1 << 20)
    pipe_in(monkeypatch, b"a" * ((1 << 20) + 1))
    assert main(["model"]) == 2
    assert "more than 1 MiB" in one_sentence(capsys.readouterr().err)


# --- failures ---


@pytest.mark.parametrize(
    ("error", "code", "wanted"),
    [
        (UsageError("top_p is 2, wanted a number from 0 to 1"), 2, "top_p is 2"),
        (ModelError("there is no model folder at model"), 3, "no model folder"),
        (ContextLengthExceeded(5000, 4096), 4, "5,000 tokens and the context holds 4,096"),
        (MemoryError(), 4, "out of memory"),
        (ModelError("a name with \x1b[31mcolour"), 3, "a name with \\x1b[31mcolour"),
    ],
)
@pytest.mark.parametrize("when", ["loading", "replying"])
def test_an_error_is_one_sentence_and_its_code(
    loader: Loader,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    error: Exception,
    code: int,
    wanted: str,
    when: str,
):
    def fail(*_args: Any, **_settings: Any):
        raise error

    if when == "loading":
        monkeypatch.setitem(vars(core), "load_session", fail)
    else:
        loader.session.script = [error]
    assert main(["model", "-p", "What?"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert wanted in one_sentence(err)


def test_a_reply_that_fails_midway_keeps_what_there_is(loader: Loader, capsys: pytest.CaptureFixture):
    loader.session.script = [Text("Par"), Done("error", text="Par", detail="the logits are not finite")]
    assert main(["model", "-p", "What?"]) == 1
    out, err = capsys.readouterr()
    assert out == "Par\n"
    assert one_sentence(err) == "the logits are not finite"


def test_an_unforeseen_error_leaves_its_traceback_in_a_private_file(
    loader: Loader, hermetic: Path, capsys: pytest.CaptureFixture
):
    loader.session.script = [RuntimeError("surprise")]
    assert main(["model", "-p", "What?"]) == 1
    sentence = one_sentence(capsys.readouterr().err)
    path = hermetic / "state" / "qchat" / "last-error.log"
    assert str(path) in sentence
    assert "RuntimeError: surprise" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_unforeseen_error_is_told_even_where_nothing_can_be_saved(
    loader: Loader, hermetic: Path, capsys: pytest.CaptureFixture
):
    (hermetic / "state").write_text("a file where the folder should be")
    loader.session.script = [RuntimeError("surprise")]
    assert main(["model", "-p", "What?"]) == 1
    assert "could not be saved" in one_sentence(capsys.readouterr().err)


# --- what a terminal may be sent ---

HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\rd\x9b31me\u202ef\tg\n"


def test_control_characters_of_the_model_do_not_reach_a_terminal(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    at_a_terminal(monkeypatch, "stdout", "stderr")
    loader.session.script = [Thought(HOSTILE), Text(HOSTILE), DONE]
    assert main(["model", "-p", "What?", "--show-thinking"]) == 0
    out, err = capsys.readouterr()
    assert out == err == "ab]0;titlecd31mef\tg\n"


def test_a_pipe_gets_the_text_as_it_is(loader: Loader, capsys: pytest.CaptureFixture):
    loader.session.script = [Text(HOSTILE), DONE]
    assert main(["model", "-p", "What?"]) == 0
    assert capsys.readouterr().out == HOSTILE


def test_letters_marks_and_emoji_are_printable():
    text = "naïve 日本語 العربية 👩‍👩‍👧 e\u0301\n\tcode"
    assert printable(text) == text


def test_progress_is_shown_on_a_terminal_once_reading_takes_long(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    at_a_terminal(monkeypatch, "stderr")
    monkeypatch.setattr("qchat.tui.cli.oneshot.PROGRESS_AFTER_SECONDS", -1)
    loader.session.script = [Prefill(512, 2048), Prefill(2048, 2048), Text("Yes."), DONE]
    assert main(["model", "-p", "What?"]) == 0
    line = "reading the prompt: 512 of 2,048 tokens"
    assert capsys.readouterr().err == "\r\r" + line + "\r" + " " * len(line) + "\r"


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 1000), (False, -1)])
def test_progress_is_not_shown_for_short_prompts_or_in_a_log(
    loader: Loader,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    terminal: bool,
    seconds: float,
):
    if terminal:
        at_a_terminal(monkeypatch, "stderr")
    monkeypatch.setattr("qchat.tui.cli.oneshot.PROGRESS_AFTER_SECONDS", seconds)
    loader.session.script = [Prefill(512, 2048), Text("Yes."), DONE]
    assert main(["model", "-p", "What?"]) == 0
    assert capsys.readouterr().err == ""
