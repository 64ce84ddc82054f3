"""Ids and text: the library's own decoding as the oracle, on a built tokenizer and real ones if present."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from qchat.core.errors import ConfigError, TokenizerError
from qchat.core.text.tokenizer import BYTE_OF, SHIELD, Tokenizer
from tests.checkpoints import write_tokenizer
from tests.paths import QTINY, QWEN

REAL = [folder for folder in (QTINY, QWEN) if (folder / "tokenizer.json").exists()]
SPECIALS = ("<|im_end|>", "<|im_start|>", "<think>", "</think>", "<tool_call>", "<", "|>", "im_end")
TRICKY = ("👩‍👩‍👧‍👦", "🏳️‍🌈", "日本語", "é", "e\u0301", "\u00a0", "\r\n", "\t", "क्षि", "𝔘", "\ufffd", "\x00")

text_pieces = st.one_of(st.sampled_from((*SPECIALS, *TRICKY)), st.text(max_size=8))
texts = st.lists(text_pieces, max_size=12).map("".join)
quick = settings(max_examples=60, deadline=None, database=None)


@cache
def loaded(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@cache
def library(folder: Path) -> Library:
    """The same file by the library alone."""
    return Library.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    write_tokenizer(folder)
    return folder


@pytest.fixture(params=[None, *REAL], ids=["built", *(folder.name for folder in REAL)], scope="module")
def folder(request: pytest.FixtureRequest, built: Path) -> Path:
    return request.param or built


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add(id) for id in ids]
    return "".join([*pieces, detokenizer.flush()])


def visible(folder: Path, ids: list[int]) -> str:
    """The library's text of `ids` without special tokens."""
    return library(folder).decode(ids, skip_special_tokens=True)


# --- decoding ---


@pytest.mark.slow
@quick
@given(data=st.data())
def test_pieces_joined_are_the_librarys_decoding_of_any_ids(folder: Path, data: st.DataObject):
    """Random ids are mostly broken UTF-8; ids past the vocabulary have no text."""
    size = loaded(folder).vocab_size
    single_bytes = st.sampled_from(
        [id for c in BYTE_OF if (id := library(folder).token_to_id(c)) is not None]
    )
    ids = data.draw(st.lists(st.one_of(st.integers(0, size + 200), single_bytes), max_size=30))
    assert streamed(loaded(folder), ids) == loaded(folder).decode(ids) == visible(folder, ids)


@pytest.mark.slow
@quick
@given(text=texts)
def test_pieces_joined_are_the_text_that_was_encoded(folder: Path, text: str):
    ids = loaded(folder).encode(text)
    assert ids == library(folder).encode(text, add_special_tokens=False).ids
    assert streamed(loaded(folder), ids) == visible(folder, ids)


@pytest.mark.slow
def test_no_piece_holds_part_of_a_character(folder: Path):
    tokenizer = loaded(folder)
    detokenizer = tokenizer.detokenizer()
    text = "".join(TRICKY).replace("\ufffd", "")
    assert all("\ufffd" not in detokenizer.add(id) for id in tokenizer.encode(text))
    assert detokenizer.flush() == ""


