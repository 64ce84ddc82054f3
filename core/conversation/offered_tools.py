"""The tools that a session offers: checked, promised by grammars, and answered.

Knows no tool and runs none. Without llguidance nothing is promised.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..calls.answer_schema import check_grammar
from ..calls.call_grammar import call_style
from ..calls.toolcalls import ToolCallParser
from ..engine.engine import Engine
from ..errors import UsageError
from ..generation.constraint import AnswerForm
from .transcript import Output, tool_calls_of

TOOLS_IGNORED = "this model's chat template ignores tools, so the model will not see them"
UNREAD_CALL = "unread_call"  # the statistic of a reply with a call that could not be read


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return `tools` as a list of objects. Raises UsageError for one without a function name."""
    ToolCallParser(tools or ())
    return [dict(tool) for tool in tools or ()]


def tools_notices(engine: Engine, tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence about tools that the model will not see."""
    return [TOOLS_IGNORED] if tools and "tools" not in engine.template.source else []


def promised_tools(engine: Engine, tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Return the names of the tools whose calls can be held to their schemas, unseen by the user.

    A schema that no grammar expresses leaves its tool out; none remains where llguidance is not installed.
    """
    style = call_style(engine.template.source)

    def is_promised(names: Collection[str]) -> bool:
        form = AnswerForm(tools=tools, style=style, strict=names)
        try:
            check_grammar(form.grammar(engine.tokenizer, after_thought=False))
        except UsageError:
            return False
        return True

    try:
        _ = engine.vocabulary if tools else None
    except UsageError:
        return frozenset()
    names = frozenset(tool.get("function", tool)["name"] for tool in tools)
    if not names or is_promised(names):
        return names
    some = frozenset(name for name in names if is_promised({name}))
    return some if some and is_promised(some) else frozenset()


def check_results(leaf: Output | None, results: Sequence[str]) -> None:
    """Raise UsageError unless there is a result for each call of the reply `leaf`.

    One more answers a call that could not be read.
    """
    calls = len(tool_calls_of(leaf.message)) if leaf else 0
    wanted = {calls, calls + (leaf is not None and leaf.stats.get(UNREAD_CALL) is True)} - {0}
    if isinstance(results, str) or len(results) not in wanted:
        raise UsageError(f"the last reply calls {calls} tools, and {len(results)} results were given")
