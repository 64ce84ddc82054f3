"""Text to token ids and back, on the `tokenizers` library; text that must not become a special token.

Owns the streaming detokenizer: it never splits a character, and its pieces joined are `decode` of the whole.
Special tokens (`<|im_end|>`) have no text; other added tokens (`<think>`, `<tool_call>`) keep theirs.
Refuses a damaged tokenizer.json in one sentence, also where the library would panic. Never truncates or pads.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Library

from ..checkpoint.config import load_generation_config
from ..errors import ConfigError, TokenizerError
from ..machine.files import read_bytes, read_json

MAX_TOKENIZER_NBYTES = 256 << 20
MAX_ID = 1 << 32  # the library keeps ids in 32 bits
TURN_ENDS = ("<|im_end|>", "<|endoftext|>")
SHIELD = "\ufdd0"  # a code point that Unicode promises never to assign
WINDOW = 8  # tokens of context for decoders that look at their neighbours


class Detokenizer(Protocol):
    """Turns ids into text one by one."""

    def add(self, id: int) -> str:
        """The text that `id` completes; empty while a character is unfinished."""
        ...

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got its last byte."""
        ...


class Tokenizer:
    """One loaded tokenizer. `stop_ids` are the ids that end a reply; the think ids are None where unknown."""

    def __init__(self, library: Library, source: str, eos: Iterable[int] = ()):
        self._library = library
        self._source = source
        self._lock = Lock()
        added = library.get_added_tokens_decoder()
        self._texts = {id: "" if token.special else token.content for id, token in added.items()}
        self._ids = {token.content: id for id, token in added.items() if token.content}
        self._pieces: dict[int, bytes] = {}
        # Named special, an added token obeys `encode_special_tokens`; which are hidden is kept in _texts.
        for token in added.values():
            token.special = True
        library.add_special_tokens(list(added.values()))
        self.think_open_id = self.token_id("<think>")
        self.think_close_id = self.token_id("</think>")
        ends = (self.token_id(text) for text in TURN_ENDS)
        self.stop_ids = frozenset(eos) | {id for id in ends if id is not None}

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, and what tokenizer_config.json and generation_config.json add to it.

        Raises TokenizerError, or ConfigError for generation_config.json.
        """
        path = folder / "tokenizer.json"
        data = read_bytes(path, TokenizerError, MAX_TOKENIZER_NBYTES)
        with _library_errors(f"{path} cannot be used"):
            library = Library.from_buffer(data)
            library.no_truncation()
            library.no_padding()
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path, TokenizerError) if config_path.exists() else {}
        _declare_missing(library, config.get("added_tokens_decoder", {}), str(config_path))
        tokenizer = cls(library, str(path), _eos_ids(folder))
        tokenizer._stop_at(config.get("eos_token"))
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; the first use takes a quarter of a second for 248,077 entries."""
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_id(self, text: str) -> int | None:
        """The id of the token written `text`, added or not."""
        return self._ids.get(text, self._library.token_to_id(text))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`, with no token put before or after it. Raises TokenizerError.

        Without `special` no added token comes out, `<think>` included: the text is only text. With it, added
        tokens are recognised except inside what went through `shield`. Lone surrogates become U+FFFD.
        """
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        if special and SHIELD in text:
            return self._encode_shielded(text)
        with self._lock, _library_errors(f"{self._source} cannot encode a text of {len(text):,} characters"):
            self._library.encode_special_tokens = not special
            return self._library.encode(text, add_special_tokens=False).ids

    def shield(self, text: str) -> str:
        """`text` marked so that `encode` reads it as text even inside a rendered prompt.

        A pasted `<|im_end|>` would end the turn. The mark is one U+FDD0 in each such place, and
        `encode` removes it.
        """
        if not self._ids:
            return text
        return re.sub(
            f"(?=(?:{self._pattern}))(.)", rf"\1{SHIELD}", text.replace(SHIELD, ""), flags=re.DOTALL
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids of no token nothing."""
        detokenizer = self.detokenizer()
        return "".join([*map(detokenizer.add, ids), detokenizer.flush()])

    def spelled(self, ids: Iterable[int]) -> str:
        """The text of `ids` with the special tokens that `decode` leaves out, as a template has them."""
        names = {id: text for text, id in self._ids.items()}
        parts: list[str] = []
        run: list[int] = []
        for id in ids:
            if id in names:
                parts += [self.decode(run), names[id]]
                run = []
            else:
                run.append(id)
        return "".join([*parts, self.decode(run)])

    def detokenizer(self) -> Detokenizer:
        if isinstance(self._library.decoder, decoders.ByteLevel):
            return ByteDetokenizer(self._piece)
        return WindowDetokenizer(self._decode_window)

    @cached_property
    def _pattern(self) -> str:
        """Matches any added token, the longest first as the library does."""
        return "|".join(re.escape(text) for text in sorted(self._ids, key=len, reverse=True))

    def _encode_shielded(self, text: str) -> list[int]:
        """Added tokens cut the text before anything else is done to it, so the parts can be encoded alone."""
        ids: list[int] = []
        for part in re.split(f"({self._pattern})", text):
            known = self._ids.get(part)
            ids += self.encode(part.replace(SHIELD, ""), special=False) if known is None else [known]
        return ids

    def _piece(self, id: int) -> bytes:
        """The bytes that `id` stands for in a byte-level vocabulary."""
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
        with _library_errors(f"{self._source} cannot decode token ids"):
            return self._library.decode(seen, skip_special_tokens=False)

    def _stop_at(self, eos_token: Any) -> None:
        """Add tokenizer_config.json's end token, written as a string or as an object with its content."""
        text = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
        id = self.token_id(text) if isinstance(text, str) else None
        if id is not None:
            self.stop_ids |= {id}


class ByteDetokenizer:
    """For byte-level vocabularies: every id is a run of bytes, so an incremental UTF-8 decoder is exact."""

    def __init__(self, piece: Callable[[int], bytes]):
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, id: int) -> str:
        return self._decoder.decode(self._piece(id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other decoder: decodes the last few ids again and gives what was not yet there.

    Exact where a token's text depends on fewer than `WINDOW` tokens before it and on none after it.
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
        """Keep the last ids, from WINDOW on as many as begin with no part of a character."""
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
    """The byte behind each character of a byte-level vocabulary.

    GPT-2's table: visible Latin-1 characters stand for their own byte, the other bytes for U+0100 onwards.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


@contextmanager
def _library_errors(doing: str) -> Iterator[None]:
    """The library raises bare Exception; its panics are BaseException of a class that cannot be imported."""
    try:
        yield
    except BaseException as problem:
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{doing}: {' '.join(str(problem).split())[:300]}") from problem


def _declare_missing(library: Library, declared: Any, source: str) -> None:
    """Add the tokens that only tokenizer_config.json names, under exactly the ids it gives them."""
    if not isinstance(declared, dict):
        raise TokenizerError(f"{source}: added_tokens_decoder must be an object")
    known = library.get_added_tokens_decoder()
    missing = sorted(
        item for item in (_declared(*pair, source) for pair in declared.items()) if item[0] not in known
    )
    for id, text, special in missing:
        with _library_errors(f"{source}: cannot add the token {text!r}"):
            add = library.add_special_tokens if special else library.add_tokens
            add([AddedToken(text, normalized=False)])
        if library.token_to_id(text) != id:
            found = library.token_to_id(text)
            raise TokenizerError(
                f"{source}: {text!r} is declared with id {id}, but tokenizer.json gives it {found}"
            )


def _declared(key: str, entry: Any, source: str) -> tuple[int, str, bool]:
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
