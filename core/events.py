"""What a reply is made of: frozen values, in the order they happen, and exactly one `Done` at the end."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Notice:
    """Something the user should know that is not part of the answer."""

    text: str


@dataclass(frozen=True)
class Sync:
    """How the prompt meets what was read before: `cached` of its tokens need not be read, and why."""

    how: Literal["extend", "restore", "rebuild"]
    cached: int
    why: str


@dataclass(frozen=True)
class Prefill:
    """`done` of `total` prompt tokens have been read; `cached` of them were already in the cache."""

    done: int
    total: int
    cached: int = 0


@dataclass(frozen=True)
class Thought:
    """A piece of the reasoning; `tokens` ids were drawn since the piece before it."""

    text: str
    tokens: int = 1


@dataclass(frozen=True)
class Text:
    """A piece of the visible answer; `tokens` ids were drawn since the piece before it."""

    text: str
    tokens: int = 1


@dataclass(frozen=True)
class ToolUse:
    """A call of the tool `name`; `raw` is the reply's text that it was read from.

    The arguments are what the model wrote: neither the name nor they are checked against the tool's schema.
    `tokens` ids were drawn since the piece before it.
    """

    name: str
    arguments: dict[str, Any]
    raw: str
    tokens: int = 0


@dataclass(frozen=True)
class Performance:
    """Speeds in tokens/s, times in seconds, memory in bytes; decode speed is (n-1) / (end - first token).

    `drafts_accepted` is the share of the draft head's guesses that stood, None where there were none.

    The first token is waited for from the question on: template, tokenizer and prefill. The prefill's own
    speed counts reading alone, and `seconds_thinking` what was spent between the ids of thoughts.
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


@dataclass(frozen=True)
class Done:
    """The end of a reply, also of a cancelled or failed one.

    `prompt_tokens` = `cached_tokens` + `prefilled_tokens`, which count what was reused and what was read; a
    reply that ended while its prompt was being read has read less. `generated_tokens` counts the stop token
    and the `reasoning_tokens`; `text` is the answer without its `tool_calls`; `thinking_cut` says that the
    reply ended inside its thought; `detail` explains an error, a closed loop or a closed thought.
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
    detail: str = ""
    tool_calls: tuple[ToolUse, ...] = ()
    performance: Performance = field(default_factory=Performance)


Event = Notice | Sync | Prefill | Thought | Text | ToolUse | Done


def to_json(event: Event) -> dict[str, Any]:
    """The event as plain values with its kind under `event`, for JSON lines."""
    return {"event": type(event).__name__.lower(), **asdict(event)}
