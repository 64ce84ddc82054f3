"""Rules of a tokenizer.json that could run without end or eat all memory are held to a budget."""

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from qchat.core import BUILT_IN_MODEL
from qchat.core.engine.engine import Engine
from qchat.core.errors import ModelError, TokenizerError
from qchat.core.text import limited_process
from qchat.core.text.tokenizer import Tokenizer
from qchat.core.text.tokenizer_rules import ForeignRules, process, read_rules
from tests.checkpoints import write_checkpoint
from tests.paths import QWEN

SECONDS = 10.0
PEAK_NBYTES = 1_500_000_000
WORDS = "The quick brown fox  jumps\n\nover 12345 lazy dogs, and émigrés 日本語. <think>x</think>\t\n "
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LONG_WORDS = ("a" * 22 + "! ") * 2000  # each of them takes less than the library's own limit


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(name: str, rules: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: rules}


def template(count: int) -> dict[str, Any]:
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}] * count
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {}}


RUINOUS: dict[str, dict[str, Any]] = {
    "a pattern that tries again and again": {"pre_tokenizer": split("(a+)+$")},
    "one in a sequence": {"pre_tokenizer": sequence("pretokenizers", [split("x"), split("(a|a)*$")])},
    "one of a normalizer": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    },
    "a text doubled 40 times": {"normalizer": sequence("normalizers", [DOUBLE] * 40)},
    "a letter replaced by a megabyte": {
        "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 1_000_000}
    },
    "a text prepended": {
        "normalizer": sequence("normalizers", [{"type": "Prepend", "prepend": "a" * 10_000}] * 1000)
    },
    "ids repeated": {"post_processor": template(100_000)},
}  # fmt: skip
REFUSED_AT_ONCE: dict[str, dict[str, Any]] = {
    "a pattern of a megabyte": {"pre_tokenizer": split(r"\p{L}" * 200_000)},
    "a pattern nested without end": {"pre_tokenizer": split("(" * 50_000 + "a" + ")" * 50_000)},
    "very many added tokens": {
        "added_tokens": [
            {"id": 300 + i, "content": f"<{i}>", "special": i % 2 == 0, "single_word": False}
            | {"lstrip": False, "rstrip": False, "normalized": False}
            for i in range(100_000)
        ]
    },
    "an added token of a megabyte": {
        "added_tokens": [
            {"id": 300, "content": "x" * 1_000_000, "special": False, "single_word": False}
            | {"lstrip": False, "rstrip": False, "normalized": False}
        ]
    },
}


@pytest.fixture(autouse=True)
def hasty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow a second and half a gigabyte, except in slow tests."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(limited_process, "BASE_NBYTES", 256 << 20)
        monkeypatch.setattr(limited_process, "BASE_SECONDS", 0.5)


def write(folder: Path, **parts: Any) -> Path:
    write_checkpoint(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


def processor_seconds() -> float:
    process.close()  # so that its seconds count
    return sum(os.times()[:4])


@pytest.mark.slow
def test_the_real_budget_ends_in_time(tmp_path: Path):
    test_ruinous_rules_end_in_a_sentence(tmp_path, "a pattern that tries again and again")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUINOUS)
def test_ruinous_rules_end_in_a_sentence(tmp_path: Path, name: str):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    folder = write(tmp_path, **RUINOUS[name])
    started = processor_seconds()
    with pytest.raises(TokenizerError, match=r"more time or memory|cannot encode") as caught:
        Tokenizer.load(folder).encode(LONG_WORDS)
    assert str(caught.value).isprintable() and str(folder) in str(caught.value)
    assert processor_seconds() - started < SECONDS
    unit = 1024 if os.uname().sysname == "Linux" else 1
    # the peak of all children so far, of which others may have been larger
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert after * unit < PEAK_NBYTES or after == before


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_rules_larger_than_any_tokenizer_needs_are_refused_when_loaded(tmp_path: Path, name: str):
    folder = write(tmp_path, **REFUSED_AT_ONCE[name])
    started = processor_seconds()
    with pytest.raises(ModelError) as caught:
        Engine.load(folder)
    assert str(caught.value).isprintable() and 20 < len(str(caught.value)) < 800
    assert processor_seconds() - started < SECONDS


@pytest.mark.slow
def test_a_conversation_goes_on_after_a_text_that_exceeded_the_budget(tmp_path: Path):
    tokenizer = Tokenizer.load(write(tmp_path, pre_tokenizer=split("(b+)+$")))
    with pytest.raises(TokenizerError):
        tokenizer.encode(LONG_WORDS.replace("a", "b"))
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"


def test_the_tokenizers_of_the_family_run_in_this_process():
    for folder in (BUILT_IN_MODEL, QWEN):
        if folder.exists():
            rules = read_rules((folder / "tokenizer.json").read_bytes(), "tokenizer.json")
            assert rules.encodes_in_bounds and rules.decodes_in_bounds
            assert Tokenizer.load(folder)._foreign is None


def unusual(kind: str) -> Library:
    """A tokenizer with rules that are judged foreign."""
    letters = sorted({*WORDS, "▁", *pre_tokenizers.ByteLevel.alphabet()})
    library = Library(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="x"))
    if kind == "pattern":
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\w+|\W+"), "isolated"),
                pre_tokenizers.ByteLevel(use_regex=False),
            ]
        )
        library.decoder = decoders.ByteLevel()
    elif kind == "decoder":
        library.normalizer = normalizers.Replace(" ", "▁")
        library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    else:
        library = Library(
            models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="The")
        )
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_tokens(["<think>", "</think>"])
    return library


@pytest.mark.parametrize("kind", ["pattern", "decoder", "words"])
def test_foreign_rules_give_the_ids_and_the_text_that_the_library_gives(tmp_path: Path, kind: str):
    library = unusual(kind)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer._foreign is not None
    ids = library.encode(WORDS, add_special_tokens=False).ids
    assert tokenizer.encode(WORDS) == ids
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)
    library.encode_special_tokens = True
    if kind != "words":  # there its added tokens are words
        assert tokenizer.think_open_id not in tokenizer.encode(WORDS, special=False)
    assert tokenizer.vocab_size == library.get_vocab_size()


def test_a_file_that_has_changed_is_read_again(tmp_path: Path):
    path = write(tmp_path, pre_tokenizer=split("(a+)+$")) / "tokenizer.json"
    rules = ForeignRules(path)
    before = rules.encode("b")
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["b"], vocabulary["c"] = vocabulary["c"], vocabulary["b"]
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() + 5, time.time() + 5))
    assert rules.encode("c") == before
