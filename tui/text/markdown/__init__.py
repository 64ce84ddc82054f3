"""Markdown as lines of named styles for a width, complete or streaming. No colours."""

from .lines import BLANK, Frame, Line, Span
from .parser import Code, code_blocks
from .render import render
from .splitter import Piece, Splitter
from .stream import Stream, document
from .table import WholeTable, whole_tables


def warm() -> None:
    """Load the modules that the first text needs, which takes a tenth of a second; callable on a thread."""
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
    "WholeTable",
    "code_blocks",
    "document",
    "render",
    "warm",
    "whole_tables",
]
