"""Tool calls as a Lark grammar for llguidance, so that the arguments satisfy the schemas of the tools.

Writes the form that the chat template writes and `toolcalls` reads: arguments of type string are raw text,
all others JSON. Arguments come in the order of the schema. Refuses what it cannot promise.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UsageError
from ..quoting import quote_value
from .argument_types import ArgumentType, argument_types, resolve_reference
from .json_grammar import Schema, json_rule

CallStyle = Literal["xml", "json"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
END = "\n</parameter>\n"
# raw text that cannot be taken for the end of its value, as `toolcalls` reads it
NO_TAGS = r"~/(?s:.*)(<\/parameter>|\n<parameter=|<function=)(?s:.*)/"
NO_CALLS = r"~/(?s:.*)(<tool_call>|<function=)(?s:.*)/"
# where the value may also be JSON, text must not look like it
NO_JSON = r"~/\s*[\{\[\(](?s:.*)/"
BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
DATE, TIME = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])", "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]Z"
# safe forms of formats: not all of a format, and nothing that any reader of it would refuse
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "email": r"[a-z0-9_+-]{1,32}(\.[a-z0-9_+-]{1,16})?@[a-z0-9]{1,32}(\.[a-z]{2,12}){1,3}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "ipv4": rf"({BYTE}\.){{3}}{BYTE}",
    "uri": r"[a-z][a-z0-9+.-]{0,15}:\/\/[a-zA-Z0-9.-]{1,253}(:[0-9]{1,4})?"
    r"(\/[a-zA-Z0-9._~!$&'()*+,;=:@?\/-]{0,2000})?",
}
# keywords of an argument's schema, or of all arguments, that no grammar of raw text can promise
UNREAD = frozenset(
    ("allOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies")
)
UNREAD_OF_ALL = UNREAD | {"anyOf", "oneOf", "propertyNames", "patternProperties"}


@dataclass
class CallGrammar:
    """The rules of tool calls; `token` writes a delimiter, which may be one id."""

    style: CallStyle
    token: Callable[[str], str]
    rules: list[str] = field(default_factory=list)

    def add_calls(self, tools: Sequence[Mapping[str, Any]], *, checked: Callable[[str], bool]) -> str:
        """Add a rule for one call of one of `tools`; returns its name.

        Arguments satisfy the schema of a tool that is `checked`; others only have the form of a call.
        """
        names = [self._add_tool(tool.get("function", tool), checked) for tool in tools]
        self.rules.append(f"call: {self.token(OPEN)} ({' | '.join(names)}) {self.token(CLOSE)}")
        return "call"

    def _add_tool(self, function: Mapping[str, Any], checked: Callable[[str], bool]) -> str:
        rule, name = f"tool_{len(self.rules)}", function["name"]
        schema = function.get("parameters") if checked(name) else None
        try:
            if self.style == "json":
                self.rules.append(f"{rule}: {self._json_body(name, schema)}")
            else:
                body = self._parameters(rule, schema) if checked(name) else self._any_parameters(rule)
                begin, end = _text(f"\n<function={_tag_name(name)}>\n"), _text("</function>\n")
                self.rules.append(f"{rule}: {begin} {body} {end}")
        except UsageError as problem:
            raise UsageError(f"the tool {quote_value(name)} cannot be promised: {problem}") from problem
        return rule

    def _json_body(self, name: str, schema: Any) -> str:
        whole = {"type": "object"} | dict(schema) if isinstance(schema, Mapping) else {"type": "object"}
        arguments = f"arguments_{len(self.rules)}"
        self.rules.append(f"{arguments}: {json_rule(whole)}")
        begin = f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
        return " ".join((_text(begin), arguments, _text("}\n")))

    def _any_parameters(self, rule: str) -> str:
        value = self._terminal(rule, "/(?s:.*)/")
        self.rules.append(f'{rule}_any: "<parameter=" /[^<>\\n"\' ]{{1,64}}/ ">\\n" {value}')
        return f"{rule}_any*"

    def _parameters(self, rule: str, schema: Any) -> str:
        """Return the rules of all parameters in the order of the schema."""
        whole = _resolve(schema if isinstance(schema, Mapping) else {}, schema)
        properties = _properties(whole)
        required = set(whole.get("required") or ())
        types, parts = argument_types(schema), []
        for number, (name, given) in enumerate(properties.items()):
            part = f"{rule}_{number}"
            if given is False:
                if name in required:
                    raise UsageError(f"its argument {quote_value(name)} is required and forbidden")
                continue
            value = self._value(part, given, schema, types.get(name, ArgumentType()), name)
            begin = _text(f"<parameter={_tag_name(name)}>\n")
            self.rules.append(f"{part}: {begin} {value}")
            parts.append(part if name in required else f"{part}?")
        return " ".join(parts)

    def _value(self, rule: str, schema: Schema, root: Any, kind: ArgumentType, name: str) -> str:
        """Return the symbol of a value and its closing tag."""
        schema = _resolve(schema, root)
        if kind.values is not None:
            return self._listed(schema, kind.values, name)
        types = kind.types or frozenset()
        if types and "string" not in types:
            return self._json(rule, schema, root)
        branches = list(_branches(schema, root, name))
        containers = bool(types & {"object", "array"})
        found = [
            self._terminal(f"{rule}_{n}", _raw_text(branch, name), others=[NO_JSON] if containers else [])
            for n, branch in enumerate(branches)
            if _allows(branch, "string")
        ]
        if "null" in types:
            found.append(_text("null" + END))
        found += [
            self._json(f"{rule}_{n}", branch, root)
            for n, branch in enumerate(branches)
            if branch.get("type") in ("object", "array")
        ]
        return f"({' | '.join(found)})"

    def _listed(self, schema: Mapping[str, Any], values: Sequence[Any], name: str) -> str:
        known = {"enum", "const", "type", "nullable", "anyOf", "oneOf", "title", "description", "default"}
        if unknown := set(schema) - known - {"examples", "$comment", *("$defs", "definitions")}:
            raise UsageError(f"{min(unknown)} beside a list of values, in its argument {quote_value(name)}")
        kinds = schema.get("type", [])
        wanted = {kinds} if isinstance(kinds, str) else set(kinds)
        written = [v if isinstance(v, str) else json.dumps(v) for v in values if _fits(v, wanted)]
        if not written or any(re.search("</?parameter|<function=", text) for text in written):
            raise UsageError(f"no listed value of its argument {quote_value(name)} can be written")
        return f"({' | '.join(_text(text + END) for text in written)})"

    def _json(self, rule: str, schema: Schema, root: Any) -> str:
        self.rules.append(f"{rule}_json: {json_rule(schema, root)}")
        return f"{rule}_json {_text(END)}"

    def _terminal(self, rule: str, body: str, others: Sequence[str] = ()) -> str:
        """Add raw text up to its closing tag, which belongs to it: a greedy terminal would not stop there."""
        name = f"{rule}_TEXT".upper()
        self.rules.append(f"{name}: ({' & '.join([body, NO_TAGS, *others])}) {_text(END)}")
        return name


def call_style(template: str) -> CallStyle:
    """Return how a chat template with this source writes calls."""
    return "xml" if "<function=" in template else "json"


def _properties(whole: Mapping[str, Any]) -> dict[str, Schema]:
    """Return the schemas of all arguments, those that are only required included."""
    if unread := set(whole) & UNREAD_OF_ALL:
        raise UsageError(f"its arguments depend on {min(unread)}")
    given = whole.get("properties")
    properties = dict(given) if isinstance(given, Mapping) else {}
    required = whole.get("required") or []
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise UsageError("required is not a list of names")
    others = whole.get("additionalProperties", True)
    for name in required:
        if name not in properties:
            if others not in (True, {}):
                raise UsageError(f"its argument {quote_value(name)} is required and has no schema of its own")
            properties[name] = {}
    low, high = whole.get("minProperties", 0), whole.get("maxProperties", len(properties))
    if low > len(required) or high < len(properties):
        raise UsageError("its arguments are counted")
    return properties


def _branches(schema: Mapping[str, Any], root: Any, name: str, depth: int = 0) -> Sequence[dict[str, Any]]:
    """Return the alternatives of a value that may be text, each without alternatives of its own."""
    schema = _resolve(schema, root)
    if depth > 8:
        raise UsageError(f"the alternatives of its argument {quote_value(name)} nest too deeply")
    if unread := set(schema) & UNREAD:
        raise UsageError(f"its argument {quote_value(name)} depends on {min(unread)}")
    parts = next((schema[word] for word in ("anyOf", "oneOf") if isinstance(schema.get(word), list)), None)
    if parts is not None:
        own = set(schema) - {"title", "description", "default", "examples", "nullable", "anyOf", "oneOf"}
        own -= {"$defs", "definitions"}
        found = [branch for part in parts for branch in _branches(part, root, name, depth + 1)]
        texts = [branch for branch in found if _allows(branch, "string")]
        if own or ("oneOf" in schema and len(texts) > 1):
            raise UsageError(f"the alternatives of its argument {quote_value(name)} are not apart")
        return found
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return [{**schema, "type": kind} for kind in kinds]
    return [dict(schema)]


def _raw_text(schema: Mapping[str, Any], name: str) -> str:
    """Return a Lark expression for text that satisfies the schema of a string."""
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return "(" + " | ".join(_text(value) for value in values if isinstance(value, str)) + ")"
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    if not isinstance(low, int) or not isinstance(high, int | str) or (high != "" and int(high) < low):
        raise UsageError(f"no text has the length of its argument {quote_value(name)}")
    parts = [f"/(?s:.{{{low},{high}}})/" if low or high != "" else "/(?s:.*)/"]
    if isinstance(pattern := schema.get("pattern"), str):
        parts.append(f"/{_search(pattern)}/")
    if (form := schema.get("format")) in FORMATS:
        parts.append(f"/{FORMATS[form]}/")
    return "(" + " & ".join(parts) + ")"


def _search(pattern: str) -> str:
    """Return a pattern that matches whole texts in which `pattern` is found."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
    inner = pattern[begins : len(pattern) - ends]
    inner = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", inner)  # a slash would end the expression in Lark
    anything = "(?s:.*)"
    return f"{'' if begins else anything}(?:{inner}){'' if ends else anything}"


