"""Converts text to token ids and back with the `tokenizers` library, and shields text from special tokens.

Owns the streaming detokenizer, which never splits a character; its pieces joined equal `decode` of the whole.
Special tokens (`<|im_end|>`) have no text; other added tokens (`<think>`, `<tool_call>`) keep theirs.
Refuses a damaged tokenizer.json in one sentence, even where the library would panic. Never truncates or pads.
"""

import codecs
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock, RLock
from typing import Any, Protocol

from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Library

from ..checkpoint.config import load_generation_config
from ..errors import ConfigError, TokenizerError
from ..machine.files import read_bytes, read_json
from ..quoting import printable
from .tokenizer_rules import MAX_ADDED_TOKENS, ForeignRules, check_added, read_rules, without_rules

MAX_TOKENIZER_NBYTES = 64 << 20  # the published ones have up to 20
MAX_TOKENIZER_VALUES = 4_000_000  # theirs have one; reading each takes up to 200 bytes
MAX_UNUSED_ROWS = 1 << 16  # of an embedding beyond the tokenizer's ids; the published ones have hundreds
COUNTED_CHARACTERS = 1 << 20  # at once, where a text may be longer than any context
MAX_ID = 1 << 32  # the library keeps ids in 32 bits
TURN_ENDS = ("<|im_end|>", "<|endoftext|>")
SHIELD = "\ufdd0"  # a code point that Unicode promises never to assign
WINDOW = 8  # tokens of context for decoders that look at their neighbours


