"""What one reply may be asked for, by name: everything but the sampling values, which `sampling.py` owns.

Refuses unknown names with the nearest known one, and values out of range.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from ..errors import UsageError
from .sampling import Sampling

EFFORTS = ("none", "low", "medium", "high", "xhigh")
MAX_STOP_STRINGS = 32


@dataclass(frozen=True)
class ReplySettings:
    """How long a reply may be, how much of it may be thought, and where it stops.

    enable_thinking: None is the chat template's own default. reasoning_effort: none and low turn thinking
    off, the others on; a template that knows efforts gets the word itself. thinking_token_budget: after so
    many thought tokens the thought is closed. include_reasoning: whether thoughts are reported. stop: texts
    that end the answer. draft_tokens: how many tokens the draft head guesses ahead at most, which changes no
    reply; None is 3 on a GPU where the model has such a head, else 0.
    """

    max_new_tokens: int = 2048
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = None
    draft_tokens: int | None = None
    include_reasoning: bool = True
    report_performance: bool = True
    stop: Sequence[str] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "ReplySettings":
        """From settings by name, None for not given; sampling names are passed over. Raises UsageError."""
        _check_names(given)
        own = {field.name for field in fields(cls)}
        settings = cls(**{name: value for name, value in given.items() if name in own and value is not None})
        settings._check()
        return settings

    def _check(self) -> None:
        for name in ("max_new_tokens", "thinking_token_budget", "draft_tokens"):
            value, low = getattr(self, name), 1 if name == "max_new_tokens" else 0
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise UsageError(f"{name} is {value!r}, wanted a whole number from {low}")
        for name in ("enable_thinking", "include_reasoning", "report_performance"):
            if not isinstance(getattr(self, name), bool | None):
                raise UsageError(f"{name} is {getattr(self, name)!r}, wanted true or false")
        if self.reasoning_effort is not None and self.reasoning_effort not in EFFORTS:
            raise UsageError(f"reasoning_effort is {self.reasoning_effort!r}, wanted {', '.join(EFFORTS)}")
        texts = self.stop
        if (
            isinstance(texts, str)
            or not isinstance(texts, Sequence)
            or len(texts) > MAX_STOP_STRINGS
            or not all(isinstance(s, str) and s for s in texts)
        ):
            raise UsageError(
                f"stop is {texts!r}, wanted at most {MAX_STOP_STRINGS} texts, none of them empty"
            )


def _check_names(given: Mapping[str, Any]) -> None:
    known = [field.name for field in (*fields(ReplySettings), *fields(Sampling))]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"there is no setting {name}; {hint}")