def _allows(branch: Mapping[str, Any], kind: str) -> bool:
    return branch.get("type", kind) == kind


def _fits(value: Any, types: set[str]) -> bool:
    names = {bool: "boolean", str: "string", int: "integer", float: "number", dict: "object", list: "array"}
    name = names.get(type(value), "null")
    return not types or name in types or (name == "integer" and "number" in types)


def _resolve(schema: Any, root: Any) -> dict[str, Any]:
    """Return a schema as an object, with a reference in place of which its target stands."""
    for _ in range(16):
        if not isinstance(schema, Mapping):
            return {"enum": []} if schema is False else {}
        if "$ref" not in schema:
            return dict(schema)
        target = resolve_reference(schema["$ref"], root)
        if not isinstance(target, Mapping):
            raise UsageError(f"the reference {quote_value(schema['$ref'])} leads nowhere")
        schema = {**target, **{name: value for name, value in schema.items() if name != "$ref"}}
    raise UsageError("a reference leads to itself")


def _tag_name(name: str) -> str:
    """Return a name that a tag can hold. Raises UsageError for another."""
    if not re.fullmatch(r"[^<>\n]{1,200}", name) or name != name.strip().strip("\"'"):
        raise UsageError(f"the name {quote_value(name)} cannot be written in a tag")
    return name


def _text(text: str) -> str:
    """Return a literal of Lark."""
    return json.dumps(text.encode(errors="replace").decode(), ensure_ascii=False)
