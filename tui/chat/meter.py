"""The live figures of an engine: what it is at, how far, how fast, and the memory it takes.

Pure: events of the protocol in, one `Status` out; the clock is given. Speeds are those of quarter seconds.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["starting", "loading", "reading", "thinking", "answering", "idle", "working", "dead"]
GB = 10**9
WINDOW_SECONDS = 0.25
WINDOWS = 8
# of them, how many the speed that is shown is the mean of
RECENT = 4
# before that, a share of the whole tells too little about the rest
ESTIMATE_AFTER_SECONDS = 0.3


@dataclass
class Status:
    """What a status row shows; `done` of `total` in bytes while loading and in tokens while reading.

    `seconds` since the phase's task began; `history_of_speed` in tokens/s, the last quarter seconds, oldest
    first; `bandwidth_share` of what the machine copies per second; `draft_cost` and `draft_gain` of the last
    reply are relative to steps and speed without drafts; `last` is the `performance` of the last
    reply, with its counts; `reason` is why the engine is dead; `background` is what it does unasked.
    """

    phase: Phase = "starting"
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    seconds_left: float | None = None
    tokens_per_s: float = 0.0
    history_of_speed: list[float] = field(default_factory=list)
    thought_tokens: int = 0
    answer_tokens: int = 0
    context_tokens: int = 0
    context_limit: int = 0
    active_nbytes: int = 0
    cache_nbytes: int = 0
    peak_nbytes: int = 0
    limit_nbytes: int = 0
    drafts_accepted: float | None = None
    draft_cost: float | None = None
    draft_gain: float | None = None
    bandwidth_share: float | None = None
    last: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    background: str = ""


class Meter:
    """Keeps `status` up to date from the events it is shown. `bytes_per_token` are read to decode one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.status = Status()
        self.bytes_per_token = 0
        self._clock = clock
        self._bandwidth = 0.0
        self._begin = self._window = clock()
        self._drawn = self._first_done = 0

    def begin(self, phase: Phase) -> None:
        """A task begins: its progress and speed are not yet known."""
        status = self.status
        status.phase, status.reason = phase, ""
        status.done = status.total = status.thought_tokens = status.answer_tokens = 0
        status.seconds = status.tokens_per_s = 0.0
        status.seconds_left = status.bandwidth_share = None
        status.history_of_speed = []
        self._begin = self._window = self._clock()
        self._drawn = self._first_done = 0

    def end(self, phase: Phase, reason: str = "") -> None:
        """The task is over; its figures stay to be read."""
        self.status.phase, self.status.reason = phase, reason
        self.status.seconds_left = None

    def hold(self, state: Mapping[str, Any]) -> None:
        """Take the size of the context from the engine's account of the conversation."""
        self.status.context_tokens = state.get("tokens", 0)
        self.status.context_limit = state.get("context_limit", 0)

    def follow(self, event: Mapping[str, Any]) -> None:
        """Count one event in."""
        status, now = self.status, self._clock()
        status.seconds = now - self._begin
        match event.get("event"):
            case "load":
                self._progress("loading", event["done_nbytes"], event["total_nbytes"])
            case "prefill":
                self._read(event)
            case "thought" | "text" | "tooluse" as kind:
                self._draw(kind, event.get("tokens", 1), now)
            case "memory":
                self._remember(event)
            case "done":
                self._done(event)
        if status.phase in ("thinking", "answering"):
            self._measure(now)

    def _progress(self, phase: Phase, done: int, total: int) -> None:
        status = self.status
        status.phase, status.done, status.total = phase, done, total
        gained = done - self._first_done
        if gained > 0 and status.seconds >= ESTIMATE_AFTER_SECONDS:
            status.seconds_left = status.seconds / gained * max(total - done, 0)

    def _read(self, event: Mapping[str, Any]) -> None:
        """What came from the cache was not read, so it says nothing about the speed."""
        if self.status.phase != "reading" or not self.status.total:
            self._first_done = event["done"]
        self._progress("reading", event["done"], event["total"])
        gained = event["done"] - self._first_done
        self.status.tokens_per_s = gained / self.status.seconds if gained and self.status.seconds else 0.0
        self.status.context_tokens = event["done"]

    def _draw(self, kind: str, tokens: int, now: float) -> None:
        status = self.status
        if status.phase not in ("thinking", "answering"):
            status.tokens_per_s, status.seconds_left = 0.0, None
            self._window, self._drawn = now, 0
        else:
            self._drawn += tokens
        status.phase = "thinking" if kind == "thought" else "answering"
        status.context_tokens += tokens
        if kind == "thought":
            status.thought_tokens += tokens
        else:
            status.answer_tokens += tokens

    def _measure(self, now: float) -> None:
        """Close the window that is over. The first token only starts it: it took the prompt's reading."""
        status, length = self.status, now - self._window
        if length < WINDOW_SECONDS:
            return
        status.history_of_speed = [*status.history_of_speed, self._drawn / length][-WINDOWS:]
        recent = status.history_of_speed[-RECENT:]
        status.tokens_per_s = sum(recent) / len(recent)
        if self._bandwidth and self.bytes_per_token:
            status.bandwidth_share = self.bytes_per_token * status.tokens_per_s / self._bandwidth
        self._window, self._drawn = now, 0

    def _remember(self, event: Mapping[str, Any]) -> None:
        status = self.status
        status.active_nbytes, status.cache_nbytes = event["active_nbytes"], event["cache_nbytes"]
        status.peak_nbytes, status.limit_nbytes = event["peak_nbytes"], event["limit_nbytes"]
        self._bandwidth = event.get("copy_bandwidth") or self._bandwidth

    def _done(self, event: Mapping[str, Any]) -> None:
        status, speed = self.status, event.get("performance", {})
        counts = ("prompt_tokens", "cached_tokens", "reasoning_tokens", "generated_tokens", "finish_reason")
        status.last = {**speed, **{name: event.get(name, 0) for name in counts}}
        status.drafts_accepted = speed.get("drafts_accepted")
        status.draft_cost, status.draft_gain = speed.get("draft_cost"), speed.get("draft_gain")
        status.tokens_per_s = speed.get("decode_tokens_per_s", 0.0)


def figures(done: Mapping[str, Any]) -> str:
    """The counts and speeds of a reply that has ended, in one line."""
    speed = done.get("performance", {})
    parts = (
        f"{done.get('prompt_tokens', 0):,} prompt tokens ({done.get('cached_tokens', 0):,} reused)",
        f"first token after {speed.get('seconds_to_first_token', 0.0):.2f} s",
        f"{done.get('generated_tokens', 0):,} generated ({done.get('reasoning_tokens', 0):,} thinking) "
        f"at {speed.get('decode_tokens_per_s', 0.0):,.1f}/s",
        f"{speed.get('peak_nbytes', 0) / GB:,.2f} GB at peak",
    )
    return " · ".join(parts)