class Detokenizer(Protocol):
    """Converts ids to text, one by one."""

    def add(self, id: int) -> str:
        """The text that `id` completes; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """The rest of the text; an incomplete character becomes U+FFFD."""
        ...


class Tokenizer:
    """A loaded tokenizer. `stop_ids` end a reply; the ids of `<think>` and `</think>` are None if unknown."""

    def __init__(
        self,
        library: Library,
        source: str,
        eos: Iterable[int] = (),
        special: Collection[str] = (),
        foreign: ForeignRules | None = None,
    ):
        """`special` names tokens that are special although the library was not told so.

        With `foreign` rules the library has only the vocabulary, and a decoder if that may run here.
        """
        self._library, self._foreign = library, foreign
        self._source = source
        self._lock = Lock()
        added = library.get_added_tokens_decoder()
        check_added([token.content for token in added.values()], source)
        self._texts = {
            id: "" if token.special or token.content in special else token.content
            for id, token in added.items()
        }
        self._ids = {token.content: id for id, token in added.items() if token.content}
        self._pieces: dict[int, bytes] = {}
        # As special tokens they all obey `encode_special_tokens`; _texts knows which are really special.
        for token in added.values():
            token.special = True
        library.add_special_tokens(list(added.values()))
        self.think_open_id = self.token_id("<think>")
        self.think_close_id = self.token_id("</think>")
        ends = (self.token_id(text) for text in TURN_ENDS)
        self.stop_ids = frozenset(eos) | {id for id in ends if id is not None}

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json and the additions in tokenizer_config.json and generation_config.json.

        Raises TokenizerError, or ConfigError for generation_config.json.
        """
        path = folder / "tokenizer.json"
        data = read_bytes(path, TokenizerError, MAX_TOKENIZER_NBYTES).removeprefix(codecs.BOM_UTF8)
        if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_TOKENIZER_VALUES:
            raise TokenizerError(f"{path} holds more than {MAX_TOKENIZER_VALUES:,} values")
        rules = read_rules(data, str(path))
        foreign = None if rules.encodes_in_bounds and rules.decodes_in_bounds else ForeignRules(path)
        if foreign is not None:
            data = without_rules(data, str(path), decoder=rules.decodes_in_bounds)
        with _library_errors(f"{path} cannot be used"):
            library = Library.from_buffer(data)
            library.no_truncation()
            library.no_padding()
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path, TokenizerError) if config_path.exists() else {}
        special = _declare_missing(library, config.get("added_tokens_decoder", {}), str(config_path))
        tokenizer = cls(library, str(path), _eos_ids(folder), special, foreign)
        tokenizer._add_stop_token(config.get("eos_token"))
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; the first call takes a quarter of a second for 248,077 entries."""
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check_vocabulary(self, rows: int) -> None:
        """Raise TokenizerError unless this may be the tokenizer of an embedding of `rows` rows."""
        entries = self._library.get_vocab_size(with_added_tokens=True)  # its ids may have gaps
        if self.vocab_size > rows or rows - entries > MAX_UNUSED_ROWS:
            found = max(entries, self.vocab_size) if self.vocab_size > rows else entries
            raise TokenizerError(
                f"{self._source} has {found:,} entries, and the model's vocabulary has {rows:,}: "
                "they do not belong together"
            )

    def token_id(self, text: str) -> int | None:
        """The id of the token written `text`, added or not."""
        return self._ids.get(text, self._library.token_to_id(text))

    @property
    def added_tokens(self) -> dict[int, str]:
        """The names of the tokens beside the vocabulary of text, special ones included, by id."""
        return {id: text for text, id in self._ids.items()}

    @property
    def is_byte_level(self) -> bool:
        """Whether each id stands for bytes of its own."""
        return isinstance(self._library.decoder, decoders.ByteLevel)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`, with no tokens added before or after. Raises TokenizerError.

        With `special`, added tokens such as `<think>` are recognised, except in text that went through
        `shield`. Without it, none is. Lone surrogates become U+FFFD.
        """
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        if special and self._ids and (SHIELD in text or self._foreign):
            return self._encode_shielded(text)
        if self._foreign:
            return self._foreign.encode(text)
        with self._lock, _library_errors(f"{self._source} cannot encode a text of {len(text):,} characters"):
            self._library.encode_special_tokens = not special
            return self._library.encode(text, add_special_tokens=False).ids

    def count_at_least(self, text: str, limit: int) -> int:
        """A lower bound of the number of ids of `text`, to refuse what exceeds `limit` by far.

        Encodes at most COUNTED_CHARACTERS at once, and no more than it takes to exceed `limit`. Returns 0
        for a text that fits into one piece.
        """
        count, begin = 0, 0
        while len(text) > COUNTED_CHARACTERS and begin < len(text) and count <= limit:
            piece = text[begin : begin + COUNTED_CHARACTERS]
            count += max(0, len(self.encode(piece, special=False)) - 2 * WINDOW)  # a cut makes a few more
            begin += COUNTED_CHARACTERS
        return count

    def shield(self, text: str) -> str:
        """Mark `text` so that `encode` recognises no special token in it, even inside a rendered prompt.

        A pasted `<|im_end|>` would otherwise end the turn. The mark is one U+FDD0 in each such place;
        `encode` removes it.
        """
        if not self._ids:
            return text
        return re.sub(
            f"(?=(?:{self._pattern}))(.)", rf"\1{SHIELD}", text.replace(SHIELD, ""), flags=re.DOTALL
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Invalid UTF-8 becomes U+FFFD; ids without a token are skipped."""
        detokenizer = self.detokenizer()
        return "".join([*map(detokenizer.add, ids), detokenizer.flush()])

    def decode_with_special(self, ids: Iterable[int]) -> str:
        """The text of `ids` with the special tokens that `decode` leaves out, as a template writes them."""
        names = self.added_tokens
        parts: list[str] = []
        run: list[int] = []
        for id in ids:
            if id in names:
                parts += [self.decode(run), names[id]]
                run = []
            else:
                run.append(id)
        return "".join([*parts, self.decode(run)])

    def token_bytes(self, id: int) -> bytes:
        """The bytes that `id` adds to a text; none for a special token."""
        if self.is_byte_level:
            return self._piece(id)
        return self.decode([id]).encode()

    def detokenizer(self) -> Detokenizer:
        if self.is_byte_level:
            return ByteDetokenizer(self._piece)
        return WindowDetokenizer(self._decode_window)

    @cached_property
    def _pattern(self) -> str:
        """A pattern that matches any added token, the longest first as in the library."""
        first = "".join(sorted({re.escape(text[0]) for text in self._ids}))
        tokens = "|".join(re.escape(text) for text in sorted(self._ids, key=len, reverse=True))
        return f"(?=[{first}])(?:{tokens})"  # at most places the first character tells

    def _encode_shielded(self, text: str) -> list[int]:
        """Encode the parts between added tokens separately, as the library splits the text there first."""
        ids: list[int] = []
        for part in re.split(f"({self._pattern})", text):
            known = self._ids.get(part)
            ids += self.encode(part.replace(SHIELD, ""), special=False) if known is None else [known]
        return ids

    def _piece(self, id: int) -> bytes:
        """The bytes of `id` in a byte-level vocabulary."""
        if id not in self._pieces:
            text = self._texts.get(id)
            token = self._token(id) if text is None else None
            if token is None:
                return (text or "").encode()
            known = all(character in BYTE_OF for character in token)
            self._pieces[id] = bytes(BYTE_OF[c] for c in token) if known else token.encode()
        return self._pieces[id]

    def _token(self, id: int) -> str | None:
        if not 0 <= id < MAX_ID:
            raise TokenizerError(f"{id} is not a token id: wanted 0 to {MAX_ID - 1:,}")
        return self._library.id_to_token(id)

    def _decode_window(self, ids: list[int]) -> str:
        seen = [id for id in ids if self._texts.get(id) != "" and self._token(id) is not None]
        if self._foreign and self._library.decoder is None:
            return self._foreign.decode(seen)
        with _library_errors(f"{self._source} cannot decode token ids"):
            return self._library.decode(seen, skip_special_tokens=False)

    def _add_stop_token(self, eos_token: Any) -> None:
        """Add the end token of tokenizer_config.json, a string or an object with its content."""
        text = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
        id = self.token_id(text) if isinstance(text, str) else None
        if id is not None:
            self.stop_ids |= {id}


class ByteDetokenizer:
    """Detokenizer of byte-level vocabularies: ids are runs of bytes, so incremental UTF-8 is exact."""

    def __init__(self, piece: Callable[[int], bytes]):
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, id: int) -> str:
        return self._decoder.decode(self._piece(id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Detokenizer for any other decoder: decodes the last few ids again and returns the new text.

    Exact if a token's text depends on fewer than `WINDOW` tokens before it and on none after it.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._shown = ""
        self._waiting = 0

    def add(self, id: int) -> str:
        self._ids.append(id)
        self._waiting += 1
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and self._waiting < WINDOW:
            return ""
        return self._show(text)

    def flush(self) -> str:
        fresh = self._show(self._decode(self._ids))
        self._ids, self._shown = [], ""
        return fresh

    def _show(self, text: str) -> str:
        fresh = text[len(self._shown) :]
        self._shown = text
        self._waiting = 0
        if len(self._ids) >= 2 * WINDOW:
            self._forget()
        return fresh

    def _forget(self) -> None:
        """Keep only the last ids: WINDOW of them, or more to begin at a whole character."""
        for count in range(WINDOW, 2 * WINDOW):
            kept = self._ids[-count:]
            text = self._decode(kept)
            if "\ufffd" not in text and self._shown.endswith(text):
                break
        else:
            kept = self._ids[-WINDOW:]
            text = self._decode(kept)
        self._ids, self._shown = kept, text


def _byte_alphabet() -> dict[str, int]:
    """The byte for each character of a byte-level vocabulary, by GPT-2's table.

    Visible Latin-1 characters stand for their own byte; U+0100 onwards stand for the other bytes.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


_stderr_lock = RLock()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what a panic of the library writes to the terminal; the error says the same."""
    with _stderr_lock:
        try:
            kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        except OSError:  # no stderr
            yield
            return
        try:
            os.dup2(null, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(null)


@contextmanager
def _library_errors(doing: str) -> Iterator[None]:
    """Turn errors of the library into TokenizerError.

    It raises bare Exception; its panics are BaseException of a class that cannot be imported.
    """
    try:
        with _silent_stderr():
            yield
    except BaseException as problem:
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{doing}: {printable(' '.join(str(problem).split()), 300)}") from problem


def _declare_missing(library: Library, declared: Any, source: str) -> frozenset[str]:
    """Add the tokens that only tokenizer_config.json names, with exactly the ids given there.

    Returns those of them that are special: the library would have to be told run by run, in quadratic time.
    """
    if not isinstance(declared, dict):
        raise TokenizerError(f"{source}: added_tokens_decoder must be an object")
    known = library.get_added_tokens_decoder()
    if len(declared) > MAX_ADDED_TOKENS:
        raise TokenizerError(
            f"{source}: added_tokens_decoder has {len(declared):,} entries, more than {MAX_ADDED_TOKENS:,}"
        )
    missing = sorted(
        item for item in (_parse_declared(*pair, source) for pair in declared.items()) if item[0] not in known
    )
    check_added([text for _, text, _ in missing], source)
    with _library_errors(f"{source}: cannot add the tokens of added_tokens_decoder"):
        # all at once, because the library rebuilds its tables in each call
        library.add_tokens([AddedToken(text, normalized=False) for _, text, _ in missing])
    for id, text, _ in missing:
        found = library.token_to_id(text)
        if found != id:
            raise TokenizerError(
                f"{source}: {printable(text)!r} is declared with id {id}, but tokenizer.json gives it {found}"
            )
    return frozenset(text for _, text, special in missing if special)


def _parse_declared(key: str, entry: Any, source: str) -> tuple[int, str, bool]:
    text = entry.get("content") if isinstance(entry, Mapping) else None
    if not (key.isascii() and key.isdigit() and len(key) <= 10) or not isinstance(text, str) or not text:
        raise TokenizerError(
            f"{source}: added_tokens_decoder has a bad entry {key[:40]!r}, wanted id: {{content}}"
        )
    return int(key), text, entry.get("special") is True


def _eos_ids(folder: Path) -> list[int]:
    eos = load_generation_config(folder).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(id) is not int or not 0 <= id < MAX_ID for id in ids):
        raise ConfigError(
            f"{folder / 'generation_config.json'}: eos_token_id must be a token id or a list of them"
        )
    return ids
