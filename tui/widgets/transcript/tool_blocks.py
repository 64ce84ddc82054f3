"""The blocks of tools in a transcript: the calls of a reply, and the results that the next one follows.

Both come from others: they are made printable, and begin folded to a line each.
"""

import json

from ....core.conversation.summary import ToolCall, Turn
from ...text.markdown import Line, Span
from ...text.markdown.lines import lay_hard
from ...text.sanitise import cells, cut, printable
from ...tools.rounds import describe_result
from .blocks import Block, Look, Question


class Tools(Block):
    """Tool calls, in a line each; with all arguments when opened."""

    foldable = True

    def __init__(self, turn: int) -> None:
        super().__init__(turn)
        self._calls: list[tuple[str, str]] = []

    def add(self, call: ToolCall) -> None:
        """Add a call."""
        name = " ".join(printable(call.name).split())
        self._calls.append((name, printable(json.dumps(call.arguments, ensure_ascii=False, indent=2))))
        self.forget()

    @property
    def text(self) -> str:
        return "\n".join(f"{name} {arguments}" for name, arguments in self._calls)

    def build(self, look: Look) -> list[Line]:
        lines = []
        for name, arguments in self._calls:
            head = f"→ {cut(name, look.frame.width // 2)} "
            lines += _folding_line(head, name, arguments, self.opened, look)
        return lines


class Results(Question):
    """The results of tools, in a line each with time and size; with all text when opened."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self._results = [(describe_result(one), printable(one.text)) for one in turn.results]

    @property
    def text(self) -> str:
        return "\n".join(f"{head}\n{text}" for head, text in self._results)

    @property
    def name(self) -> str:
        return f"results {self.turn}"

    def build(self, look: Look) -> list[Line]:
        lines: list[Line] = []
        for head, text in self._results:
            if self.opened:
                lines += lay_hard([Span(f"← {head}", "fact", f"{head}\n", "fold")], look.frame.wide)
                lines += lay_hard([Span(text.expandtabs(4), "fact")], look.frame.wide)
            else:
                lines += _folding_line(f"← {head}  ", head, text, False, look, "fact")
        return lines


def _folding_line(
    head: str, name: str, body: str, opened: bool | None, look: Look, style: str = "code"
) -> list[Line]:
    """Return a head with its text behind it, cut to one line unless it is opened."""
    if not opened:
        body = cut(" ".join(body.split()), max(look.frame.width - cells(head), 1))
    return lay_hard([Span(head, "accent", f"{name} ", "fold"), Span(body, style)], look.frame.wide)
