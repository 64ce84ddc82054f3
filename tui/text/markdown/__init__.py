"""Markdown as lines of named styles for a width: whole, or while it is being written. No colours."""

from .lines import BLANK, Frame, Line, Span
from .parser import Code, code_blocks
from .render import render
from .splitter import Piece, Splitter
from .stream import Stream, document


def warm() -> None:
    """Load what the first text would wait for, a tenth of a second; fit for a thread."""
    document("```python\npass\n```", Frame(80, 80))


__all__ = [
    "BLANK",
    "Code",
    "Frame",
    "Line",
    "Piece",
    "Span",
    "Splitter",
    "Stream",
    "code_blocks",
    "document",
    "render",
    "warm",
]
