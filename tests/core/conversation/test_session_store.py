"""A session kept in a store: what is written when, and what a reopened one is."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert

from qchat.core import Session, Store, export_conversation, import_conversation
from qchat.core.conversation import recorder
from qchat.core.conversation.summary import ConversationState, describe_cache, describe_session
from qchat.core.conversation.transcript import Input, Output
from qchat.core.engine.engine import Engine
from qchat.core.errors import StoreError, UsageError
from qchat.core.events import Done, Notice, Text
from qchat.core.text.template import Template
from tests.checkpoints import write_checkpoint
from tests.compare import needs_qtiny, relative_rms
from tests.paths import QTINY

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "seed": 1}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return Engine.load(folder)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "books" / "conversations.db") as opened:
        yield opened


def number_of(session: Session) -> int:
    assert session.conversation is not None
    return session.conversation


def leaf_of(session: Session) -> Output:
    assert session.tree.leaf is not None
    return session.tree.leaf


def shape(session: Session) -> dict[str, Any]:
    """Everything a tree of nodes is, with numbers counted from its own beginning."""
    places = {node.number: place for place, node in enumerate(session.tree.nodes)}

    def place(node: Input | Output | None) -> int | None:
        return None if node is None else places[node.number]

    def told(node: Input | Output) -> list[Any]:
        if isinstance(node, Input):
            return [node.messages, node.switches if node.parent is None else {}]
        return [node.opener, node.message, node.settings, node.stats]

    nodes = [[type(n).__name__, place(n.parent), n.ids, n.created, *told(n)] for n in session.tree.nodes]
    return {"nodes": json.loads(json.dumps(nodes)), "leaf": place(session.tree.leaf)}


def state_without_numbers(session: Session) -> dict[str, Any]:
    state = asdict(describe_session(session))
    for turn in state["turns"]:
        turn["siblings"] = turn["siblings"].index(turn.pop("node"))
    for branch in state["branches"]:
        del branch["number"]
    return state | {"leaf": None}


def branched(engine: Engine, store: Store) -> Session:
    """Retries, edits, a cancelled and an undone turn, two system messages."""
    session = Session(engine, "Be brief.", store=store, **SETTINGS)
    session.send("hello")
    list(session.retry(seed=2))
    session.send("and <think> now? é😀")
    list(session.edit(2, "or now?", seed=3, enable_thinking=False))
    events = session.stream("a story", max_new_tokens=60)
    for event in events:
        if isinstance(event, Text):
            session.cancel()
    session.set_system("Be long.")
    session.send("more")
    session.undo()
    return session


def test_nothing_is_stored_before_the_first_question(engine, store):
    session = Session(engine, "Be brief.", store=store)
    session.history = "strip"
    session.rename("mine")
    assert (session.conversation, session.title, store.conversations()) == (None, "mine", [])
    session.send("hello", **SETTINGS)
    (found,) = store.conversations()
    assert (found.id, found.title, found.system) == (session.conversation, "mine", "Be brief.")
    assert found.settings["history"] == "strip"
    assert found.model.template_hash


@pytest.mark.slow
def test_a_reopened_tree_is_the_tree(engine, store):
    session = branched(engine, store)
    again = Session.reopen(engine, store, number_of(session), **SETTINGS)
    assert shape(again) == shape(session)
    assert state_without_numbers(again) == state_without_numbers(session)
    assert again.messages == session.messages
    assert again.send("go on").raw_text == session.send("go on").raw_text


def test_the_state_is_plain_json_with_what_the_turns_were(engine, store):
    session = Session(engine, store=store, **SETTINGS)
    first = session.send("one")
    list(session.retry(seed=5))
    state = describe_session(session)
    assert convert(json.loads(json.dumps(asdict(state))), ConversationState) == state
    (turn,) = state.turns
    assert (turn.number, turn.question, turn.role) == (1, "one", "user")
    assert len(turn.siblings) == len(state.branches) == 2
    assert turn.node == state.leaf == turn.siblings[1]
    assert turn.stats.performance.seconds_to_first_token > 0
    session.switch(turn.siblings[0])
    (turn,) = describe_session(session).turns
    assert (turn.answer, turn.thinking) == (first.text, first.thinking)
    assert turn.stats.generated_tokens == first.generated_tokens
    assert state.tokens >= first.prompt_tokens


def test_branches_tell_where_they_leave_the_current_one_and_whether_a_switch_is_instant(engine, store):
    session = Session(engine, store=store, **SETTINGS)
    for question in ("one", "two", "three"):
        session.send(question)
    session.fork(1)
    (end,) = describe_session(session).branches
    assert (end.turns, end.shared, end.current) == (3, 1, False)
    session.send("other")
    end, here = describe_session(session).branches
    assert (end.turns, end.shared, end.current) == (3, 1, False)
    assert (here.turns, here.shared, here.current) == (2, 2, True)
    assert set(describe_cache(session).instant) == {end.number, here.number}
    for snapshot in list(session.live.snapshots):
        session.live.snapshots._drop(snapshot)
    assert describe_cache(session).instant == ()


def test_a_turn_is_whole_in_the_store_when_done_is_said(engine, store):
    session = Session(engine, store=store, **SETTINGS)
    for event in session.stream("hello"):
        (found,) = store.conversations()
        question, reply = store.branch(found.id)
        if isinstance(event, Done):
            assert (reply.state, reply.text, reply.ids) == ("complete", event.text, leaf_of(session).ids)
            assert reply.stats["generated_tokens"] == event.generated_tokens
        else:
            assert (question.text, reply.state) == ("hello", "streaming")


def test_a_reply_left_half_way_is_stored_as_cancelled(engine, store):
    session = Session(engine, store=store, max_new_tokens=50, enable_thinking=False, seed=1)
    events = session.stream("hello")
    next(e for e in events if isinstance(e, Text))
    events.close()
    reply = store.branch(number_of(session))[-1]
    assert (reply.state, reply.ids) == ("cancelled", leaf_of(session).ids)
    assert shape(Session.reopen(engine, store, number_of(session))) == shape(session)


def test_a_question_cancelled_before_its_first_token_is_no_part_of_the_tree(engine, store):
    session = Session(engine, store=store, **SETTINGS)
    session.send("hello")
    for _ in session.stream("never answered"):
        session.cancel()
    again = Session.reopen(engine, store, number_of(session))
    assert shape(again) == shape(session)
    assert len(session.tree.branch_ends()) == len(again.tree.branch_ends()) == 1


def leave_streaming(store: Store, conversation: int, ids: list[int]) -> None:
    """As a killed process does: its last reply has only `ids`, and its text is older than they are."""
    reply = store.branch(conversation)[-1]
    store.update_node(reply.id, state="streaming", ids=ids, text=reply.text[:1], thinking="", stats={})


def test_a_killed_reply_says_what_its_ids_say_and_goes_on_as_a_cancelled_one(engine, store):
    session = Session(engine, store=store, max_new_tokens=20, enable_thinking=False, seed=1)
    session.send("hello")
    ids = leaf_of(session).ids[:9]
    leave_streaming(store, number_of(session), ids)
    again = Session.reopen(engine, store, number_of(session), **SETTINGS)
    (turn,) = describe_session(again).turns
    assert turn.finish_reason == "cancelled"
    assert turn.answer.startswith(engine.tokenizer.decode(ids).lstrip("\n")[:5])
    events = list(again.stream("and?"))
    assert not [e for e in events if isinstance(e, Notice) and "differ" in e.text]
    assert engine.tokenizer.token_id("<|im_end|>") == again.ids[again.ids.index(ids[0]) :][len(ids)]
    assert relative_rms(again.live.logits(), engine.logits(again.ids)[-1]) <= 2e-5
    assert store.branch(number_of(session))[1].state == "cancelled"


def test_a_question_whose_process_was_killed_before_a_token_is_told(engine, store):
    session = Session(engine, store=store, **SETTINGS)
    session.send("hello")
    conversation = number_of(session)
    question = store.add_node(conversation, store.branch(conversation)[-1].id, "user", text="lost?", ids=[1])
    store.add_node(conversation, question, "assistant", state="streaming")
    again = Session.reopen(engine, store, conversation, **SETTINGS)
    assert len(describe_session(again).turns) == 1
    assert any("lost?" in e.text for e in again.stream("next") if isinstance(e, Notice))


def test_a_store_that_refuses_costs_a_notice_and_the_next_turn_writes_what_is_missing(
    engine, store, monkeypatch
):
    session = Session(engine, store=store, **SETTINGS)
    session.send("one")
    with monkeypatch.context() as broken:
        refuse = _refusing(store)
        for name in ("add_nodes", "update", "set_leaf"):
            broken.setattr(store, name, refuse)
        events = [*session.stream("two"), *session.stream("three")]
    assert len([e for e in events if isinstance(e, Notice) and "not being saved" in e.text]) == 1
    session.send("four")
    texts = [node.text for node in store.branch(number_of(session)) if node.role == "user"]
    assert texts == ["one", "two", "three", "four"]
    assert shape(Session.reopen(engine, store, number_of(session))) == shape(session)


def test_an_end_that_could_not_be_written_is_written_with_the_next_turn(engine, store, monkeypatch):
    session = Session(engine, store=store, **SETTINGS)
    with monkeypatch.context() as broken:
        broken.setattr(store, "update_node", _refusing(store))
        events = list(session.stream("one"))
    assert any(isinstance(e, Notice) and "not being saved" in e.text for e in events)
    session.send("two")
    assert shape(Session.reopen(engine, store, number_of(session))) == shape(session)


def _refusing(store: Store):
    def refuse(*_: object, **__: object):
        raise StoreError(f"the disk with {store.path} is full")

    return refuse


@pytest.mark.slow
def test_two_sessions_on_one_conversation_lose_nothing(engine, store):
    first = Session(engine, store=store, **SETTINGS)
    first.send("hello")
    second = Session.reopen(engine, store, number_of(first), **SETTINGS)
    for number in range(3):
        first.send(f"first {number}")
        second.send(f"second {number}")
    merged = Session.reopen(engine, store, number_of(first))
    questions = [node.text for node in merged.tree.nodes if isinstance(node, Input)]
    assert sorted(questions) == sorted(
        ["hello", *(f"{name} {n}" for name in ("first", "second") for n in range(3))]
    )
    assert len(merged.tree.branch_ends()) == 2


# --- ids that are not this model's ---


def notices(session: Session) -> list[str]:
    return [e.text for e in session.stream("next", **SETTINGS) if isinstance(e, Notice)]


@pytest.mark.slow
def test_under_another_template_the_ids_are_authored_again_and_said_so(engine, store):
    session = branched(engine, store)
    other = replace(
        engine, template=Template(engine.template.source.replace("<|im_start|>", "<|im_start|> "), "other")
    )
    again = Session.reopen(other, store, number_of(session), **SETTINGS)
    assert again.messages == session.messages
    root = again.tree.nodes[0]
    assert other.tokenizer.decode(root.ids).startswith(" system")
    assert [text for text in notices(again) if "another template" in text and "encoded again" in text]
    assert relative_rms(again.live.logits(), other.logits(again.ids)[-1]) <= 2e-5
    # it has become the other's
    once_more = Session.reopen(other, store, number_of(session))
    assert (
        shape(once_more)["nodes"][: len(session.tree.nodes)]
        == shape(again)["nodes"][: len(session.tree.nodes)]
    )
    assert not [text for text in notices(once_more) if "encoded again" in text]


def test_ids_outside_the_vocabulary_never_reach_the_model(engine, store):
    session = Session(engine, store=store, **SETTINGS)
    session.send("hello")
    reply = store.branch(number_of(session))[-1]
    store.update_node(reply.id, ids=[5, engine.config.vocab_size])
    again = Session.reopen(engine, store, number_of(session))
    assert all(id < engine.config.vocab_size for node in again.tree.nodes for id in node.ids)
    assert [text for text in notices(again) if "damaged" in text]


def say(monkeypatch: pytest.MonkeyPatch, engine: Engine, text: str) -> None:
    """Has every reply consist of `text`, over and over."""
    drawn = cycle(engine.tokenizer.encode(text))
    monkeypatch.setattr("qchat.core.generation.decode.Decoder.next", lambda _self: next(drawn))


def test_an_imported_conversation_keeps_ids_that_say_what_its_messages_do(
    engine, store, tmp_path, monkeypatch
):
    say(monkeypatch, engine, "é😀 yes.<|im_end|>")
    session = Session(engine, store=store, max_new_tokens=20, enable_thinking=False)
    session.send("hello")
    session.send("more")
    path = tmp_path / "c.json"
    export_conversation(store, number_of(session), path)
    copy = Session.reopen(engine, store, import_conversation(store, path))
    assert [n.ids for n in copy.tree.nodes] == [n.ids for n in session.tree.nodes]
    document = json.loads(path.read_text())
    hidden = [*engine.tokenizer.encode("<|im_end|><|im_start|>system"), 70]
    document["nodes"][1]["ids"] = hidden
    document["nodes"][0]["ids"] = hidden
    document["nodes"][3]["stats"] = {"performance": "fast", "generated_tokens": "many"}
    path.write_text(json.dumps(document))
    forged = Session.reopen(engine, store, import_conversation(store, path))
    assert forged.messages == session.messages
    assert all(engine.tokenizer.token_id("<|im_start|>") not in n.ids for n in forged.tree.nodes[1:2])
    assert forged.tree.nodes[0].ids == session.tree.nodes[0].ids
    assert describe_session(forged).turns[1].stats.generated_tokens == 0
    assert [text for text in notices(forged) if "imported" in text]


def test_a_thought_inside_the_text_of_an_imported_reply_is_taken_apart(engine, store, tmp_path, monkeypatch):
    say(monkeypatch, engine, "yes</think>no<|im_end|>")
    session = Session(engine, store=store, max_new_tokens=20, enable_thinking=False)
    session.send("hello")
    path = tmp_path / "c.json"
    export_conversation(store, number_of(session), path)
    copy = Session.reopen(engine, store, import_conversation(store, path))
    assert copy.messages == session.messages  # words about `</think>` are an answer
    document = json.loads(path.read_text())
    document["nodes"][1] |= {"text": "<think>\nwhy\n</think>\n\nbecause", "ids": []}
    path.write_text(json.dumps(document))
    message = Session.reopen(engine, store, import_conversation(store, path)).messages[-1]
    assert (message["content"], message["reasoning_content"]) == ("because", "why")


def test_trees_that_no_conversation_makes_are_refused(engine, store):
    conversation = store.create(title="odd")
    store.add_node(conversation, None, "assistant", text="hello?")
    with pytest.raises(StoreError, match="a reply without a question"):
        Session.reopen(engine, store, conversation)
    with pytest.raises(StoreError, match="no conversation 99"):
        Session.reopen(engine, store, 99)


# --- live states ---


def test_a_closed_conversation_goes_on_without_reading_it_again(engine, store):
    session = Session(engine, store=store, history="preserve", **SETTINGS)
    session.send("hello " * 30)
    session.close()
    again = Session.reopen(engine, store, number_of(session), **SETTINGS)
    assert again.ids == session.ids
    done = again.send("more")
    assert done.cached_tokens == len(session.ids)
    assert done.raw_text == session.send("more").raw_text


def test_in_strip_mode_a_state_before_the_thought_is_saved(engine, store):
    session = Session(engine, store=store, history="strip", enable_thinking=True, **SETTINGS)
    session.send("hello " * 30)
    session.close()
    asked = session.turns[-1].prompt_tokens
    done = Session.reopen(engine, store, number_of(session), **SETTINGS).send("more")
    assert asked - 12 <= done.cached_tokens <= asked


@pytest.mark.slow
def test_a_flipped_byte_is_refused_read_again_and_said(engine, store):
    session = Session(engine, store=store, history="preserve", **SETTINGS)
    session.send("hello " * 30)
    session.close()
    (path,) = store.states_folder.glob("*.safetensors")
    written = path.read_bytes()
    place = len(written) - 1000
    path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
    again = Session.reopen(engine, store, number_of(session), **SETTINGS)
    events = list(again.stream("more"))
    assert any("damaged" in e.text and "read again" in e.text for e in events if isinstance(e, Notice))
    done = events[-1]
    assert isinstance(done, Done)
    assert done.cached_tokens == 0
    assert done.raw_text == session.send("more").raw_text


def test_a_new_conversation_saves_the_state_of_the_old_one(engine, store):
    session = Session(engine, store=store, history="preserve", **SETTINGS)
    session.send("hello")
    first = number_of(session)
    session.reset()
    assert (session.conversation, describe_session(session).turns, session.title) == (None, (), "")
    session.send("another")
    assert session.conversation not in (None, first)
    assert Session.reopen(engine, store, first).ids != []


def test_an_erased_conversation_leaves_no_live_state_behind(engine, store):
    session = Session(engine, store=store, **SETTINGS)
    session.send("secret")
    assert session.save_state()
    store.delete(number_of(session))
    assert store.purge() == 1
    assert list(store.states_folder.iterdir()) == []


def test_no_state_is_kept_of_a_conversation_that_was_deleted(engine, store):
    session = Session(engine, store=store, **SETTINGS)
    session.send("secret")
    store.delete(number_of(session))
    assert not session.save_state()
    store.purge()
    assert not session.save_state()
    assert not store.states_folder.exists()


def test_a_disk_budget_that_is_too_small_saves_nothing(engine, store):
    session = Session(engine, store=store, disk_budget=100, **SETTINGS)
    session.send("hello")
    assert not session.save_state()


@pytest.mark.slow
@needs_qtiny
def test_a_long_conversation_that_was_closed_is_not_read_again(store):
    engine = Engine.load(QTINY)
    session = Session(engine, store=store, max_new_tokens=1, enable_thinking=False)
    session.send("The quick brown fox jumps over the lazy dog. " * 28)
    assert len(session.ids) >= 300
    session.close()
    assert read_again(engine, store, session) < 50
    for path in store.states_folder.iterdir():
        path.unlink()
    assert read_again(engine, store, session) >= 300


def read_again(engine: Engine, store: Store, session: Session) -> int:
    """How many tokens a reopened conversation reads for its next reply."""
    again = Session.reopen(engine, store, number_of(session), max_new_tokens=1, enable_thinking=False)
    return again.send("And?").prefilled_tokens


def test_while_a_reply_runs_nothing_moves(engine, store):
    session = Session(engine, store=store, **SETTINGS)
    session.send("hello")
    events = session.stream("more")
    next(events)
    for move in (session.undo, session.reset, session.save_state, lambda: session.fork(1)):
        with pytest.raises(UsageError, match="already replying"):
            move()
    with pytest.raises(UsageError, match="already replying"):
        session.history = "strip"
    assert list(events)
    with pytest.raises(UsageError, match="history is 'both'"):
        session.history = "both"  # pyright: ignore[reportAttributeAccessIssue]


def test_what_streams_is_stored_at_its_pace(engine, store, monkeypatch):
    monkeypatch.setattr(recorder, "SAVE_PERIOD_SECONDS", 0.02)
    say(monkeypatch, engine, "".join(map(chr, range(32, 127))))
    session = Session(engine, store=store, max_new_tokens=60, enable_thinking=False)
    lengths: list[int] = []
    for _ in session.stream("hello"):
        (found,) = store.conversations()
        lengths.append(len(store.branch(found.id)[-1].ids))
        time.sleep(0.004)
    assert len(set(lengths)) > 3
    assert lengths == sorted(lengths)


# --- which model wrote what ---


def test_each_reply_knows_its_model_and_the_conversation_the_last_one(engine, store, tmp_path):
    def models(session: Session) -> list[str]:
        return [turn.model_name for turn in describe_session(session).turns]

    session = Session(engine, store=store, **SETTINGS)
    session.send("one")
    write_checkpoint(tmp_path / "other")
    other = Engine.load(tmp_path / "other")
    session = Session.reopen(other, store, number_of(session), **SETTINGS)
    assert store.conversation(number_of(session)).model == engine.identity  # nothing was said yet
    session.send("two")
    assert models(session) == [engine.name, "other"]
    for _ in range(2):
        assert store.conversation(number_of(session)).model == other.identity
        assert store.model_names() == {number_of(session): sorted([engine.name, "other"])}
        session = Session.reopen(engine, store, number_of(session), **SETTINGS)
        assert models(session) == [engine.name, "other"]
    for _ in session.retry():
        pass
    assert models(session) == [engine.name, engine.name]
    assert store.conversation(number_of(session)).model == engine.identity


def test_another_models_saved_state_is_left_alone_without_a_word(engine, store, tmp_path):
    session = Session(engine, store=store, **SETTINGS)
    session.send("one")
    assert session.save_state()
    write_checkpoint(tmp_path / "other", seed=2)
    other = Engine.load(tmp_path / "other")
    events = list(Session.reopen(other, store, number_of(session), **SETTINGS).stream("two"))
    assert not [event for event in events if isinstance(event, Notice)]
    back = Session.reopen(engine, store, number_of(session), **SETTINGS)
    assert back.ids and back.ids == session.ids[: len(back.ids)]


def test_a_model_in_the_cache_is_called_by_its_name_there(tmp_path: Path):
    folder = tmp_path / "models--owner--tiny" / "snapshots" / ("0" * 40)
    write_checkpoint(folder)
    engine = Engine.load(folder)
    assert engine.name == engine.identity.name == "owner/tiny"


def test_a_conversation_of_results_alone_can_be_gone_on_with(engine, store):
    conversation = store.create(title="eval", model=replace(engine.identity, tokenizer_hash="", weights=""))
    store.add_result(conversation, 0, "eval", "perplexity 8", [])
    session = Session.reopen(engine, store, conversation, **SETTINGS)
    events = list(session.stream("one"))
    assert not [event for event in events if isinstance(event, Notice)]
    about = store.conversation(conversation)
    assert about.title == "eval" and about.model == engine.identity
    assert [node.role for node in store.branch(conversation)] == ["user", "assistant"]
    assert "perplexity 8" not in engine.tokenizer.decode_with_special(session.prompt_ids())
