"""Highlighted code: pygments' tokens as styles named after them; plain if the language is unknown.

A long piece is coloured in chunks, each as if it began anew: an open fence costs what was added to it.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

from .lines import Span

if TYPE_CHECKING:
    from pygments.lexer import Lexer

CHUNK = 24  # lines
MAX_WHOLE = 20_000  # characters that are coloured as one
_MAX_LINE = 1_000  # characters: minified code costs much and gains little
_TAB = 4  # cells

Colored = tuple[tuple[Span, ...], ...]


def highlight(code: str, language: str, closed: bool) -> Colored:
    """Split `code` into lines; a final newline does not begin another."""
    lines = code.removesuffix("\n").split("\n")
    if closed and len(code) <= MAX_WHOLE:
        return _colored("\n".join(lines), language)
    chunks = ("\n".join(lines[at : at + CHUNK]) for at in range(0, len(lines), CHUNK))
    return tuple(line for chunk in chunks for line in _colored(chunk, language))


@lru_cache(256)
def _colored(code: str, language: str) -> Colored:
    lexer = _lexer(language) if language else None
    if lexer is None or max(map(len, code.split("\n"))) > _MAX_LINE:
        return tuple(_expanded([Span(line, "code")]) for line in code.split("\n"))
    lines: list[list[Span]] = [[]]
    for kind, text in lexer.get_tokens(code):
        style = f"token:{'.'.join(kind)}"
        first, *rest = text.split("\n")
        lines[-1].append(Span(first, style))
        lines += [[Span(part, style)] for part in rest]
    if "\n".join("".join(span.text for span in line) for line in lines) != code:
        return tuple(_expanded([Span(line, "code")]) for line in code.split("\n"))
    return tuple(_expanded(line) for line in lines)


def _expanded(spans: list[Span]) -> tuple[Span, ...]:
    """Drop empty spans and expand tabs to spaces that are copied as tabs."""
    if not any("\t" in span.text for span in spans):
        return tuple(span for span in spans if span.text)
    done, column = [], 0
    for span in spans:
        for place, part in enumerate(span.text.split("\t")):
            if place:
                size = _TAB - column % _TAB
                done.append(span._replace(text=" " * size, copy="\t"))
                column += size
            if part:
                done.append(span._replace(text=part))
                column += len(part)
    return tuple(done)


@lru_cache(64)
def _lexer(language: str) -> "Lexer | None":
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
