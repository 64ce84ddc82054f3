"""Probabilities of replies that are there already: those of the draw, and nothing else changes."""

from collections.abc import Sequence
from typing import Any

import pytest

from qchat.core import Session
from qchat.core.conversation.scoring import score_reply
from qchat.core.conversation.summary import describe_replies, describe_session
from qchat.core.engine.engine import Engine
from qchat.core.errors import UsageError
from qchat.core.events import Event, Logprobs
from tests.checkpoints import write_checkpoint

SETTINGS: dict[str, Any] = {
    "max_new_tokens": 70,
    "seed": 1,
    "enable_thinking": True,
    "thinking_token_budget": 5,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return Engine.load(folder)


def logprobs(events: Sequence[Event]) -> list[Logprobs]:
    return [event for event in events if isinstance(event, Logprobs)]


@pytest.mark.parametrize("snapshots", [1 << 30, 0], ids=["from a snapshot", "all read again"])
@pytest.mark.parametrize("history", ["preserve", "strip"])
def test_a_scored_reply_has_the_probabilities_of_its_draw(engine: Engine, snapshots: int, history):
    session = Session(engine, history=history, snapshot_budget=snapshots, **SETTINGS)
    drawn = [logprobs(list(session.stream(text, top_logprobs=3))) for text in ("hello", "more")]
    live, state = list(session.live.ids), describe_session(session)
    # in the mode strip only the last reply is still read after what it was drawn after
    for turn in (1, 2):
        scored = logprobs(list(score_reply(session, turn, 3)))
        assert [one.token.id for one in scored] == [one.token.id for one in drawn[turn - 1]]
        assert [one.in_thought for one in scored] == [one.in_thought for one in drawn[turn - 1]]
        for mine, theirs in zip(scored, drawn[turn - 1], strict=True):
            assert mine.token.logprob == pytest.approx(theirs.token.logprob, abs=2e-3)
            assert mine.top[0].logprob == pytest.approx(theirs.top[0].logprob, abs=2e-3)
            assert len(mine.top) == 3
    assert session.live.ids == live == session.live.ids[: session.live.cache.length]
    assert describe_session(session) == state


@pytest.mark.slow
def test_scoring_changes_no_later_reply(engine: Engine):
    def replies(scores: bool) -> list[str]:
        session = Session(engine, **SETTINGS, draft_tokens=3)
        session.send("hello")
        session.send("more")
        if scores:
            assert list(score_reply(session, 1, 0)) and list(score_reply(session, 2, 5))
        return [session.send("and more").raw_text, session.send("again").raw_text]

    assert replies(True) == replies(False)


def test_scoring_stops_when_asked_and_refuses_unknown_turns(engine: Engine):
    session = Session(engine, **SETTINGS)
    with pytest.raises(UsageError, match="no question 1"):
        list(score_reply(session, 1, 2))
    session.send("hello")
    cancelled = iter([False])
    scored = logprobs(list(score_reply(session, 1, 2, lambda: next(cancelled, True))))
    assert 0 <= len(scored) < len(logprobs(list(score_reply(session, 1, 2))))


def test_the_replies_of_all_branches_are_described_with_their_turns(engine: Engine):
    session = Session(engine, **{**SETTINGS, "max_new_tokens": 6})
    session.send("one")
    session.send("two")
    list(session.retry(seed=9))
    session.fork(1)
    session.send("other")
    turns = describe_replies(session)
    assert [(turn.number, turn.question) for turn in turns] == [
        (1, "one"),
        (2, "two"),
        (2, "two"),
        (2, "other"),
    ]
    assert turns[1].siblings == turns[2].siblings and len(turns[1].siblings) == 3
    assert describe_session(session).turns == (turns[0], turns[3])
