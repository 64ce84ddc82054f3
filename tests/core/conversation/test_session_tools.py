"""Tools in a session: calls become events and messages, and the history with them is read once."""

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import pytest

from qchat.core import Session, Store
from qchat.core.conversation.summary import describe_session
from qchat.core.engine.engine import Engine
from qchat.core.errors import UsageError
from qchat.core.events import Done, Event, Notice, Text, ToolUse
from qchat.core.text.template import BUILT_IN, Template
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms
from tests.paths import QWEN, ROOT

TEMPLATES = QWEN / "templates"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n{}\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
LOOK = f"I must look.\n</think>\n\nOne moment.\n\n{CALL.format('Paris')}\n{CALL.format('Rome')}<|im_end|>"
SUNNY = "Now I know.\n</think>\n\nSunny in both.<|im_end|>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return replace(Engine.load(folder), template=Template(BUILT_IN, "built-in"))


@pytest.fixture
def engine(tiny, request) -> Engine:
    name = getattr(request, "param", "built-in")
    path = TEMPLATES / f"{name}.jinja"
    if name == "built-in":
        return tiny
    if not path.exists():
        pytest.skip(f"the template is not at {path}")
    return replace(tiny, template=Template(path.read_text(), name))


def script(monkeypatch: pytest.MonkeyPatch, engine: Engine, *replies: str) -> None:
    """Has the model say `replies` one after another, so that the cache reads them too."""
    from qchat.core.generation.decode import Decoder

    ids = chain(*(engine.tokenizer.encode(reply) for reply in replies), repeat(70))
    real = Decoder.next

    def say(decoder: Decoder) -> int:
        decoder.force(next(ids))
        return real(decoder)

    monkeypatch.setattr(Decoder, "next", say)


def finished(events: Iterable[Event]) -> Done:
    *_, done = events
    assert isinstance(done, Done)
    return done


def talking(engine: Engine, **options: Any) -> Session:
    return Session(engine, "Be brief.", tools=TOOLS, enable_thinking=True, max_new_tokens=400, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "history"),
    [
        *(("built-in", "preserve"), ("qwen3.6", "preserve"), ("qwen3.8", "preserve")),
        *(("qwen3.5", "strip"), ("qwen3.6", "strip")),
    ],
    indirect=["engine"],
)
def test_a_loop_of_tools_is_read_once_and_says_what_the_template_would(engine, history, monkeypatch):
    script(monkeypatch, engine, LOOK, SUNNY, "Hm.\n</think>\n\nBye.<|im_end|>")
    session = talking(engine, history=history)
    events = list(session.stream("What is the weather in Paris and Rome?"))
    done = finished(events)
    uses = [event for event in events if isinstance(event, ToolUse)]
    assert [use.arguments for use in uses] == [{"city": "Paris", "days": 3}, {"city": "Rome", "days": 3}]
    assert done.tool_calls == tuple(uses)
    assert done.text == "".join(e.text for e in events if isinstance(e, Text))
    assert done.text.strip() == "One moment."
    assert "weather" in engine.tokenizer.decode(session.ids[: done.prompt_tokens])
    list(session.idle())

    results = list(session.answer_tools(["sun", "<tool_response> & <|im_end|>"]))
    answer = finished(results)
    assert answer.text == "Sunny in both."
    assert answer.cached_tokens == done.prompt_tokens + done.generated_tokens
    list(session.idle())
    last = list(session.stream("Thanks"))
    new = len(engine.tokenizer.encode("Thanks")) + 40
    assert finished(last).prefilled_tokens <= new
    assert not [e for e in [*events, *results, *last] if isinstance(e, Notice)]
    assert relative_rms(session.live.logits(), engine.logits(session.ids)[-1]) <= 2e-5
    assert [turn.role for turn in describe_session(session).turns] == ["user", "tool", "user"]


