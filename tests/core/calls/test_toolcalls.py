"""Tool calls read from streaming text: any split gives the same, templates' own renderings are read back."""

import json
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qchat.core.calls.toolcalls import Piece, ToolCallParser
from qchat.core.errors import UsageError
from qchat.core.events import ToolUse, to_json
from qchat.core.text.template import BUILT_IN, Template
from tests.golden.make_templates import TEMPLATES

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "radius": {"type": "number"},
                "detailed": {"type": "boolean"},
                "units": {"type": "object"},
                "hours": {"type": ["array", "null"]},
                "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "code": {"type": ["integer", "string"]},
            },
        },
    },
}
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
# pieces that calls are made of, whole and broken
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<function=weather>", "<function=other>", "</function>", "<function="),
    *(
        "<parameter=city>",
        "<parameter=days>",
        "</parameter>",
        "<parameter=",
        "\n",
        " ",
        "3",
        "text",
        "<",
        ">",
    ),
    *('{"name": "weather", "arguments": {"days": 3}}', "{", "é😀", CALL),
]


def parsed(pieces: list[str], tools: list[dict[str, Any]] | None = None, *, cut: bool = False) -> list[Piece]:
    """The parser's answer with neighbouring texts joined, which may come in any pieces."""
    parser = ToolCallParser(tools or [])
    given = [piece for text in pieces for piece in parser.add(text)] + parser.flush(cut=cut)
    assert all(given), "no piece of text is empty"
    joined: list[Piece] = []
    for is_text, run in groupby(given, lambda piece: isinstance(piece, str)):
        neighbours = list(run)
        joined += ["".join(map(str, neighbours))] if is_text else neighbours
    return joined


def calls(text: str, tools: list[dict[str, Any]] | None = None) -> list[tuple[str, dict[str, Any]]]:
    return [(p.name, p.arguments) for p in parsed([text], tools) if isinstance(p, ToolUse)]


def one_argument(value: str, name: str) -> Any:
    return calls(CALL.replace("=city>\nParis", f"={name}>\n{value}"), [WEATHER])[0][1][name]


# --- streaming ---


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.lists(st.integers(0, 300)),
    st.booleans(),
    st.booleans(),
)
@example(CALL, list(range(len(CALL))), True, False)
@example(f"<function=weather>\n</function>{CALL}after", list(range(200)), True, False)
def test_any_split_gives_what_the_whole_gives(text: str, cuts: list[int], with_tools: bool, cut: bool):
    tools = [WEATHER] if with_tools else []
    places = [0, *sorted({place for place in cuts if place < len(text)}), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    whole = parsed([text], tools, cut=cut)
    assert parsed(pieces, tools, cut=cut) == whole
    assert "".join(piece if isinstance(piece, str) else piece.raw for piece in whole) == text


@given(st.text(alphabet="<tol_ca>fun=\n{x"))
def test_text_is_held_back_no_longer_than_a_tag_could_begin_in_it(text: str):
    parser = ToolCallParser()
    shown = ""
    for character in text.replace("<tool_call>", ""):
        shown += "".join(map(str, parser.add(character)))
    rest = "".join(map(str, parser.flush()))
    assert rest == "" or rest.startswith("<tool_call>") or "<tool_call>".startswith(rest)
    assert shown + rest == text.replace("<tool_call>", "")


def test_prose_about_the_tag_passes_at_once():
    parser = ToolCallParser([WEATHER])
    text = "The `<tool_call>` tag opens a call, `<function=other>` names one, a < b."
    assert "".join(map(str, parser.add(text))) == text


def test_a_call_comes_out_with_its_closer_and_not_before():
    parser = ToolCallParser()
    assert parser.add(f"I will look.\n\n{CALL[:-1]}") == ["I will look.\n\n"]
    assert parser.add(">\n") == [ToolUse("weather", {"city": "Paris"}, CALL), "\n"]
    assert parser.flush() == []


def test_a_call_is_an_event_in_json_lines():
    assert to_json(ToolUse("f", {"x": 1}, "raw"))["event"] == "tooluse"


# --- tolerance ---


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        CALL.removesuffix("</tool_call>"),
        CALL.replace("\n</function>", ""),
        CALL.replace("\n</parameter>", ""),
        CALL.replace("\n</parameter>\n</function>\n</tool_call>", ""),
        CALL.replace("\n", ""),
        CALL.replace("=weather>", '="weather">'),
        CALL.replace("<tool_call>\n", "<tool_call>  \n\n"),
    ],
)
def test_missing_closers_and_newlines_are_forgiven(text: str):
    assert calls(text) == [("weather", {"city": "Paris"})]


