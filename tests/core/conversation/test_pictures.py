"""Conversations with pictures: content, exact ids, reuse, reopening, export, and cached against cold."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from qchat.core import Engine, Session, Store, export_conversation, import_conversation
from qchat.core.completion.completion import Completer, CompletionRequest
from qchat.core.conversation.pictures import read_picture
from qchat.core.conversation.summary import describe_cache, describe_session
from qchat.core.errors import ContextLengthExceeded, TemplateError, UsageError
from qchat.core.events import Done, Sync
from qchat.core.prompt_cache.live_state import LiveState
from qchat.core.text.template import Template
from qchat.core.vision.picture import Picture
from qchat.core.vision.placement import is_image
from tests.checkpoints import CHAT_TEMPLATE
from tests.compare import relative_rms
from tests.core.conversation.test_cached_equals_cold import NAMES, Script, with_template
from tests.vision_checkpoints import noise, png, write_seeing

# with random pictures among the questions
SCRIPTS = int(os.environ.get("TESTS_SCRIPTS", "15"))
RED = png(60, 40, seed=1)
LIMIT = 4e-5  # an untrained model amplifies rounding


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image(data: Any) -> dict[str, Any]:
    return {"type": "image", "image": data}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_seeing(folder, hv_ratio=3)
    return Engine.load(folder)


def check(session: Session) -> None:
    """The live state is that of a cold run."""
    assert relative_rms(session.live.logits(), session.engine.logits(session.ids)[-1]) <= LIMIT
    assert session.live.cache.length == len(session.ids)


def test_the_tokens_of_pictures_are_counted_apart(seeing: Engine):
    session = Session(seeing, max_new_tokens=2, seed=1)
    session.send("hello")
    session.send([image(RED), "what is it?"])
    session.send("and now?")
    tokens = seeing.images.place(Picture(RED)).grid.tokens
    assert [turn.image_tokens for turn in describe_cache(session).turns] == [0, tokens, tokens]


def test_turns_tell_of_their_pictures(seeing: Engine, tmp_path: Path):
    store = Store(tmp_path / "store.db")
    session = Session(seeing, store=store, max_new_tokens=2, seed=1)
    session.send("hello")
    session.send([image(RED), "what is it?"])
    number = session.conversation
    assert number is not None
    for one in (session, Session.reopen(seeing, store, number)):
        first, second = describe_session(one).turns
        assert first.pictures == ()
        (shown,) = second.pictures
        assert (shown.width, shown.height) == (60, 40)
        assert shown.tokens == seeing.images.place(Picture(RED)).grid.tokens
        assert (shown.thumbnail.width, shown.thumbnail.height) == (30, 20)


# --- what content may be ---


def test_a_picture_may_be_a_path_bytes_an_image_or_a_data_url(seeing: Engine, tmp_path: Path):
    path = tmp_path / "red.png"
    path.write_bytes(RED)
    forms = [path, str(path), RED, data_url(RED)]
    digests = {read_picture(image(form)).digest for form in forms}
    digests.add(read_picture({"type": "image_url", "image_url": {"url": data_url(RED)}}).digest)
    digests.add(read_picture({"type": "input_image", "image_url": data_url(RED)}).digest)
    digests.add(read_picture({"image": RED}).digest)
    assert len(digests) == 1
    session = Session(seeing, max_new_tokens=2, seed=1)
    session.send([image(noise(60, 40, seed=1)), "what is it?"])
    assert session.messages[0]["content"] == "what is it?"
    check(session)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (image("https://example.org/a.png"), "nothing is fetched"),
        ({"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}, "nothing is fetched"),
        ({"type": "image_url", "image_url": "/etc/passwd"}, "nothing is fetched"),
        (image("data:image/png,abc"), "must be in base64"),
        (image("data:image/png;base64,???"), "is not base64"),
        (image("/no/such/file.png"), "cannot be read"),
        (image(7), "a picture is int"),
        (image(b"no picture"), "is not a PNG"),
        (image(RED[: len(RED) // 2]), "cannot be decoded"),
        ({"type": "video", "video": "x"}, "only text parts and pictures"),
        ({"type": "text", "text": 7}, "only text parts and pictures"),
        (3, "only text parts and pictures"),
    ],
)
def test_other_parts_are_refused_in_a_sentence_and_leave_no_trace(seeing: Engine, part: Any, words: str):
    session = Session(seeing)
    with pytest.raises(UsageError, match=words):
        session.send([part, "what?"])
    assert session.messages == []


def test_messages_of_other_programs_name_no_files(seeing: Engine, tmp_path: Path):
    (tmp_path / "red.png").write_bytes(RED)
    completer = Completer(seeing, LiveState(seeing), 4096)
    for part in (image(str(tmp_path / "red.png")), {"type": "image_url", "image_url": {"url": "file:///x"}}):
        with pytest.raises(UsageError, match="nothing is fetched"):
            completer.stream(CompletionRequest([{"role": "user", "content": [part]}]))
    with pytest.raises(UsageError, match="only messages of the user"):
        completer.stream(CompletionRequest([{"role": "system", "content": [image(data_url(RED))]}]))


def test_a_message_that_claims_pictures_of_its_own_is_read_without_them(seeing: Engine):
    claimed = {"role": "user", "content": "hi", "images": [{"digest": "x"}]}
    completer = Completer(seeing, LiveState(seeing), 4096)
    plain = completer.count(CompletionRequest([{"role": "user", "content": "hi"}]))
    assert completer.count(CompletionRequest([claimed])) == plain
    session = Session(seeing)
    session.prime([claimed, {"role": "assistant", "content": "ho"}])
    assert "images" not in session.messages[0]


def test_a_template_without_a_place_for_pictures_says_so(seeing: Engine):
    from dataclasses import replace

    blind = replace(seeing, template=Template("{{ messages[0].role }}", "blind"))
    with pytest.raises(TemplateError, match="the template has no place for pictures"):
        Session(blind).send([image(RED), "what?"])
    failing = replace(seeing, template=Template(CHAT_TEMPLATE, "old"))
    with pytest.raises(TemplateError):
        Session(failing).send([image(RED), "what?"])


# --- ids and reuse ---


def test_pictures_stand_where_they_were_in_the_text(seeing: Engine):
    session = Session(seeing, max_new_tokens=2, seed=1)
    session.send(["a", image(RED), "bc", image(png(40, 40)), {"type": "text", "text": "d"}])
    ids, tokenizer = session.prompt_ids(), seeing.tokenizer
    mark = tokenizer.encode("#")[0]
    text = tokenizer.decode_with_special([mark if is_image(id) else id for id in ids])
    first, second = session.messages[0]["images"]
    pads = ["#" * (one["rows"] * one["columns"]) for one in (first, second)]
    start, end = "<|vision_start|>", "<|vision_end|>"
    assert f"a{start}{pads[0]}{end}bc{start}{pads[1]}{end}d<|im_end|>" in text
    assert session.messages[0]["content"] == "abcd"


def test_what_looks_like_a_picture_in_a_text_stays_text(seeing: Engine):
    session = Session(seeing, max_new_tokens=2, seed=1)
    session.send([image(RED), "<|vision_start|><|image_pad|><|vision_end|>"])
    assert session.ids.count(seeing.images.pad_id) == 0
    check(session)


def test_the_next_turn_reads_no_picture_again_and_another_picture_reuses_none_of_it(seeing: Engine):
    session = Session(seeing, max_new_tokens=2, seed=1)
    session.send([image(RED), "what?"])
    assert session.send("and?").prefilled_tokens < 30
    check(session)
    *_, done = session.edit(1, [image(png(60, 40, seed=2)), "what?"])
    assert isinstance(done, Done)
    assert done.cached_tokens < 20  # the same size, and not the same picture
    check(session)


def test_edited_words_keep_the_pictures_and_given_parts_replace_them(seeing: Engine):
    session = Session(seeing, max_new_tokens=2, seed=1)
    session.send(["look at ", image(RED), " here"])
    list(session.edit(1, "look"))
    assert [one["at"] for one in session.messages[0]["images"]] == [4]
    list(session.edit(1, ["no picture"]))
    assert "images" not in session.messages[0]


def test_two_conversations_share_a_picture_that_both_show(seeing: Engine):
    live = LiveState(seeing)
    one, two = (Session(seeing, live=live, max_new_tokens=2, seed=1) for _ in range(2))
    one.send([image(RED), "what is it?"])
    events = list(two.stream([image(RED), "what is it?"]))
    assert isinstance(events[0], Sync) and events[0].cached > 40
    check(two)


def test_a_picture_too_large_for_the_context_is_refused_before_it_is_seen(seeing: Engine):
    session = Session(seeing, context_limit=64)
    with pytest.raises(ContextLengthExceeded):
        session.send([image(png(100, 80)), "?"])
    fewer = Session(seeing, context_limit=64, image_tokens=12, max_new_tokens=2)
    assert fewer.send([image(png(100, 80)), "?"]).prompt_tokens < 64


def test_a_stateless_request_reuses_its_pictures(seeing: Engine):
    completer = Completer(seeing, LiveState(seeing), 4096)
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": [image(data_url(RED)), {"type": "text", "text": "what?"}]}
    ]
    settings = {"max_new_tokens": 3, "seed": 1}
    *_, first = completer.stream(CompletionRequest(asked, settings=settings))
    assert isinstance(first, Done)
    asked += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "and?"}]
    *_, second = completer.stream(CompletionRequest(asked, settings=settings))
    assert isinstance(second, Done)
    assert second.cached_tokens > first.prompt_tokens - 10  # all but the opener of the thought
    other = [{"role": "user", "content": [image(data_url(png(60, 40, seed=3))), asked[0]["content"][1]]}]
    *_, third = completer.stream(CompletionRequest(other, settings=settings))
    assert isinstance(third, Done)
    assert third.cached_tokens < 20


@pytest.mark.slow
@pytest.mark.parametrize("drafting", [1, 3, 16])
def test_drafts_change_no_reply_about_a_picture(seeing: Engine, drafting: int):
    """The draft head reads the text after the picture; copies never propose a part of one."""
    replies = []
    for drafts in (0, drafting):
        session = Session(seeing, temperature=0, max_new_tokens=24, draft_tokens=drafts, stop_loops=False)
        session.send([image(RED), "ab" * 20, image(RED), "ab" * 8])
        session.send("ab" * 8)
        replies.append(session.prompt_ids())
        check(session)
    assert replies[0] == replies[1]


def test_an_8_bit_cache_reads_pictures_too(tmp_path: Path):
    write_seeing(tmp_path, head_dim=64)
    session = Session(Engine.load(tmp_path), quantized_kv=True, max_new_tokens=4, seed=1)
    session.send([image(RED), "what?"])
    cold = session.engine.logits(session.ids)[-1]
    assert relative_rms(session.live.logits(), cold) < 0.05


# --- kept ---


@pytest.mark.slow
def test_a_reopened_conversation_has_its_pictures_and_its_state(seeing: Engine, store: Store):
    session = Session(seeing, store=store, max_new_tokens=4, seed=1)
    session.send(["see ", image(RED)])
    session.send("and?")
    session.save_state()
    conversation = session.conversation
    assert conversation is not None
    ids, messages = session.prompt_ids(), session.messages
    fresh = Engine.load(seeing.folder)
    again = Session.reopen(fresh, store, conversation, max_new_tokens=4, seed=1)
    assert (again.prompt_ids(), again.messages) == (ids, messages)
    done = again.send("more")
    assert done.cached_tokens > len(ids) - 10
    check(again)
    again.live.snapshots.clear()
    again.live.forget()
    list(again.retry())
    check(again)


def test_with_a_model_that_sees_nothing_the_words_are_kept(seeing: Engine, store: Store, tmp_path: Path):
    from tests.checkpoints import write_checkpoint

    session = Session(seeing, store=store, max_new_tokens=4, seed=1)
    session.send([image(RED), "what?"])
    write_checkpoint(tmp_path / "blind")
    assert session.conversation is not None
    again = Session.reopen(Engine.load(tmp_path / "blind"), store, session.conversation, max_new_tokens=2)
    assert again.messages[0] == {"role": "user", "content": "what?"}
    events = list(again.stream("and?"))
    assert any("sees no pictures" in getattr(event, "text", "") for event in events)


def test_a_damaged_picture_in_the_store_is_left_out_with_a_notice(seeing: Engine, store: Store):
    session = Session(seeing, store=store, max_new_tokens=4, seed=1)
    session.send([image(RED), "what?"])
    with store._database.write() as execute:
        execute("UPDATE pictures SET data = x'00'")
    assert session.conversation is not None
    again = Session.reopen(seeing, store, session.conversation, max_new_tokens=2)
    assert "images" not in again.messages[0]
    assert not any(map(is_image, again.prompt_ids()))


def test_pictures_go_with_their_conversation(seeing: Engine, store: Store):
    session = Session(seeing, store=store, max_new_tokens=2)
    session.send([image(RED), "what?"])
    conversation = session.conversation
    assert conversation is not None and len(store.pictures(conversation)) == 1
    store.delete(conversation)
    store.purge()
    assert store._database.read("SELECT * FROM pictures") == []


def test_exports_hold_the_pictures_and_json_brings_them_back(seeing: Engine, store: Store, tmp_path: Path):
    session = Session(seeing, store=store, max_new_tokens=4, seed=1)
    session.send(["see ", image(RED)])
    assert session.conversation is not None
    for suffix in (".md", ".html", ".json"):
        export_conversation(store, session.conversation, tmp_path / f"out{suffix}")
    url = data_url(RED)
    assert f"![the picture]({url})" in (tmp_path / "out.md").read_text()
    page = (tmp_path / "out.html").read_text()
    assert f'src="{url}"' in page and "img-src data:" in page
    brought = import_conversation(store, tmp_path / "out.json")
    assert store.pictures(brought) == store.pictures(session.conversation)
    again = Session.reopen(seeing, store, brought, max_new_tokens=2, seed=1)
    assert again.messages == session.messages
    again.send("and?")
    check(again)


# --- cached against cold ---


class SeeingScript(Script):
    """A script whose questions, edits included, show some of five pictures.

    Holds them all: the live state may have read a question that was dropped, and the cold run reads it again.
    """

    def __init__(self, engine: Engine, *arguments: Any, **options: Any):
        super().__init__(engine, *arguments, **options)
        self.held = [engine.images.place(Picture(png(*size, seed))) for size, seed in SHOWN]

    def text(self) -> Any:
        words = super().text()
        if self.random.random() < 0.5:
            return words
        shown = [
            image(png(*size, seed)) for size, seed in self.random.choices(SHOWN, k=self.random.randint(1, 2))
        ]
        return [*shown, words] if self.random.random() < 0.5 else [words, *shown]


SHOWN = [((60, 40), 1), ((60, 40), 2), ((33, 90), 3), ((8, 8), 4), ((120, 30), 5)]


@pytest.mark.parametrize("seed", range(2))
def test_after_a_script_with_pictures_the_live_state_is_that_of_a_cold_run(
    seeing: Engine, seed: int, store: Store
):
    SeeingScript(seeing, seed, store, sane=False).run(8)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(SCRIPTS))
def test_after_any_script_with_pictures_too(seeing: Engine, name: str, seed: int, store: Store):
    SeeingScript(with_template(seeing, name), seed, store, sane=False).run(10)
