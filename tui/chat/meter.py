"""The live figures of an engine: its phase, progress, speed and memory.

Pure: events of the protocol in, one `Status` out; the clock is given. Speeds are measured over quarters of a
second.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ...core.conversation.summary import ConversationState
from ...core.events import CallEvent, Done, LoadProgress, Memory, Prefill, Text, Thought, ToolUse

Phase = Literal[
    "starting",
    "loading",
    "reading",
    "thinking",
    "answering",
    "tools",
    "idle",
    "working",
    "dead",
]
GB = 10**9
WINDOW_SECONDS = 0.25
WINDOWS = 8
# the speed shown is the mean of so many windows
RECENT = 4
# an earlier share of the whole is too small to estimate the rest from
ESTIMATE_AFTER_SECONDS = 0.3


@dataclass
class ReplyFigures:
    """The course of the reply that is being written, or was written last; empty before the first one.

    `speeds` has the tokens/s of every quarter second, `seconds_to_first_token` the time that reading took,
    None while it lasts. Of the `prompt_tokens`, `cached_tokens` were reused.
    """

    speeds: list[float] = field(default_factory=list)
    seconds_to_first_token: float | None = None
    seconds_thinking: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Status:
    """The figures of a status row; `done` of `total` are bytes while loading and tokens while reading.

    `seconds` counts from the beginning of the task. `history_of_speed` has the tokens/s of the last quarter
    seconds, oldest first; `bandwidth_share` is the share of the copy bandwidth that decoding uses.
    `draft_cost` and `draft_gain` of the last reply are relative to steps and speed without drafts. `last` is
    the end of the last reply, `reason` why the engine is dead, `background` its work beside all calls,
    `serving` the requests of a server beside the chat, `tools` the tools that run or start.
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
    last: Done | None = None
    reason: str = ""
    background: str = ""
    serving: str = ""
    tools: str = ""
    reply: ReplyFigures = field(default_factory=ReplyFigures)


class Meter:
    """Keeps `status` up to date with the events; decoding one token reads `bytes_per_token`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.status = Status()
        self.bytes_per_token = 0
        self._clock = clock
        self._bandwidth = 0.0
        self._begin = self._window = clock()
        self._drawn = self._first_done = 0

    def begin(self, phase: Phase) -> None:
        """Begin a task, whose progress and speed are not yet known."""
        status = self.status
        status.phase, status.reason = phase, ""
        status.done = status.total = status.thought_tokens = status.answer_tokens = 0
        status.seconds = status.tokens_per_s = 0.0
        status.seconds_left = status.bandwidth_share = None
        status.history_of_speed = []
        self.forget_reply()
        self._begin = self._window = self._clock()
        self._drawn = self._first_done = 0

    def forget_reply(self) -> None:
        """Forget the course of the last reply, which is not part of the conversation now shown."""
        self.status.reply = ReplyFigures()

    def end(self, phase: Phase, reason: str = "") -> None:
        """End the task; its figures stay."""
        self.status.phase, self.status.reason = phase, reason
        self.status.seconds_left = None

    def hold(self, state: ConversationState) -> None:
        """Take over the length of the context and its limit."""
        self.status.context_tokens, self.status.context_limit = state.tokens, state.context_limit

    def follow(self, event: CallEvent) -> None:
        """Count one event in."""
        status, now = self.status, self._clock()
        status.seconds = now - self._begin
        match event:
            case LoadProgress(done, total):
                self._progress("loading", done, total)
            case Prefill(done, total, cached):
                status.reply.prompt_tokens, status.reply.cached_tokens = total, cached
                self._read(done, total)
            case Thought(_, tokens):
                status.thought_tokens += tokens
                self._draw("thinking", tokens, now)
            case Text(tokens=tokens) | ToolUse(tokens=tokens):
                status.answer_tokens += tokens
                self._draw("answering", tokens, now)
            case Memory():
                self._remember(event)
            case Done():
                self._done(event)
        if status.phase in ("thinking", "answering"):
            self._measure(now)

    def _progress(self, phase: Phase, done: int, total: int) -> None:
        status = self.status
        status.phase, status.done, status.total = phase, done, total
        gained = done - self._first_done
        if gained > 0 and status.seconds >= ESTIMATE_AFTER_SECONDS:
            status.seconds_left = status.seconds / gained * max(total - done, 0)

    def _read(self, done: int, total: int) -> None:
        """Follow the prefill; tokens from the cache were not read, so they do not count for the speed."""
        if self.status.phase != "reading" or not self.status.total:
            self._first_done = done
        self._progress("reading", done, total)
        gained = done - self._first_done
        self.status.tokens_per_s = gained / self.status.seconds if gained and self.status.seconds else 0.0
        self.status.context_tokens = done

    def _draw(self, phase: Phase, tokens: int, now: float) -> None:
        status = self.status
        if status.phase not in ("thinking", "answering"):
            status.tokens_per_s, status.seconds_left = 0.0, None
            self._window, self._drawn = now, 0
            status.reply.seconds_to_first_token = status.seconds
        else:
            self._drawn += tokens
        if phase == "thinking":
            status.reply.seconds_thinking = status.seconds - (status.reply.seconds_to_first_token or 0.0)
        status.phase = phase
        status.context_tokens += tokens

    def _measure(self, now: float) -> None:
        """Close a window that is over; the first token only starts one, because prefill took its time."""
        status, length = self.status, now - self._window
        if length < WINDOW_SECONDS:
            return
        status.reply.speeds.append(self._drawn / length)
        status.history_of_speed = status.reply.speeds[-WINDOWS:]
        recent = status.history_of_speed[-RECENT:]
        status.tokens_per_s = sum(recent) / len(recent)
        if self._bandwidth and self.bytes_per_token:
            status.bandwidth_share = self.bytes_per_token * status.tokens_per_s / self._bandwidth
        self._window, self._drawn = now, 0

    def _remember(self, memory: Memory) -> None:
        status = self.status
        status.active_nbytes, status.cache_nbytes = memory.active_nbytes, memory.cache_nbytes
        status.peak_nbytes, status.limit_nbytes = memory.peak_nbytes, memory.limit_nbytes
        self._bandwidth = memory.copy_bandwidth or self._bandwidth

    def _done(self, done: Done) -> None:
        status, speed = self.status, done.performance
        status.last = done
        status.drafts_accepted = speed.drafts_accepted
        status.draft_cost, status.draft_gain = speed.draft_cost, speed.draft_gain
        status.tokens_per_s = speed.decode_tokens_per_s


def figures(done: Done) -> str:
    """Return the counts and speeds of a reply that has ended, in one line."""
    speed = done.performance
    parts = (
        f"{done.prompt_tokens:,} prompt tokens ({done.cached_tokens:,} reused)",
        f"first token after {speed.seconds_to_first_token:.2f} s",
        f"{done.generated_tokens:,} generated ({done.reasoning_tokens:,} thinking) "
        f"at {speed.decode_tokens_per_s:,.1f}/s",
        f"{speed.peak_nbytes / GB:,.2f} GB at peak",
    )
    return " · ".join(parts)
