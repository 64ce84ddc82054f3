"""The status row: what the engine does now, with speeds, gauges and seconds left, all in one row.

It paints four times a second while something runs, and not at all otherwise.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..text.figures import format_speed, format_tokens
from ..text.output import printable
from .line import Line, Piece, piece

if TYPE_CHECKING:
    from ..chat.controller import Status as Facts

TICK_SECONDS = 0.25
WARN, HOT = 0.80, 0.92
GAUGE_CELLS = 10
NARROW = 70
SPARKS = "▁▂▃▄▅▆▇█"
MARKS = {
    **{"starting": "◌", "loading": "◔", "reading": "◔", "thinking": "●", "answering": "●", "working": "◔"},
    "tools": "◔",
}


@dataclass(frozen=True)
class Lent:
    """A job that has the memory of the chat's model, how many messages wait, and the job's seconds left."""

    job: str
    waiting: int = 0
    seconds_left: float | None = None


class Status(Line):
    """Shows the figures of a `chat.meter.Status`; `show` may be called at any rate."""

    PREFIX = "status"
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *("status--mark", "status--speed", "status--spark", "status--dim", "status--ok", "status--warn"),
        *("status--hot", "status--error", "status--track"),
    }

    def __init__(self) -> None:
        super().__init__(id="status")
        self._facts: Facts | None = None
        self._phase = ""
        self.has_model = False
        self.lent: Lent | None = None
        self.schema = ""  # of answers, as the row names it
        # the panes in sight, to which this row leaves their figures
        self.beside: Callable[[], Collection[str]] = tuple
        self.painted = 0

    def on_mount(self) -> None:
        self.ticker = self.set_interval(TICK_SECONDS, self.refresh, pause=True)

    def show(self, facts: "Facts") -> None:
        """Take over `facts`; a change of phase, and any change while idle, is painted at once."""
        changed = facts.phase != self._phase
        self._facts, self._phase = facts, facts.phase
        if facts.phase not in MARKS:
            self.ticker.pause()
        elif changed:
            self.ticker.resume()
        if changed or facts.phase not in MARKS:
            self.refresh()

    def render_line(self, y: int):
        self.painted += 1
        return super().render_line(y)

    def left(self) -> list[Piece]:
        facts = self._facts
        if facts is None:
            return []
        match facts.phase:
            case "starting":
                return [piece("◌ starting the engine", "mark")]
            case "loading":
                return self._progress(facts, "loading", _gigabytes(facts.done, facts.total))
            case "reading" if facts.tools:
                return [piece(f"{MARKS[facts.phase]} {printable(facts.tools)}", "mark")]
            case "reading":
                return self._progress(facts, "reading", f"{_n(facts.done)}/{_n(facts.total)} tokens")
            case "thinking" | "answering":
                return self._writing(facts)
            case "tools":
                return [piece(f"{MARKS[facts.phase]} {printable(facts.tools)}", "mark")]
            case "working":
                return [piece("◔ working", "mark"), *_background(facts)]
            case "dead":
                return [piece(_death(facts.reason), "error")]
        return self._ready(facts)

    def right(self) -> list[Piece]:
        facts = self._facts
        match self._phase:
            case "loading":
                return [piece("you can type already; it will be sent", "dim", 9)]
            case "reading":
                return [piece("esc to stop", "dim", 8)]
            case "tools":
                return [piece("esc to cancel", "dim", 8)]
        if facts is None or self._phase in ("starting", "dead") or _is_hot(facts, self._phase):
            return []
        if self.lent is not None and self._phase == "idle":
            return []
        beside = self.beside()
        gauges = [] if "context" in beside else [_context(facts, self.size.width)]
        gauges += [] if "memory" in beside else [_memory(facts)]
        clock = [piece(_clock(facts.seconds), "dim", 5)] if self._phase in ("thinking", "answering") else []
        return [*gauges, *clock]

    def _progress(self, facts: "Facts", word: str, amount: str) -> list[Piece]:
        pieces = [piece(f"{MARKS[facts.phase]} {word}", "mark")]
        if not facts.total:
            pieces += _background(facts)
        if facts.total:
            pieces += [_bar(facts.done / facts.total, "ok", 3), piece(amount, "", 2)]
        if facts.phase == "reading" and facts.tokens_per_s:
            pieces.append(piece(f"{format_speed(facts.tokens_per_s)} tok/s", "speed", 4))
        if facts.seconds_left is not None:
            pieces.append(piece(f"{_left(facts.seconds_left)} left", "", 1))
        return pieces

    def _writing(self, facts: "Facts") -> list[Piece]:
        alone = "speed" not in self.beside()
        known = facts.tokens_per_s and alone
        speed = f"{format_speed(facts.tokens_per_s)} tok/s" if known else facts.phase
        pieces = [Piece((("mark", "● "), ("speed", speed)))]
        if alone:
            pieces.append(piece(_spark(facts.history_of_speed), "spark", 6))
        if facts.thought_tokens:
            pieces.append(Piece((("dim", "think "), ("", _n(facts.thought_tokens))), 4))
        if facts.answer_tokens:
            pieces.append(Piece((("dim", "answer "), ("", _n(facts.answer_tokens))), 3))
        pieces += self._form(5)
        if facts.drafts_accepted is not None and alone:
            pieces.append(Piece((("dim", "drafts "), ("", f"{facts.drafts_accepted:.0%}")), 7))
        if facts.draft_gain and facts.draft_cost and alone:
            gain, cost = ("", f"×{facts.draft_gain:.2f}"), ("", f"×{facts.draft_cost:.2f}")
            pieces.append(Piece((("dim", "gain "), gain, ("dim", " cost "), cost), 9))
        if facts.bandwidth_share and alone:
            pieces.append(Piece((("dim", "bw "), ("", f"{facts.bandwidth_share:.0%}")), 8))
        return [*pieces, *_background(facts)]

    def _ready(self, facts: "Facts") -> list[Piece]:
        if self.lent is not None:
            return _waiting(self.lent)
        if _is_hot(facts, self._phase):
            share = facts.context_tokens / facts.context_limit
            said = "/compact summarises · /new starts over · nothing is dropped silently"
            return [piece(f"▲ context {share:.0%} full", "hot"), piece(said, "", 1)]
        if not self.has_model:
            return [piece("○ no model", "mark"), piece("f2 or /load chooses one", "dim", 1)]
        pieces = [piece("○ ready", "ok"), *self._form(2)]
        last = facts.last.performance if facts.last else None
        if last and last.decode_tokens_per_s:
            speed, first = format_speed(last.decode_tokens_per_s), last.seconds_to_first_token
            pieces.append(piece(f"last {speed} tok/s · first token {first:.1f} s", "dim", 4))
        return [*pieces, *_background(facts)]

    def _form(self, rank: int) -> list[Piece]:
        """Name the schema that answers satisfy."""
        return [Piece((("dim", "schema "), ("", self.schema)), rank)] if self.schema else []


def _background(facts: "Facts") -> list[Piece]:
    """Name what the engine does besides, which a request may have to wait for."""
    served = [piece(f"⇅ {facts.serving}", "speed", 5)] if facts.serving else []
    return [*served, *([piece(printable(facts.background), "dim", 6)] if facts.background else [])]


def _waiting(lent: Lent) -> list[Piece]:
    pieces = [piece(f"⏸ {lent.job} has the memory", "mark")]
    if lent.waiting:
        pieces.append(piece(f"{lent.waiting:,} message{'s wait' if lent.waiting > 1 else ' waits'}", "", 1))
    if lent.seconds_left is not None:
        pieces.append(piece(f"~{_left(lent.seconds_left)}", "dim", 2))
    return pieces


def _is_hot(facts: "Facts", phase: str) -> bool:
    """Whether the idle row has to warn that the context is nearly full."""
    return phase == "idle" and bool(facts.context_limit) and facts.context_tokens >= HOT * facts.context_limit


def _death(reason: str) -> str:
    """Return what to do, then the reason; a long one is cut, but also stands in the conversation."""
    why = printable(" ".join(reason.split())) or "for no known reason"
    return f"✖ engine stopped: enter restarts it, nothing is lost ({why})"


def _level(share: float) -> str:
    return "hot" if share >= HOT else "warn" if share >= WARN else "ok"


def _bar(share: float, style: str, rank: int) -> Piece:
    full = min(GAUGE_CELLS, max(0, round(share * GAUGE_CELLS)))
    return Piece(((style, "━" * full), ("track", "╌" * (GAUGE_CELLS - full))), rank)


def _context(facts: "Facts", width: int) -> Piece:
    limit = facts.context_limit
    if not limit:
        return piece("")
    share = facts.context_tokens / limit
    level = _level(share)
    amount = f"{format_tokens(facts.context_tokens)}/{format_tokens(limit)}"
    if width < NARROW:
        return Piece((("dim", "ctx "), (level if level != "ok" else "", f"{share:.0%}")), 1)
    bar = _bar(share, level, 0).spans
    return Piece((("dim", "ctx "), *bar, (level if level != "ok" else "", f" {amount}")), 1)


def _memory(facts: "Facts") -> Piece:
    """Return active and cached memory against the device's limit, and a peak far above them."""
    if not facts.active_nbytes:
        return piece("")
    used = facts.active_nbytes + facts.cache_nbytes
    limit = f"/{facts.limit_nbytes / 1e9:.0f} GB" if facts.limit_nbytes else ""
    level = _level(used / facts.limit_nbytes) if facts.limit_nbytes else "ok"
    peak = f" peak {facts.peak_nbytes / 1e9:.1f}" if facts.peak_nbytes > max(1.1 * used, used + 1e8) else ""
    amount = f"{used / 1e6:.0f} MB{limit}" if used < 1e9 else f"{used / 1e9:.1f}{limit or ' GB'}"
    return Piece((("dim", "mem "), (level if level != "ok" else "", amount), ("dim", peak)), 2)


def _spark(rates: list[float]) -> str:
    top = max(rates, default=0.0)
    if top <= 0:
        return ""
    return "".join(SPARKS[min(7, int(rate / top * 7.99))] for rate in rates[-8:])


def _gigabytes(done: float, total: float) -> str:
    if total < 1e9:
        return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB"
    return f"{done / 1e9:.1f}/{total / 1e9:.1f} GB"


def _n(count: float) -> str:
    return f"{count:,.0f}"


def _left(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 100 else _clock(seconds)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
