"""Tools in a session: calls become events and messages, and the history with them is read once."""

import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import pytest

from qchat.core import Session, Store
from qchat.core.conversation.offered_tools import promised_tools
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_other_tools_are_offered_on_a_new_branch_and_the_same_ones_on_this(engine, monkeypatch):
    script(monkeypatch, engine, LOOK, SUNNY)
    session = talking(engine)
    list(session.stream("What is the weather?"))
    list(session.answer_tools(["sun", "rain"]))
    leaf, said = session.tree.leaf, session.messages
    session.set_tools(TOOLS)
    assert session.tree.leaf is leaf
    session.set_tools([])
    assert describe_session(session).tools == ()
    assert session.messages == said
    assert "parameters" not in engine.tokenizer.decode(session.tree.branch()[0].ids)
    assert len(describe_session(session).branches) == 2
    session.set_tools(TOOLS)
    assert describe_session(session).tools == ("weather",)
    assert "parameters" in engine.tokenizer.decode(session.tree.branch()[0].ids)
    session.switch(leaf.number if leaf else 0)
    session.set_tools([])
    assert describe_session(session).tools == (), "what this branch has counts, not what was offered last"
    with pytest.raises(UsageError, match="names its function"):
        session.set_tools([{}])
    session.set_tools([])
    session.reset()
    session.set_tools(TOOLS)
    assert describe_session(session).tools == ("weather",)


@pytest.mark.slow
def test_a_call_that_cannot_be_read_may_be_answered_beside_the_others(engine, monkeypatch):
    broken = '<tool_call>\n{"name": weather of Paris}\n</tool_call><|im_end|>'
    script(monkeypatch, engine, f"Hm.\n</think>\n\n{broken}", SUNNY, LOOK, SUNNY)
    session = talking(engine)
    done = finished(session.stream("What is the weather?"))
    assert (done.tool_calls, done.unread_call) == ((), True)
    answer = finished(session.answer_tools(["that call could not be read"]))
    assert answer.text == "Sunny in both."
    assert answer.cached_tokens == done.prompt_tokens + done.generated_tokens
    (turn,) = describe_session(session).turns[1:]
    assert (turn.role, [result.text for result in turn.results]) == ("tool", ["that call could not be read"])
    assert not finished(session.stream("Again")).unread_call
    with pytest.raises(UsageError, match="calls 2 tools, and 3"):
        session.answer_tools(["sun", "rain", "snow"])


@pytest.mark.slow
def test_a_turn_has_its_results_under_the_names_of_their_calls(engine, monkeypatch):
    script(monkeypatch, engine, LOOK, SUNNY)
    session = talking(engine)
    list(session.stream("What is the weather?"))
    list(session.answer_tools(["sun", "rain"]))
    first, second = describe_session(session).turns
    assert first.results == ()
    assert [(one.name, one.text, one.seconds) for one in second.results] == [
        ("weather", "sun", None),
        ("weather", "rain", None),
    ]


UNPROMISED = {"name": "odd", "parameters": {"type": "object", "not": {"required": ["x"]}}}


def test_calls_satisfy_the_schemas_that_a_grammar_can_express(engine):
    session = Session(
        engine, tools=[*TOOLS, {"function": UNPROMISED}], constrain_calls=True, enable_thinking=False
    )
    assert promised_tools(engine, session.tools) == {"weather"}
    assert promised_tools(engine, TOOLS) == {"weather"}
    assert promised_tools(engine, []) == frozenset()
    *_, done = session.stream("What is the weather?", max_new_tokens=40, temperature=2.0, seed=1)
    assert isinstance(done, Done) and done.finish_reason != "error"


def test_nothing_is_promised_without_llguidance(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    lacking = replace(engine)  # which built no vocabulary yet
    assert promised_tools(lacking, TOOLS) == frozenset()
    session = Session(lacking, tools=TOOLS, constrain_calls=True, enable_thinking=False, max_new_tokens=4)
    assert session.send("hello").finish_reason == "length"


def test_a_tool_that_names_no_function_is_refused(engine):
    with pytest.raises(UsageError, match="names its function"):
        Session(engine, tools=[{"type": "function"}])


def test_a_template_without_tools_is_said_to_be_one(engine):
    plain = Template("{% for m in messages %}{{ m.content }}\n{% endfor %}", "plain")
    session = Session(replace(engine, template=plain), tools=TOOLS, max_new_tokens=2)
    assert any("ignores tools" in e.text for e in session.stream("hello") if isinstance(e, Notice))
