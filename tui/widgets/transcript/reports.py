"""Reports in the transcript, each as a card: a frame with its title, its state at the right, and its parts.

A failure is red as a whole. Copied text has no frame.
"""

from collections.abc import Sequence

from ...text.markdown import Frame, Line, Span, document
from ...text.markdown.lines import width_of
from ...text.report import Bars, Curve, Markdown, Part, Plot, Report, Spark, Table, report_lines, report_text
from ...text.sanitise import cells, cut, printable
from .blocks import Block, Look

PICTURES = Table | Bars | Plot | Curve  # which have air between them
SIDES = 4  # cells of a card beside its lines
LEAST_NOTE = 12  # cells that a title keeps beside a note
STYLES = {"bar": "report.bar"}
FRAMES = {"failed": "bad", "running": "accent"}


class Reported(Block):
    """A command's report; that of a running job is replaced again and again. A `kept` one begins folded."""

    is_extra = True
    foldable = True

    def __init__(self, report: Report, turn: int = 0, kept: str = "") -> None:
        """`kept` is the time of a report that was kept with the conversation."""
        super().__init__(turn)
        self._report, self._kept = report, kept

    def is_open(self, _look: Look) -> bool:
        return not self._kept if self.opened is None else self.opened

    @property
    def name(self) -> str:
        return "report"

    def replace(self, report: Report) -> None:
        self._report = report
        self.forget()

    @property
    def text(self) -> str:
        return printable(report_text(self._report))

    def build(self, look: Look) -> list[Line]:
        if not self.is_open(look):
            head = printable(" ".join(self._report.title.split())) or "report"
            facts = f" · {self._kept}" if self._kept else ""
            return [Line((Span(cut(f"▸ {head}{facts}", look.frame.width), "button", "", "fold"),))]
        if look.frame.wide <= 2 * SIDES:
            return body(self._report, look.frame)
        return card(self._report, look.frame)


def body(report: Report, frame: Frame) -> list[Line]:
    """Return the lines of a report's parts."""
    lines: list[Line] = []
    before: Part | None = None
    for part in report.parts:
        if isinstance(part, PICTURES) and isinstance(before, PICTURES | Spark):
            lines.append(Line(()))
        if isinstance(part, Markdown):
            lines += document(printable(part.source), frame)
        else:
            lines += _drawn(Report("", (part,)), frame.wide)
        before = part
    return lines


def card(report: Report, frame: Frame) -> list[Line]:
    """Return a report in a frame as wide as the text, or as its widest line."""
    lines = body(report, frame.less(SIDES))
    widest = max((width_of(line.spans) for line in lines), default=0)
    width = min(max(frame.width, widest + SIDES), frame.wide)
    style = FRAMES.get(report.mood, "card")
    bottom = Line((Span(f"╰{'─' * (width - 2)}╯", style, ""),))
    return [_top(report, width, style), *(_side(line, width, style) for line in lines), bottom]


def _top(report: Report, width: int, style: str) -> Line:
    """Return the upper edge, with the title and, at its right, what the card says of itself."""
    note = " ".join(printable(report.note).split())
    note = f" {note} " if note and cells(note) + LEAST_NOTE + SIDES <= width else ""
    title = cut(" ".join(printable(report.title).split()), width - SIDES - cells(note) - 2)
    title = f" {title} " if title else ""
    rest = width - 4 - cells(title) - cells(note)
    red = style == "bad"
    return Line(
        (
            Span("╭─", style, ""),
            Span(title, "bad" if red else "title", title.strip()),
            Span("─" * rest, style, ""),
            Span(note, "bad" if red else "fact", f" · {note.strip()}" if note else ""),
            Span("─╮", style, ""),
        )
    )


def _side(line: Line, width: int, style: str) -> Line:
    gap = " " * (width - SIDES - width_of(line.spans))
    return Line((Span("│ ", style, ""), *line.spans, Span(f"{gap} │", style, "")), line.joint)


def _drawn(report: Report, width: int) -> Sequence[Line]:
    return [
        Line(tuple(Span(text.replace("\t", " "), STYLES.get(name, name)) for name, text in row))
        for row in report_lines(report, width)
    ]
