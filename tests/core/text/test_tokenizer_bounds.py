"""What a tokenizer's files and a pasted text may cost: declared tokens, values, panics, characters."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qchat.core import BUILT_IN_MODEL
from qchat.core.conversation.session import load_session
from qchat.core.errors import ContextLengthExceeded, TokenizerError
from qchat.core.text.tokenizer import COUNTED_CHARACTERS, Tokenizer
from qchat.core.text.tokenizer_rules import MAX_ADDED_TOKENS
from tests.checkpoints import write_checkpoint
from tests.paths import ROOT


def declare(folder: Path, count: int, special: bool) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    first = Tokenizer.load(folder).vocab_size
    config["added_tokens_decoder"] = {
        str(first + i): {"content": f"<|extra_{i}|>", "special": special or i % 2 == 1} for i in range(count)
    }
    path.write_text(json.dumps(config))


@pytest.mark.slow
def test_very_many_declared_tokens_are_refused_at_once(tmp_path: Path):
    write_checkpoint(tmp_path)
    declare(tmp_path, 200_000, special=True)
    started = time.process_time()
    with pytest.raises(TokenizerError, match=r"added_tokens_decoder has 200,000 entries"):
        Tokenizer.load(tmp_path)
    assert time.process_time() - started < 3


def test_many_declared_tokens_are_added_in_linear_time(tmp_path: Path):
    write_checkpoint(tmp_path)
    declare(tmp_path, MAX_ADDED_TOKENS - 20, special=False)
    started = time.process_time()
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a<|extra_7|>")[-1] == tokenizer.token_id("<|extra_7|>")
    assert "<|extra_7|>" not in tokenizer.decode([tokenizer.token_id("<|extra_7|>") or 0])
    assert tokenizer.decode([tokenizer.token_id("<|extra_6|>") or 0]) == "<|extra_6|>"
    assert tokenizer.shield("say <|extra_7|> " * 100).count("\ufdd0") == 100
    assert time.process_time() - started < 5


def test_a_tokenizer_of_very_many_values_is_refused_before_it_is_parsed(tmp_path: Path):
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a": [' + "0," * 5_000_000 + "0]}")
    with pytest.raises(TokenizerError, match="holds more than 4,000,000 values"):
        Tokenizer.load(tmp_path)


def test_a_byte_order_mark_is_skipped(tmp_path: Path):
    write_checkpoint(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert Tokenizer.load(tmp_path).encode("a")


def test_a_panic_of_the_library_writes_nothing_to_the_terminal(tmp_path: Path):
    write_checkpoint(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps(content))
    script = (
        "import sys\nfrom pathlib import Path\nfrom qchat.core.errors import TokenizerError\n"
        "from qchat.core.text.tokenizer import Tokenizer\n"
        "try:\n    Tokenizer.load(Path(sys.argv[1]))\nexcept TokenizerError:\n    print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / ".dev")},
        check=True,
    )
    assert (done.stdout, done.stderr) == ("refused\n", "")


@pytest.mark.slow
def test_a_text_longer_than_any_context_is_refused_after_a_part_of_it(monkeypatch: pytest.MonkeyPatch):
    session = load_session(BUILT_IN_MODEL)
    longest = 0
    encode = Tokenizer.encode

    def measured(self: Tokenizer, text: str, *, special: bool = True) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(self, text, special=special)

    monkeypatch.setattr(Tokenizer, "encode", measured)
    with pytest.raises(ContextLengthExceeded):
        session.send("a word " * 3_000_000, enable_thinking=False)
    assert longest == COUNTED_CHARACTERS


@pytest.mark.slow
def test_a_lower_bound_is_never_above_the_number_of_ids():
    tokenizer = Tokenizer.load(BUILT_IN_MODEL)
    text = "The quick brown fox, 日本語 and émigrés.\n" * 40_000
    exact = len(tokenizer.encode(text, special=False))
    assert 0.99 * exact < tokenizer.count_at_least(text, 1 << 40) <= exact
