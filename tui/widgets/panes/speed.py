"""The pane of the speed: tokens/s over this reply as columns, reading shaded before them."""

from textual.renderables.digits import DIGITS, DIGITS3X3

from ...text.figures import format_speed
from ...text.report import Line
from .drawing import columns, resample, spread
from .facts import Pane, PaneFacts

BIG_ROWS, CHART_ROWS = 3, 3
SHADE = "░"
# reading may take this share of the chart, however long it took
MOST_SHADED = 3
# in a strip, and from how many cells on it shows more
BRIEF_COLUMNS, WIDE_BRIEF = 8, 70


def draw_speed(facts: PaneFacts, width: int, rows: int) -> list[Line]:
    """Return the speed as a figure, large where there is room, the chart, and the words below it."""
    if facts.model is None and not facts.replying:
        return [[("dim", "no model: f2 or /load chooses one")]]
    if facts.last is None and not facts.replying:
        return [[("dim", "the first reply is measured here")]]
    words = [[("dim", " · ".join(_words(facts)))]] if _words(facts) and rows > 1 else []
    if rows >= BIG_ROWS + 1 + len(words):
        figure = _big(facts, width)
    else:
        figure = [spread(_figure(facts), _share(facts), width)]
    room = rows - len(figure) - len(words)
    return [*figure, *(_chart(facts, width, room) if room > 0 else []), *words]


def brief_speed(facts: PaneFacts, width: int) -> Line:
    if not _rate(facts):
        return []
    chart = _chart(facts, BRIEF_COLUMNS if width < WIDE_BRIEF else 2 * BRIEF_COLUMNS, 1)
    words = [] if facts.replying or width < WIDE_BRIEF else [("dim", "  " + " · ".join(_words(facts)))]
    return [*_figure(facts), ("", " "), *(chart[0] if chart else []), *words]


def _rate(facts: PaneFacts) -> float:
    """Return the tokens/s now, or those of the last reply."""
    if facts.replying or facts.status.reply.speeds:
        return facts.status.tokens_per_s
    return facts.last.stats.performance.decode_tokens_per_s if facts.last else 0.0


def _figure(facts: PaneFacts) -> Line:
    return [("big", format_speed(_rate(facts))), ("dim", f" {_unit(facts)}")]


def _unit(facts: PaneFacts) -> str:
    return "tok/s read" if facts.status.phase == "reading" else "tok/s"


def _share(facts: PaneFacts) -> Line:
    share = facts.status.bandwidth_share
    return [("", f"{share:.0%}"), ("dim", " of the bandwidth")] if share else []


def _big(facts: PaneFacts, width: int) -> list[Line]:
    """Return the speed in digits three rows high, with what they mean beside them."""
    beside = [
        [("dim", _unit(facts))],
        _share(facts),
        [("dim", facts.status.phase if facts.replying else "last reply")],
    ]
    rows = digits(format_speed(_rate(facts)))
    return [
        spread([("big", row), *([("", " "), *text] if text else [])], [], width)
        for row, text in zip(rows, beside, strict=True)
    ]


def digits(text: str) -> list[str]:
    """Return `text` in Textual's digits, three rows high."""
    drawn = [["", "", ""]]
    for character in text:
        place = DIGITS.find(character) * 3
        if character in ".," or place < 0:
            drawn.append([" ", " ", "•" if character == "." else character])
        else:
            drawn.append([DIGITS3X3[place + row].ljust(3) for row in range(3)])
    return ["".join(character[row] for character in drawn) for row in range(3)]


def _chart(facts: PaneFacts, width: int, rows: int) -> list[Line]:
    """Return columns of tokens/s over the reply; time spent reading is shaded."""
    rows, reply = min(rows, CHART_ROWS), facts.status.reply
    if facts.status.phase == "reading":
        done = facts.status.done / facts.status.total if facts.status.total else 0.0
        return [[("shade", SHADE * round(min(done, 1.0) * width))] for _ in range(rows)]
    if not reply.speeds:
        speeds = [turn.stats.performance.decode_tokens_per_s for turn in facts.state.turns[-width:]]
        return [[("spark", row)] for row in columns(speeds, rows)] if len(speeds) > 1 else []
    shaded = _shaded(reply.seconds_to_first_token or 0.0, facts.status.seconds, width)
    drawn = columns(resample(reply.speeds, width - shaded), rows)
    return [[("shade", SHADE * shaded), ("spark", row)] for row in drawn]


def _shaded(reading: float, seconds: float, width: int) -> int:
    """Return how many columns stand for reading."""
    share = reading / seconds if seconds else 0.0
    return min(max(round(share * width), 1 if reading else 0), width // MOST_SHADED)


def _words(facts: PaneFacts) -> list[str]:
    """Describe reading and drafts."""
    status, parts = facts.status, []
    if status.phase == "reading":
        return [f"{status.done:,} of {status.total:,} tokens read"] if status.total else ["reading"]
    first = status.reply.seconds_to_first_token
    if facts.last is not None and not facts.replying:
        first = facts.last.stats.performance.seconds_to_first_token
    if first is not None:
        parts.append(f"first token {first:.2f} s")
    if status.drafts_accepted is not None:
        gain = f" ×{status.draft_gain:.2f}" if status.draft_gain else ""
        parts.append(f"drafts {status.drafts_accepted:.0%}{gain}")
    return parts


PANE = Pane(
    name="speed",
    least=2,
    wanted=lambda _: BIG_ROWS + CHART_ROWS + 1,
    note=lambda _: [],
    lines=draw_speed,
    brief=brief_speed,
)
