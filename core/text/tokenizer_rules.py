"""Judges the rules of a tokenizer.json by what they may cost.

Rules known to take time and memory in proportion to the text may run in this process. All others, such as
unknown regular expressions, run in one with a budget. Refuses more added tokens, or longer ones, than any
tokenizer has. Skips vocabulary and merges.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..errors import TokenizerError
from ..quoting import printable
from .limited_process import LimitedProcess

T = TypeVar("T")
MAX_ADDED_TOKENS = 8192  # shielding a message looks for all of them
MAX_ADDED_CHARACTERS = 1000  # of one added token
MAX_AFFIX = 16  # characters added to each piece of a word
MAX_STEPS = 8  # of a sequence of rules
MAX_DELIMITER = 1000
# regular expressions in which no text makes the library try again and again
PATTERNS = frozenset(
    (
        # Qwen3.5
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen2 and Qwen3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    )
)
STEPS = ("normalizers", "pretokenizers", "processors", "decoders")
NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip"))
PRE_TOKENIZERS = frozenset(
    (
        "ByteLevel",
        "Whitespace",
        "WhitespaceSplit",
        "Punctuation",
        "Digits",
        "UnicodeScripts",
    )
)
POST_PROCESSORS = frozenset(("ByteLevel", "BertProcessing", "RobertaProcessing"))
DECODERS = frozenset(("ByteLevel", "ByteFallback", "Fuse", "Strip", "BPEDecoder"))

process = LimitedProcess(
    Path(__file__).with_name("foreign_tokenizer.py"),
    "reads tokenizers",
    exceeded=": stopped, its rules take more time or memory than a text of this size needs",
    factor=2,
)


class Model(msgspec.Struct):
    """The fields of a tokenizer's model that say what a text costs."""

    type: Any = None
    continuing_subword_prefix: Any = None
    end_of_word_suffix: Any = None


class Rules(msgspec.Struct):
    """A tokenizer.json without its vocabulary."""

    added_tokens: Any = None
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None
    model: Model | None = None

    @property
    def encodes_in_bounds(self) -> bool:
        return (
            _all_known(self.normalizer, NORMALIZERS)
            and _all_known(self.pre_tokenizer, PRE_TOKENIZERS)
            and _all_known(self.post_processor, POST_PROCESSORS)
            and self.model is not None
            and self.model.type == "BPE"
            and _is_short(self.model.continuing_subword_prefix)
            and _is_short(self.model.end_of_word_suffix)
        )

    @property
    def decodes_in_bounds(self) -> bool:
        return _all_known(self.decoder, DECODERS)


class Vocabulary(msgspec.Struct):
    """The parts of a tokenizer.json that are no rules, as they are written, and the decoder."""

    version: msgspec.Raw = msgspec.Raw(b'"1.0"')
    added_tokens: msgspec.Raw = msgspec.Raw(b"[]")
    decoder: msgspec.Raw = msgspec.Raw(b"null")
    model: msgspec.Raw = msgspec.Raw(b"null")


class ForeignRules:
    """The rules of the tokenizer.json at `path`, applied in a process with a budget."""

    def __init__(self, path: Path):
        """Try to load the file. Raises TokenizerError for one that is damaged or exceeds the budget."""
        self._path = path
        self._request(f"{path} cannot be used")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which no added token is recognised. Raises TokenizerError."""
        return self._request(f"{self._path} cannot encode a text of {len(text):,} characters", text=text)[
            "ids"
        ]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`. Raises TokenizerError."""
        return self._request(f"{self._path} cannot decode token ids", ids=ids)["text"]

    def _request(self, doing: str, **inputs: Any) -> dict[str, Any]:
        reply = process.request(msgspec.json.encode({"path": str(self._path.absolute()), **inputs}).decode())
        if "error" in reply:
            raise TokenizerError(f"{doing}{printable(reply['error'], 300)}")
        return reply


def read_rules(data: bytes, source: str) -> Rules:
    """Read the rules in `data`, the content of the tokenizer.json `source`. Raises TokenizerError."""
    rules = _decode(data, Rules, source)
    added = rules.added_tokens if isinstance(rules.added_tokens, list) else []
    check_added([token.get("content") for token in added if isinstance(token, Mapping)], source)
    return rules


def check_added(texts: list[Any], source: str) -> None:
    """Raise TokenizerError for more added tokens than MAX_ADDED_TOKENS, or for one that is too long."""
    if len(texts) > MAX_ADDED_TOKENS:
        raise TokenizerError(f"{source} adds {len(texts):,} tokens, more than {MAX_ADDED_TOKENS:,}")
    longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
    if longest > MAX_ADDED_CHARACTERS:
        raise TokenizerError(
            f"{source} adds a token of {longest:,} characters, more than {MAX_ADDED_CHARACTERS:,}"
        )


def without_rules(data: bytes, source: str, *, decoder: bool) -> bytes:
    """Return a tokenizer.json of the same vocabulary and added tokens, without rules to encode by.

    It keeps the `decoder` on request. Raises TokenizerError.
    """
    kept = _decode(data, Vocabulary, source)
    if not decoder:
        kept.decoder = msgspec.Raw(b"null")
    return msgspec.json.encode(kept)


def _decode(data: bytes, kind: type[T], source: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise TokenizerError(f"{source} cannot be used: {printable(str(problem))}") from problem


def _all_known(rule: Any, known: frozenset[str]) -> bool:
    """Whether `rule`, or each of a sequence of rules, is known to take time and memory in proportion."""
    if isinstance(rule, Mapping) and rule.get("type") == "Sequence":
        steps = next((rule[name] for name in STEPS if name in rule), None)
        return isinstance(steps, list) and len(steps) <= MAX_STEPS and all(_is_known(s, known) for s in steps)
    return rule is None or _is_known(rule, known)


def _is_known(rule: Any, known: frozenset[str]) -> bool:
    if not isinstance(rule, Mapping):
        return False
    kind, pattern = rule.get("type"), rule.get("pattern")
    if kind == "Split" and known is PRE_TOKENIZERS and isinstance(pattern, Mapping):
        text = pattern.get("String")
        return pattern.get("Regex") in PATTERNS or (isinstance(text, str) and 0 < len(text) < MAX_DELIMITER)
    return kind in known


def _is_short(affix: Any) -> bool:
    return affix is None or (isinstance(affix, str) and len(affix) <= MAX_AFFIX)
