"""The split of a reply into thought and answer, as it streams and of a whole reply."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.text.reply_parser import ReplyParser, ThinkSplitter, leaves_thought_open
from qchat.core.text.tokenizer import Tokenizer
from tests.checkpoints import write_tokenizer


def byte_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return Tokenizer.load(Path(folder))


BYTES = byte_tokenizer()
OPEN, CLOSE = BYTES.encode("<think></think>")


def parsed(ids: list[int], inside: bool) -> tuple[str, str, ReplyParser]:
    """The joined thought and the joined answer."""
    parser = ReplyParser(BYTES, inside)
    pieces = [piece for id in ids for piece in parser.add(id)] + parser.flush()
    assert all(text for _, text in pieces)
    thought, text = (
        "".join(text for kind, text in pieces if kind == wanted) for wanted in ("thought", "text")
    )
    return thought, text, parser


@pytest.mark.parametrize(
    ("reply", "inside", "thought", "text"),
    [
        ("a thought\n</think>\n\nan answer\n", True, "a thought", "an answer\n"),
        ("<think>\na\n\nthought\n</think>\n\nan answer", False, "a\n\nthought", "an answer"),
        ("an answer", False, "", "an answer"),
        ("</think>\n\nan answer", True, "", "an answer"),
        ("no end\n", True, "no end", ""),
        ("a</think>b</think>", True, "a", "b</think>"),
        ("a<think>b</think>\n\nc", True, "a<think>b", "c"),
        ("a</think>\n\nb\n<think>\nc\n</think>\nd", True, "a\n\nc", "b\n\nd"),
        ("ä</think>\n\n日本", True, "ä", "日本"),
        ("a<|im_end|>", False, "", "a"),
    ],
)
def test_a_reply_is_split_into_thought_and_answer(reply: str, inside: bool, thought: str, text: str):
    ids = BYTES.encode(reply)
    assert parsed(ids, inside)[:2] == (thought, text)


def split_at_once(ids: list[int], inside: bool) -> tuple[str, str, int]:
    """Thought, answer and reasoning ids of a whole reply: the blocks are cut out, decoded and trimmed."""
    blocks: list[tuple[bool, list[int]]] = [(inside, [])]
    for id in ids:
        now = blocks[-1][0]
        if id == (CLOSE if now else OPEN):
            blocks.append((not now, []))
        else:
            blocks[-1][1].append(id)
    decoded = [(kind, BYTES.decode(block)) for kind, block in blocks]
    thoughts = [text.strip("\n") for kind, text in decoded if kind]
    answer = "".join(text for kind, text in decoded if not kind).lstrip("\n")
    count = sum(len(block) for kind, block in blocks if kind)
    return "\n\n".join(text for text in thoughts if text), answer, count


PIECES = st.sampled_from([OPEN, CLOSE, *BYTES.encode("<|im_end|>\n\naé😀"), 255])


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(PIECES, max_size=40), st.booleans())
def test_pieces_joined_are_the_split_of_the_whole(ids: list[int], inside: bool):
    thought, text, parser = parsed(ids, inside)
    assert (thought, text, parser.reasoning_tokens) == split_at_once(ids, inside)


@pytest.mark.parametrize(
    ("ids", "inside"),
    [([], False), ([1, OPEN], True), ([OPEN, 1, CLOSE, 1], False), ([CLOSE, OPEN, 1], True)],
)
def test_a_prompt_leaves_a_thought_open_if_its_last_mark_opens_one(ids: list[int], inside: bool):
    assert leaves_thought_open(ids, BYTES) is inside


def test_the_splitter_names_delimiters_and_knows_where_it_is():
    splitter = ThinkSplitter(OPEN, CLOSE, inside=True)
    assert [splitter.add(id) for id in (1, OPEN, CLOSE, 2, CLOSE, OPEN, 3)] == [
        "thought",
        "thought",
        None,
        "text",
        "text",
        None,
        "thought",
    ]
    assert splitter.inside


def test_a_tokenizer_without_think_tokens_gives_only_answers():
    splitter = ThinkSplitter(None, None, inside=False)
    assert {splitter.add(id) for id in range(300)} == {"text"}