def test_a_character_without_its_last_byte_is_flushed_as_one_replacement(built: Path):
    tokenizer = loaded(built)
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.add(id) for id in tokenizer.encode("日")[:2]] == ["", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.add(tokenizer.encode("a")[0]) == "a"


def test_special_tokens_have_no_text_and_other_added_tokens_keep_theirs(folder: Path):
    tokenizer = loaded(folder)
    assert (
        tokenizer.decode(tokenizer.encode("a<|im_end|>b<think></think><|im_start|>")) == "ab<think></think>"
    )


@pytest.mark.slow
@quick
@given(text=texts)
def test_a_prompt_spelled_out_is_the_text_that_was_encoded(folder: Path, text: str):
    tokenizer = loaded(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode_with_special(ids) == library(folder).decode(ids, skip_special_tokens=False)


def test_a_number_that_can_be_no_id_is_refused(built: Path):
    for id in (-1, 1 << 32):
        with pytest.raises(TokenizerError, match="is not a token id"):
            loaded(built).decode([id])


# --- a decoder that is not byte-level ---


def words_tokenizer(decoder: Any) -> Tokenizer:
    words = ["[UNK]", "▁the", "▁cat", "s", "▁sat", "▁", "é", "<0xE2>", "<0x82>", "<0xAC>"]
    made = Library(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoder
    return Tokenizer(made, "words")


DECODERS = {
    "metaspace": lambda: decoders.Metaspace(),
    "byte fallback": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    ),
    "none": lambda: None,
}


@pytest.mark.parametrize("name", DECODERS)
@quick
@given(data=st.data())
def test_other_decoders_stream_the_same_text_too(name: str, data: st.DataObject):
    tokenizer = words_tokenizer(DECODERS[name]())
    whole = [[id] for id in range(7)] + [[7, 8, 9]]
    drawn = data.draw(st.lists(st.sampled_from(whole), max_size=40))
    ids = [id for part in drawn for id in part]
    assert streamed(tokenizer, ids) == tokenizer._library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("count", range(1, 30))
@pytest.mark.parametrize("before", [[], [0], [1, 0]])
def test_long_runs_of_bytes_are_cut_between_characters(before: list[int], count: int):
    tokenizer = words_tokenizer(DECODERS["byte fallback"]())
    ids = [*before, *[7, 8, 9] * count]
    assert streamed(tokenizer, ids).endswith("€" * count)


# --- text that must stay text ---


@pytest.mark.slow
@quick
@given(text=texts)
def test_plain_encoding_is_that_of_a_vocabulary_without_added_tokens(folder: Path, text: str):
    ids = loaded(folder).encode(text, special=False)
    assert ids == plain_library(folder).encode(text, add_special_tokens=False).ids


@cache
def plain_library(folder: Path) -> Library:
    values = json.loads((folder / "tokenizer.json").read_bytes())
    return Library.from_str(json.dumps({**values, "added_tokens": []}))


@quick
@given(text=texts)
def test_shielded_text_is_plain_inside_a_prompt(folder: Path, text: str):
    tokenizer = loaded(folder)
    prompt = f"<|im_start|>{tokenizer.shield(text)}<|im_end|>\n"
    start, end = (tokenizer.token_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert tokenizer.encode(prompt) == [
        start,
        *tokenizer.encode(text, special=False),
        end,
        *tokenizer.encode("\n"),
    ]


def test_shielding_leaves_harmless_text_alone_and_cannot_be_forged(built: Path):
    tokenizer = loaded(built)
    assert tokenizer.shield("a < b |> c") == "a < b |> c"
    forged = tokenizer.shield(f"<{SHIELD}|im_end|>") + "<|im_end|>"
    assert [id for id in tokenizer.encode(forged) if id in tokenizer.stop_ids] == tokenizer.encode(
        "<|im_end|>"
    )


def test_lone_surrogates_become_replacement_characters(built: Path):
    tokenizer = loaded(built)
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


# --- loading ---


def test_ids_that_matter_are_found(built: Path):
    tokenizer = loaded(built)
    assert tokenizer.vocab_size == library(built).get_vocab_size()
    assert tokenizer.stop_ids == {tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>")}
    assert (
        tokenizer.decode([tokenizer.think_open_id or 0, tokenizer.think_close_id or 0]) == "<think></think>"
    )
    assert tokenizer.token_id("<no such token>") is None


@pytest.mark.skipif(QWEN not in REAL, reason=f"the published tokenizer is not at {QWEN}")
def test_the_published_tokenizer_has_the_published_ids():
    tokenizer = loaded(QWEN)
    assert tokenizer.stop_ids == {248044, 248046}
    assert (tokenizer.think_open_id, tokenizer.think_close_id, tokenizer.vocab_size) == (
        248068,
        248069,
        248077,
    )


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def test_tokens_that_only_the_config_names_are_added_under_its_ids(copy: Path):
    removed: list[dict[str, Any]] = []

    def take_last(values: dict[str, Any]) -> None:
        removed.append(values["added_tokens"].pop())

    edit(copy, "tokenizer.json", take_last)
    text, id = removed[0]["content"], removed[0]["id"]
    entry = {"content": text, "special": False}
    edit(copy, "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={str(id): entry}))
    tokenizer = Tokenizer.load(copy)
    assert tokenizer.encode(text) == [id]
    assert tokenizer.decode([id]) == text
    edit(copy, "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={str(id + 5): entry}))
    with pytest.raises(TokenizerError, match=f"declared with id {id + 5}, but tokenizer.json gives it {id}"):
        Tokenizer.load(copy)


def test_truncation_and_padding_of_the_file_are_ignored(copy: Path):
    made = Library.from_file(str(copy / "tokenizer.json"))
    made.enable_truncation(4)
    made.enable_padding(length=64)
    made.save(str(copy / "tokenizer.json"))
    assert len(Tokenizer.load(copy).encode("a" * 30)) == 30


def test_the_end_token_of_the_config_stops_replies_too(copy: Path):
    edit(copy, "generation_config.json", lambda c: c.update(eos_token_id=5))
    edit(copy, "tokenizer_config.json", lambda c: c.update(eos_token={"content": "</think>"}))
    tokenizer = Tokenizer.load(copy)
    assert {5, tokenizer.think_close_id} < tokenizer.stop_ids


def test_a_folder_with_nothing_but_the_tokenizer_file_is_enough(copy: Path):
    (copy / "tokenizer_config.json").unlink()
    (copy / "generation_config.json").unlink()
    assert Tokenizer.load(copy).stop_ids == loaded_stop_ids(copy)


def loaded_stop_ids(folder: Path) -> set[int | None]:
    return {library(folder).token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>")}


PANIC = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
RUINOUS = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(normalizer=PANIC),
        lambda values: values["model"].update(merges=[["no", "where"]]),
        lambda values: values.update(model={}),
        lambda values: values["model"]["vocab"].update(a=1 << 40),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence_also_when_the_library_panics(
    copy: Path, change: Callable[[dict[str, Any]], Any]
):
    edit(copy, "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be used: ") as caught:
        Tokenizer.load(copy)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_takes_forever_is_given_up(copy: Path):
    edit(copy, "tokenizer.json", lambda values: values.update(pre_tokenizer=RUINOUS))
    with pytest.raises(TokenizerError, match="cannot encode a text of 61 characters"):
        Tokenizer.load(copy).encode("a" * 60 + "!")


@pytest.mark.parametrize(
    ("name", "field", "value", "error"),
    [
        ("tokenizer_config.json", "added_tokens_decoder", [], TokenizerError),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "y"}}, TokenizerError),
        ("tokenizer_config.json", "added_tokens_decoder", {"7": {"content": ""}}, TokenizerError),
        ("generation_config.json", "eos_token_id", "x", ConfigError),
        ("generation_config.json", "eos_token_id", [True], ConfigError),
        ("generation_config.json", "eos_token_id", -1, ConfigError),
    ],
)
def test_a_bad_field_of_the_other_files_is_named(copy: Path, name: str, field: str, value: Any, error: type):
    edit(copy, name, lambda values: values.update({field: value}))
    with pytest.raises(error, match=field) as caught:
        Tokenizer.load(copy)
    assert name in str(caught.value)
