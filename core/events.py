"""Events: the frozen values that a reply yields, and those that an engine process sends besides.

A reply yields them in the order they happen, with exactly one `Done` at the end.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
# the log probability reported for an id that has none: JSON knows no infinity
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Notice:
    """A message to the user that is not part of the answer."""

    text: str


@dataclass(frozen=True)
class Sync:
    """How the prompt reuses the cache: `cached` of its tokens are not read again; `why` gives the reason."""

    how: Literal["extend", "restore", "rebuild"]
    cached: int
    why: str


@dataclass(frozen=True)
class Prefill:
    """Prefill progress: `done` of `total` prompt tokens are in the cache, `cached` of them from before."""

    done: int
    total: int
    cached: int = 0


@dataclass(frozen=True)
class Thought:
    """A piece of the reasoning; `tokens` ids were sampled since the previous piece."""

    text: str
    tokens: int = 1


@dataclass(frozen=True)
class Text:
    """A piece of the visible answer; `tokens` ids were sampled since the previous piece."""

    text: str
    tokens: int = 1


@dataclass(frozen=True)
class ToolUse:
    """A call of the tool `name`, parsed from the text `raw` of the reply.

    Name and arguments are as the model wrote them, not checked against the tool's schema. `tokens` ids were
    sampled since the previous piece.
    """

    name: str
    arguments: dict[str, Any]
    raw: str
    tokens: int = 0


@dataclass(frozen=True)
class TokenProbability:
    """An id, the bytes of its text as numbers, and its log probability; at least `LEAST_LOGPROB`."""

    id: int
    data: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class Logprobs:
    """The probability of a drawn id of the thought or the answer, and of the likeliest in its place."""

    token: TokenProbability
    top: tuple[TokenProbability, ...]
    in_thought: bool


@dataclass(frozen=True)
class Performance:
    """Speeds in tokens/s, times in seconds, memory in bytes.

    `seconds_to_first_token` covers template, tokenizer and prefill; `prefill_tokens_per_s` covers the prefill
    alone. Decode speed is (n - 1) / (time of the last token - time of the first). `seconds_thinking` is the
    time spent on reasoning tokens. `drafts_accepted` is the share of draft tokens that were accepted,
    `drafts_by_place` the same for the first draft of a step, the second, and so on. `draft_cost` is the time
    of a step with drafts relative to one without, `draft_gain` the reply's speed relative to the speed
    without drafts. All are None or empty where no drafts were tried.
    """

    seconds_to_first_token: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    seconds: float = 0.0
    seconds_thinking: float = 0.0
    active_nbytes: int = 0
    peak_nbytes: int = 0
    cache_nbytes: int = 0
    drafts_accepted: float | None = None
    drafts_by_place: tuple[float, ...] = ()
    draft_cost: float | None = None
    draft_gain: float | None = None


@dataclass(frozen=True)
class Done:
    """The end of a reply, including a cancelled or failed one.

    `prompt_tokens` = `cached_tokens` (reused) + `prefilled_tokens` (read), unless the reply ended during
    prefill. `generated_tokens` includes the stop token and the `reasoning_tokens`. `text` is the answer
    without its `tool_calls`, `stop_string` the one that ended it. `thinking_cut` is true if the reply ended
    inside its reasoning, `context_full` if the end of the context ended it, `unread_call` if the text holds
    what began as a tool call and could not be read. `detail` explains an error, a full context, a repetition
    that was stopped or reasoning that was cut short.
    """

    finish_reason: FinishReason
    text: str = ""
    thinking: str = ""
    raw_text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    reasoning_tokens: int = 0
    generated_tokens: int = 0
    thinking_cut: bool = False
    context_full: bool = False
    detail: str = ""
    tool_calls: tuple[ToolUse, ...] = ()
    stop_string: str = ""
    unread_call: bool = False
    performance: Performance = field(default_factory=Performance)


Event = Notice | Sync | Prefill | Thought | Text | ToolUse | Logprobs | Done


@dataclass(frozen=True)
class LoadProgress:
    """Loading progress: `done_nbytes` of `total_nbytes` are in memory, now the tensor `detail`."""

    done_nbytes: int
    total_nbytes: int
    detail: str


@dataclass(frozen=True)
class Unloaded:
    """The engine dropped its model."""


@dataclass(frozen=True)
class Memory:
    """MLX's memory in bytes, and the device's limit.

    `copy_bandwidth` is in bytes per second, None until it was measured.
    """

    active_nbytes: int
    cache_nbytes: int
    peak_nbytes: int
    limit_nbytes: int
    copy_bandwidth: float | None


@dataclass(frozen=True)
class Ready:
    """The first message of an engine process: the version of its protocol and its process id."""

    protocol: int
    pid: int


@dataclass(frozen=True)
class Background:
    """Work of the engine beside all calls, in one line; empty when it has ended."""

    text: str


@dataclass(frozen=True)
class LogLine:
    """A line for the log."""

    text: str


# what a call of the chat sends, and what belongs to no call
CallEvent = Event | LoadProgress | Unloaded | Memory
Announcement = Ready | Background | LogLine

# the name of each in JSON, under the key `event`
EVENTS: Mapping[str, type[CallEvent | Announcement]] = {
    "notice": Notice,
    "sync": Sync,
    "prefill": Prefill,
    "thought": Thought,
    "text": Text,
    "tooluse": ToolUse,
    "logprobs": Logprobs,
    "done": Done,
    "load": LoadProgress,
    "unloaded": Unloaded,
    "memory": Memory,
    "ready": Ready,
    "background": Background,
    "log": LogLine,
}
_NAMES = {kind: name for name, kind in EVENTS.items()}


def to_json(event: CallEvent | Announcement) -> dict[str, Any]:
    """Return the event as a dict for JSON; the key `event` holds its name."""
    return {"event": _NAMES[type(event)], **asdict(event)}