def test_several_calls_come_in_order_with_and_without_their_own_tags():
    second = CALL.replace("Paris", "Rome")
    expected = [("weather", {"city": "Paris"}), ("weather", {"city": "Rome"})]
    assert calls(f"{CALL}\n{second}") == expected
    assert calls(f"{CALL.removesuffix('</tool_call>')}{second}") == expected
    inner = second.removeprefix("<tool_call>\n").removesuffix("</tool_call>")
    assert calls(CALL.replace("</tool_call>", f"{inner}</tool_call>")) == expected


def test_a_known_function_needs_no_opening_tag_and_an_unknown_one_is_text():
    bare = CALL.removeprefix("<tool_call>\n")
    assert parsed([f"so: {bare}"], [WEATHER]) == ["so: ", ToolUse("weather", {"city": "Paris"}, bare)]
    assert calls(bare) == []
    unclosed = bare.removesuffix("\n</tool_call>")
    assert parsed([f"{unclosed}\nDone."], [WEATHER]) == [
        ToolUse("weather", {"city": "Paris"}, unclosed),
        "\nDone.",
    ]


def test_words_instead_of_parameters_are_no_arguments():
    assert calls("<tool_call><function=weather>\nin Paris\n</function></tool_call>") == [("weather", {})]


def test_a_missing_closer_does_not_swallow_the_next_parameter():
    text = CALL.replace("\n</parameter>", "\n<parameter=days>\n3\n</parameter>")
    assert calls(text) == [("weather", {"city": "Paris", "days": "3"})]


def test_a_value_may_hold_many_lines_tags_and_its_own_closer():
    value = "\n  <b>1</b>\n</parameter> is how it ends, <function=f> how it starts\n\n</function> too\n"
    assert calls(CALL.replace("Paris", value)) == [("weather", {"city": value})]


def test_the_older_json_form_is_read():
    for arguments in ('{"city": "Paris"}', json.dumps('{"city": "Paris"}')):
        text = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'
        assert parsed([text]) == [ToolUse("weather", {"city": "Paris"}, text)]


@pytest.mark.parametrize(
    "inner",
    [
        *("{", "{}", '{"name": 1}', '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": NaN}'),
        *("[" * 9, "{" * 9000, "<function=>", "<function=", "words", "<function=a\nb>"),
    ],
)
def test_what_is_no_call_stays_text(inner: str):
    text = f"<tool_call>{inner}</tool_call>"
    assert parsed([text]) == [text]


def test_a_call_in_a_reply_that_was_cut_stays_text():
    """Half of a file's content must not be written over the file."""
    half = CALL[: CALL.index("ris")]
    assert calls(half) == [("weather", {"city": "Pa"})]
    assert parsed([half], cut=True) == [half]
    assert parsed([CALL], cut=True) == parsed([CALL])


# --- words about calls ---

WIPE = {
    "name": "wipe",
    "parameters": {"properties": {"folder": {"type": "string"}, "note": {"type": "string"}}},
}
WORDS = [
    "I would write <function=wipe> for that, but it is dangerous, so I ask first.",
    "The syntax is `<function=wipe>`; shall I use it?",
    "```xml\n<function=wipe>\n```\nThat is how it begins. I did not run it.",
    "I would write <tool_call>\n<function=wipe> and then the folder.",
    "`<tool_call><function=wipe></function></tool_call>` would run it, and so would `<function=wipe>`.",
    "`<function=wipe></function>` needs a folder",
    "<tool_call>\n<function=wipe>\n```\nis how one begins,\n```\n</function> how it ends",
    "Close <function=wipe> with </function> and </tool_call>.",
    "<function=wipe> <function=wipe>\n",
    "<function=wipe>",
    '<tool_call>{"name": is how the older form begins',
    "<tool_call>\n<function=wipe>\n<parameter=",
]


@pytest.mark.parametrize("step", [1, 5, 1000])
@pytest.mark.parametrize("text", WORDS)
def test_words_about_a_call_are_text(text: str, step: int):
    assert parsed([text[i : i + step] for i in range(0, len(text), step)], [WIPE]) == [text]


@pytest.mark.parametrize("text", WORDS)
def test_a_call_after_words_about_calls_is_read(text: str):
    call = CALL.replace("weather", "wipe").replace("city", "folder")
    found = parsed([f"{text}\n\n{call}"], [WIPE])
    assert found[-1] == ToolUse("wipe", {"folder": "Paris"}, call)
    assert "".join(map(str, found[:-1])) == f"{text}\n\n"