def test_the_loop_of_the_readme_answers_every_call(engine, monkeypatch, capsys):
    script(monkeypatch, engine, LOOK, SUNNY)
    sessions: list[Session] = []

    def load_session(_: str, **settings: Any) -> Session:
        sessions.append(Session(engine, enable_thinking=True, **settings))
        return sessions[0]

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "core/README.md").read_text(), re.DOTALL)
    (loop,) = (block for block in blocks if "answer_tools" in block)
    monkeypatch.setattr("qchat.core.load_session", load_session, raising=False)
    exec(loop, {})
    assert capsys.readouterr().out.strip() == "Sunny in both."
    results = [one["content"] for one in sessions[0].messages if one["role"] == "tool"]
    assert results == ["Paris: sun for 3 days", "Rome: sun for 3 days"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["built-in", "qwen3.6"], indirect=True)
def test_a_reopened_loop_of_tools_is_the_same(engine, monkeypatch, tmp_path):
    script(monkeypatch, engine, LOOK, SUNNY, SUNNY)
    with Store(tmp_path / "c.db") as store:
        session = talking(engine, store=store)
        list(session.stream("What is the weather?"))
        list(session.answer_tools(["sun", "rain"]))
        again = Session.reopen(engine, store, session.conversation or 0)
        assert again.messages == session.messages
        assert again.tools == TOOLS
        assert [n.ids for n in again.tree.nodes] == [n.ids for n in session.tree.nodes]
        assert again.undo() == "What is the weather?"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["built-in", "qwen3.5"], indirect=True)
def test_a_written_history_with_calls_has_the_ids_of_a_spoken_one(engine, monkeypatch):
    script(monkeypatch, engine, LOOK, SUNNY)
    spoken = talking(engine)
    list(spoken.stream("What is the weather?"))
    list(spoken.answer_tools(["sun", "rain"]))
    written = talking(engine)
    written.prime(spoken.messages[1:])
    assert written.messages == spoken.messages
    said = [engine.tokenizer.decode(node.ids).split() for node in written.tree.nodes]
    assert said == [engine.tokenizer.decode(node.ids).split() for node in spoken.tree.nodes]


@pytest.mark.slow
def test_a_reply_that_is_cut_inside_a_call_stays_text(engine, monkeypatch):
    script(monkeypatch, engine, LOOK)
    tokens = len(engine.tokenizer.encode(LOOK))
    session = talking(engine)
    done = finished(session.stream("What is the weather?", max_new_tokens=tokens - 20))
    assert done.finish_reason == "length"
    assert [use.arguments["city"] for use in done.tool_calls] == ["Paris"]
    assert "<function=weather>" in done.text
    assert session.messages[-1]["content"].endswith(done.text.strip())


def test_without_tools_calls_are_text(engine, monkeypatch):
    script(monkeypatch, engine, LOOK)
    session = Session(engine, enable_thinking=True)
    done = finished(session.stream("How does one call a tool?"))
    assert done.tool_calls == ()
    assert "<tool_call>" in done.text


@pytest.mark.slow
def test_results_are_taken_for_calls_alone_and_for_each_one(engine, monkeypatch):
    script(monkeypatch, engine, LOOK, SUNNY)
    session = talking(engine)
    with pytest.raises(UsageError, match="calls 0 tools"):
        session.answer_tools(["sun"])
    list(session.stream("What is the weather?"))
    with pytest.raises(UsageError, match="calls 2 tools, and 1"):
        session.answer_tools(["sun"])
    list(session.answer_tools(["sun", "rain"]))
    with pytest.raises(UsageError, match="turn 2 holds the results of tools"):
        session.edit(2, "what?")


def test_a_tool_that_names_no_function_is_refused(engine):
    with pytest.raises(UsageError, match="names its function"):
        Session(engine, tools=[{"type": "function"}])


def test_a_template_without_tools_is_said_to_be_one(engine):
    plain = Template("{% for m in messages %}{{ m.content }}\n{% endfor %}", "plain")
    session = Session(replace(engine, template=plain), tools=TOOLS, max_new_tokens=2)
    assert any("ignores tools" in e.text for e in session.stream("hello") if isinstance(e, Notice))
