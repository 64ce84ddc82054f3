"""Chat templates as programs that others wrote: compiled and rendered, with an error in one sentence.

Published templates and qchat's own, known by their hash, are rendered in this process, all others in one with
a budget of CPU time and memory. In both Jinja's sandbox keeps a template from Python.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TemplateError
from .limited_process import LimitedProcess

TRUSTED = frozenset(
    (
        "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80",  # Qwen3.5 up to 4B
        "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715",  # Qwen3.5
        "55d4931433fe502b794226ee7f4d206a6bdd436ac9f80eb7d8ebb4c639f9ea0c",  # Qwen3.6
        "514d5304fcac63bda60e6faf860d5657010cf43cbc4c633c8bf678ee184e7a37",  # Qwen3.8
        "71feee027f446a3e8b20dc8d5b2991b20de83b64b6def33119a5fd4d02a42d30",  # qchat's own
    )
)
process = LimitedProcess(
    Path(__file__).with_name("jinja_renderer.py"),
    "renders templates",
    exceeded=": stopped, it takes more time or memory than a conversation of this size needs",
)


class Program:
    """A compiled template; `origin` names it in errors. Threads may share it and take turns.

    `trusted` means that it is rendered in this process.
    """

    def __init__(self, source: str, origin: str):
        """Compile `source`. Raises TemplateError, with the line for bad syntax."""
        self.origin, self._source = origin, source
        self.trusted = hashlib.sha256(source.encode("utf-8", "replace")).hexdigest() in TRUSTED
        if not self.trusted:
            self._render_apart(None)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render with `variables`, plain JSON values. Raises TemplateError with the template's own words."""
        return self._render_here(variables) if self.trusted else self._render_apart(variables)

    def _render_here(self, variables: Mapping[str, Any]) -> str:
        from .jinja_renderer import explain, render  # an untrusted template does without importing Jinja here

        try:
            return render(self._source, variables)
        except Exception as problem:
            raise TemplateError(f"{self.origin}{explain(problem)}") from problem

    def _render_apart(self, variables: Mapping[str, Any] | None) -> str:
        """Render in the other process; None compiles only."""
        try:
            inputs = json.dumps({"source": self._source, "variables": variables}, default=_plain)
        except (TypeError, ValueError, RecursionError) as problem:
            raise TemplateError(
                f"{self.origin}: the messages cannot be written as JSON: {problem}"
            ) from problem
        reply = process.request(inputs)
        if "error" in reply:
            raise TemplateError(f"{self.origin}{reply['error']}")
        return reply["text"]


def _plain(value: Any) -> Any:
    """Return a mapping or a sequence of any kind as one that JSON knows. Raises TypeError for others."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"found a {type(value).__name__}")