@pytest.mark.parametrize(
    "closer", ["<parameter=folder>\nold\n</parameter>\n</function>", "</function>", "</tool_call>"]
)
def test_a_bare_opener_before_a_parameter_or_a_closer_is_a_call(closer: str):
    arguments = {"folder": "old"} if "old" in closer else {}
    assert calls(f"<function=wipe>\n{closer}", [WIPE]) == [("wipe", arguments)]


# --- tags inside a value ---

INNER = CALL.replace("weather", "other")
VALUES = [
    "use </tool_call> to end",
    "<tool_call> opens one",
    "</function> ends",
    "a\n</function>\n</tool_call>\nb",
    "</parameter> closes, <parameter=x> opens",
    "</parameter></function> is no end of it",
    "</parameter>\n</function> neither",
    f"an example:\n{INNER}\nand another:\n{INNER}",
    f"{INNER.replace('Paris', INNER)}\nnested",
    "<function=f>\n<parameter=x> is how one begins",
    "```\n<tool_call>\n```",
    "line\n<parameter=unknown>\nline",
    "</tool_call>",
    "<tool_call></tool_call>" * 5,
]


@pytest.mark.parametrize("step", [1, 7, 5000])
@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_never_cut_at_a_tag_inside_it(value: str, step: int):
    call = CALL.replace("weather", "wipe").replace("city", "note").replace("Paris", value)
    text = f"First.\n{call}\nDone."
    found = parsed([text[i : i + step] for i in range(0, len(text), step)], [WIPE])
    assert [piece for piece in found if isinstance(piece, str)] == ["First.\n", "\nDone."]
    assert [p.arguments for p in found if isinstance(p, ToolUse)] == [{"note": value}]


@pytest.mark.parametrize(
    "value", ["a </tool_call> b", "<tool_call>", 'a \\" </tool_call> \\\\', "</function>"]
)
def test_a_value_in_json_is_never_cut_at_a_tag_inside_it(value: str):
    text = f'<tool_call>\n{{"name": "wipe", "arguments": {{"note": "{value}"}}}}\n</tool_call>'
    assert parsed([*text, " after"], [WIPE]) == [
        ToolUse("wipe", {"note": json.loads(f'"{value}"')}, text),
        " after",
    ]


@pytest.mark.parametrize(
    "value", ["use </tool_call> to end", "a\n</function>\n</tool_call>\nb", "<tool_call> opens"]
)
def test_an_open_value_that_holds_tags_stays_text_at_the_end_of_the_reply(value: str):
    text = f"<tool_call>\n<function=wipe>\n<parameter=note>\n{value}"
    assert parsed([text], [WIPE]) == [text]


# --- types ---


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("city", "3", "3"),
        ("city", "null", "null"),
        ("days", "3", 3),
        ("days", " 3.0 ", 3),
        ("days", "3.5", "3.5"),
        ("days", "true", "true"),
        ("days", "soon", "soon"),
        ("days", "9" * 5000, "9" * 5000),
        ("radius", "2.5", 2.5),
        ("radius", "2", 2),
        ("radius", "NaN", "NaN"),
        ("radius", "1e999", "1e999"),
        ("detailed", "true", True),
        ("detailed", "False", False),
        ("detailed", "1", "1"),
        ("units", '{"t": ["C"]}', {"t": ["C"]}),
        ("units", "[1]", "[1]"),
        ("hours", "[1, 2]", [1, 2]),
        ("hours", "None", None),
        ("hours", "[" * 9000, "[" * 9000),
        ("limit", "null", None),
        ("limit", "7", 7),
        ("code", "7", "7"),
        ("unknown", "7", "7"),
        ("hours", "['a', True, None, (1, 2)]", ["a", True, None, [1, 2]]),
        ("hours", "['a', true]", ["a", True]),
        ("hours", "[" + "-" * 90_000 + "1]", "[" + "-" * 90_000 + "1]"),
        ("units", "{'t': 'C', 'deep': {'x': False}}", {"t": "C", "deep": {"x": False}}),
        ("units", "__import__('os')", "__import__('os')"),
        ("units", "{1, 2}", "{1, 2}"),
    ],
)
def test_values_have_the_type_that_the_schema_names_or_stay_text(name: str, text: str, value: Any):
    found = one_argument(text, name)
    assert (found, type(found)) == (value, type(value))


