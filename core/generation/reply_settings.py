"""Settings of one reply: limits, thinking, stop strings and sampling values.

Parsed once a reply. Refuses unknown names, suggesting the nearest known one, and values out of range.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from ..errors import UsageError
from ..quoting import quote_value
from .sampling import Sampling, resolve_sampling

EFFORTS = ("none", "low", "medium", "high", "xhigh")
MAX_STOP_STRINGS = 32
MAX_TOP_LOGPROBS = 20
SAMPLING_NAMES = tuple(f.name for f in fields(Sampling))


@dataclass(frozen=True)
class ReplySettings:
    """Limits on a reply's length and thinking, and how it is sampled.

    enable_thinking: None means the chat template's default. reasoning_effort: `none` and `low` turn thinking
    off, the others turn it on; a template with its own efforts receives the word itself.
    thinking_token_budget: closes the thought after this many tokens. include_reasoning: reports thoughts as
    events. stop_loops: closes a thought, or stops an answer, that repeats itself endlessly. stop: strings
    that end the answer. draft_tokens: the most drafts in one step of speculative decoding; 0 means none, None
    as many as pay, unless QCHAT_DRAFTING is `off`. At temperature 0 and with a seed drafts change no id of a
    reply.
    schema: a JSON schema that the answer satisfies, after any thought; needs the extra `structured`.
    top_logprobs: reports the log probability of each id, and so many of the likeliest; None reports none.
    sampling: the given sampling values by name. given: all settings as given.
    """

    max_new_tokens: int = 2048
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = None
    draft_tokens: int | None = None
    top_logprobs: int | None = None
    include_reasoning: bool = True
    report_performance: bool = True
    stop_loops: bool = True
    stop: Sequence[str] = ()
    schema: Mapping[str, Any] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "ReplySettings":
        """Parse settings by name; None means not given. Raises UsageError."""
        _check_names(given)
        present = {name: value for name, value in given.items() if value is not None}
        sampling = {name: present.pop(name) for name in SAMPLING_NAMES if name in present}
        settings = cls(**present, sampling=sampling, given=given)
        settings._check()
        Sampling(**sampling).validate()
        return settings

    def resolve_sampling(self, generation_config: Mapping[str, Any], *, thinking: bool) -> Sampling:
        """Fill in the model's sampling defaults. Raises ConfigError for an invalid one."""
        return resolve_sampling(self.sampling, generation_config, thinking)

    def template_switches(self, *, knows_efforts: bool, thinks_by_default: bool) -> dict[str, Any]:
        """Return the chat template's variables for these settings: whether to think, and how hard."""
        effort, requested = self.reasoning_effort, self.enable_thinking
        if effort is None:
            return {"enable_thinking": thinks_by_default if requested is None else requested}
        if knows_efforts and effort != "none":
            word = "xhigh" if effort == "high" else effort
            return {"enable_thinking": requested is not False, "reasoning_effort": word}
        return {"enable_thinking": (effort not in ("none", "low")) if requested is None else requested}

    def _check(self) -> None:
        for name in ("max_new_tokens", "thinking_token_budget", "draft_tokens", "top_logprobs"):
            value, low = getattr(self, name), 1 if name == "max_new_tokens" else 0
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise UsageError(f"{name} is {value!r}, wanted a whole number from {low}")
        if (self.top_logprobs or 0) > MAX_TOP_LOGPROBS:
            raise UsageError(f"top_logprobs is {self.top_logprobs!r}, wanted at most {MAX_TOP_LOGPROBS}")
        for name in ("enable_thinking", "include_reasoning", "report_performance", "stop_loops"):
            if not isinstance(getattr(self, name), bool | None):
                raise UsageError(f"{name} is {getattr(self, name)!r}, wanted true or false")
        if self.reasoning_effort is not None and self.reasoning_effort not in EFFORTS:
            raise UsageError(f"reasoning_effort is {self.reasoning_effort!r}, wanted {', '.join(EFFORTS)}")
        if not isinstance(self.schema, Mapping | None):
            raise UsageError(f"schema is {quote_value(self.schema)}, wanted a JSON schema as an object")
        texts = self.stop
        if (
            isinstance(texts, str)
            or not isinstance(texts, Sequence)
            or len(texts) > MAX_STOP_STRINGS
            or not all(isinstance(s, str) and s for s in texts)
        ):
            raise UsageError(
                f"stop is {texts!r}, wanted at most {MAX_STOP_STRINGS} strings, none of them empty"
            )


def _check_names(given: Mapping[str, Any]) -> None:
    own = [f.name for f in fields(ReplySettings) if f.name not in ("sampling", "given")]
    known = [*own, *SAMPLING_NAMES]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known settings are {', '.join(known)}"
            raise UsageError(f"there is no setting {name}; {hint}")
