"""The events of a reply: frozen values, in the order they happen, with exactly one `Done` at the end."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


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
class Performance:
    """Speeds in tokens/s, times in seconds, memory in bytes.

    `seconds_to_first_token` covers template, tokenizer and prefill; `prefill_tokens_per_s` covers the prefill
    alone. Decode speed is (n - 1) / (time of the last token - time of the first). `seconds_thinking` is the
    time spent on reasoning tokens. `drafts_accepted` is the share of draft tokens that were accepted, None
    without speculative decoding.
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
    """The end of a reply, including a cancelled or failed one.

    `prompt_tokens` = `cached_tokens` (reused) + `prefilled_tokens` (read), unless the reply ended during
    prefill. `generated_tokens` includes the stop token and the `reasoning_tokens`. `text` is the answer
    without its `tool_calls`. `thinking_cut` is true if the reply ended inside its reasoning, `context_full`
    if the end of the context ended it. `detail` explains an error, a full context, a repetition that was
    stopped or reasoning that was cut short.
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
    performance: Performance = field(default_factory=Performance)


Event = Notice | Sync | Prefill | Thought | Text | ToolUse | Done


def to_json(event: Event) -> dict[str, Any]:
    """Return the event as a dict for JSON; the key `event` holds its type in lower case."""
    return {"event": type(event).__name__.lower(), **asdict(event)}
