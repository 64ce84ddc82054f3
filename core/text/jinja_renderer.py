"""Renders chat templates with Jinja, set up exactly as Hugging Face transformers sets it up.

Trusted templates are rendered by importing this module. For others `jinja_sandbox` has `limited_process` run
it as a program. Imports nothing of qchat, so that it starts fast.
"""

import functools
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def compile_template(source: str) -> None:
    """Compile `source` for `render`. Raises what Jinja raises."""
    _compiled(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Render `source`. Raises what Jinja and Python raise; `explain` puts it into words."""
    return _compiled(source).render(variables)


def explain(problem: Exception) -> str:
    """Describe what a template raised on one line, which continues the name of its file.

    Keeps the template's own words where it has any.
    """
    words = problem.message if isinstance(problem, jinja2.TemplateError) else str(problem)
    line = " ".join(str(words)[:2000].split()) or type(problem).__name__
    line = line if len(line) <= 300 else line[:297] + "..."
    place = f", line {problem.lineno}" if isinstance(problem, jinja2.TemplateSyntaxError) else ""
    return f"{place}: {line}"


class _Generation(Extension):
    """`{% generation %}`, which marks text for training; only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of one request of `jinja_sandbox`, or the error. Raises MemoryError."""
    try:
        source, variables = request["source"], request["variables"]
        if variables is None:
            compile_template(source)
            return {"text": ""}
        return {"text": render(source, variables)}
    except MemoryError:
        raise
    except Exception as problem:
        return {"error": explain(problem)}