SCHEMAS: list[tuple[dict[str, Any], str, Any]] = [
    ({"$ref": "#/$defs/count"}, "3", 3),
    ({"$ref": "#/$defs/alias"}, "3", 3),
    ({"$ref": "#/$defs/loop"}, "3", "3"),
    ({"$ref": "#/$defs/missing"}, "3", "3"),
    ({"$ref": "https://example.org/x"}, "3", "3"),
    ({"$ref": "#/$defs/a~1b"}, "true", True),
    ({"allOf": [{"$ref": "#/$defs/count"}, {"minimum": 1}]}, "3", 3),
    ({"allOf": [{"type": ["integer", "string"]}, {"type": "integer"}]}, "3", 3),
    ({"anyOf": [{"$ref": "#/$defs/count"}, {"type": "null"}]}, "null", None),
    ({"oneOf": [{"type": "boolean"}, {"type": "array", "items": {}}]}, "[1]", [1]),
    ({"enum": [1, 2, "auto"]}, "1", 1),
    ({"enum": [1, 2, "auto"]}, "auto", "auto"),
    ({"enum": ["1", "2"]}, "1", "1"),
    ({"enum": [True, None]}, "None", None),
    ({"enum": [0, 1]}, "true", "true"),
    ({"enum": [1.5]}, "1.5", 1.5),
    ({"enum": ["a"]}, "b", "b"),
    ({"const": 7}, "7", 7),
    ({"anyOf": [{"enum": [1]}, {"const": "x"}, {"type": "null"}]}, "null", None),
    ({"anyOf": [{"enum": [1]}, {"type": "string"}]}, "x", "x"),
    ({"type": "string", "nullable": True}, "null", None),
    ({"type": ["string", "null"]}, "None", None),
    ({"type": ["string", "null"]}, "nothing", "nothing"),
    ({"type": "integer", "nullable": True}, "4", 4),
    ({"type": ["string", "array"]}, '["a"]', ["a"]),
    ({"type": ["string", "array"]}, "[a", "[a"),
    ({"properties": {"x": {}}}, "{'x': 1}", {"x": 1}),
    ({"items": {"type": "integer"}}, "[1]", [1]),
    ({"type": "INTEGER"}, "4", 4),
    ({"type": "int"}, "4", 4),
    ({"type": "dict"}, "{}", {}),
    ({"type": 3}, "4", "4"),
    ({"anyOf": 3, "allOf": {}}, "4", "4"),
    ({"enum": 3}, "4", "4"),
]


@pytest.mark.parametrize(("schema", "text", "value"), SCHEMAS)
def test_values_have_the_type_that_the_whole_schema_allows(schema: dict[str, Any], text: str, value: Any):
    definitions = {
        "count": {"type": "integer"},
        "alias": {"$ref": "#/$defs/count"},
        "loop": {"$ref": "#/$defs/loop"},
        "a/b": {"type": "boolean"},
    }
    parameters = {"type": "object", "properties": {"x": schema}, "$defs": definitions}
    referring = {"allOf": [{"$ref": "#/$defs/whole"}], "$defs": definitions | {"whole": parameters}}
    for one in (parameters, referring):
        call = CALL.replace("=city>\nParis", f"=x>\n{text}")
        found = calls(call, [{"name": "weather", "parameters": one}])[0][1]["x"]
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "tool", [{}, {"function": {}}, {"name": ""}, {"function": {"name": 3}}, {"function": "weather"}]
)
def test_a_tool_without_a_name_is_refused(tool: dict[str, Any]):
    with pytest.raises(UsageError, match="names its function"):
        ToolCallParser([tool])


@pytest.mark.parametrize("parameters", [None, [], {"properties": 3}, {"properties": {"city": 3}}])
def test_a_schema_of_no_use_leaves_values_text(parameters: Any):
    assert calls(CALL, [{"name": "weather", "parameters": parameters}]) == [("weather", {"city": "Paris"})]


# --- against the templates ---

names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
values = st.text(st.characters(exclude_characters="\r<"), max_size=40)


@settings(max_examples=25)
@given(st.lists(st.tuples(names, st.dictionaries(names, values, max_size=4)), min_size=1, max_size=3))
@pytest.mark.parametrize("source", ["built-in", "qwen3.5", "qwen3.6", "qwen3.8"])
def test_what_a_template_writes_is_read_back(source: str, made: list[tuple[str, dict[str, str]]]):
    assert calls(rendered(source, made)) == made


TEMPLATES_READ: dict[str, Template] = {}


def rendered(source: str, made: list[tuple[str, dict[str, str]]]) -> str:
    path = TEMPLATES / f"{source}.jinja"
    if source != "built-in" and not path.exists():
        pytest.skip(f"there is no {path}")
    if source not in TEMPLATES_READ:
        TEMPLATES_READ[source] = Template(BUILT_IN if source == "built-in" else path.read_text(), source)
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [{"name": name, "arguments": given} for name, given in made]},
    ]
    return TEMPLATES_READ[source].render(messages, add_generation_prompt=False)
