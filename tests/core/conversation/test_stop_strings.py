"""Replies that end at a stop string: the next turn reads what was shown, and nothing else."""

from itertools import chain, repeat

import pytest

from qchat.core import Session, Store
from qchat.core.engine.engine import Engine
from qchat.core.generation.decode import Decoder
from tests.checkpoints import write_checkpoint
from tests.compare import needs_qtiny, relative_rms
from tests.paths import QTINY


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return Engine.load(folder)


@pytest.fixture(scope="module")
def qtiny() -> Engine:
    return Engine.load(QTINY)


draw = Decoder.next


def script(monkeypatch: pytest.MonkeyPatch, engine: Engine, reply: str) -> None:
    """Has the model say `reply`, so that the cache reads it too."""
    ids = chain(engine.tokenizer.encode(reply), repeat(70))

    def say(decoder: Decoder) -> int:
        decoder.force(next(ids))
        return draw(decoder)

    monkeypatch.setattr(Decoder, "next", say)


STOPPED = [  # the reply, the stop string, what is shown
    ("Good day. SECRET and more", "SECRET", "Good day. "),
    ("Good day. SECRET and more", "d day. SEC", "Goo"),
    ("SECRET", "SECRET", ""),
    ("SECRET", "ECRET", "S"),
    ("one 😀 two", "\U0001f600", "one "),
    ("one 😀 two", " 😀 t", "one"),
    ("hm\n</think>\n\nGood SECRET", "SECRET", "Good "),
]


@pytest.mark.slow
@pytest.mark.parametrize("history", ["preserve", "strip"])
@pytest.mark.parametrize(("reply", "stop", "shown"), STOPPED)
def test_what_a_stop_string_hid_is_not_read_by_the_next_turn(
    engine, monkeypatch, history, reply, stop, shown
):
    thinking = "</think>" in reply
    session = Session(engine, history=history, enable_thinking=thinking)
    script(monkeypatch, engine, f"{reply}<|im_end|>")
    first = session.send("hello", stop=[stop])
    assert (first.text, first.finish_reason) == (shown, "stop")
    assert session.live.cache.length == len(session.ids)
    script(monkeypatch, engine, "Fine.<|im_end|>")
    second = session.send("and now?")
    read = engine.tokenizer.decode_with_special(session.prompt_ids())
    assert f"{shown}<|im_end|>\n<|im_start|>user\nand now?<|im_end|>" in read
    assert second.prompt_tokens + second.generated_tokens == len(session.ids) == len(session.prompt_ids())
    assert relative_rms(session.live.logits(), engine.logits(session.ids)[-1]) < 2e-5


@pytest.mark.slow
@needs_qtiny
def test_words_that_share_a_token_with_a_stop_string_are_kept(qtiny, monkeypatch):
    token = qtiny.tokenizer.encode(" because")
    assert len(token) == 1
    session = Session(qtiny, enable_thinking=False)
    script(monkeypatch, qtiny, "Yes because<|im_end|>")
    done = session.send("hello", stop=["cause"])
    assert done.text == "Yes be"
    assert session.messages[-1]["content"] == "Yes be"
    ids = session.prompt_ids()
    assert token[0] not in ids
    assert qtiny.tokenizer.decode(ids).endswith("Yes be")


def test_a_rolled_back_reply_is_stored_as_it_was_shown(engine, monkeypatch, tmp_path):
    with Store(tmp_path / "chats.db") as store:
        session = Session(engine, store=store, enable_thinking=False)
        script(monkeypatch, engine, "Good day. SECRET<|im_end|>")
        session.send("hello", stop=["SECRET"])
        assert session.conversation is not None
        again = Session.reopen(engine, store, session.conversation)
        assert again.prompt_ids() == session.prompt_ids()
        assert "SECRET" not in engine.tokenizer.decode(again.prompt_ids())
