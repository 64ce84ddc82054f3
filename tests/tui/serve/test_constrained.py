"""Schemas of answers and arguments through the official clients: whatever the model would say, they hold."""

import json
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
    "required": ["city", "size"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "the weather", "parameters": SCHEMA}
RAIN = {"name": "rain", "parameters": {"type": "object", "properties": {"mm": {"type": "integer"}}}}
ASKED: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
LIMIT = 2000  # more than eight calls of the most tokens
HOT: Any = {"model": "any", "temperature": 1.5, "seed": 4, "max_tokens": LIMIT}
IMPOSSIBLE = {"type": "integer", "minimum": 2, "maximum": 1}


def assert_valid(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("effort", ["none", "medium"])
def test_a_chat_answers_in_the_form_of_a_schema(client: openai.OpenAI, strict: bool, effort: str):
    given = {"name": "answer", "schema": SCHEMA, "strict": strict}
    form: Any = {"type": "json_schema", "json_schema": given}
    extra = {"thinking_token_budget": 40}
    reply = client.chat.completions.create(
        messages=ASKED, response_format=form, reasoning_effort=effort, extra_body=extra, **HOT  # pyright: ignore
    )  # fmt: skip
    assert reply.choices[0].finish_reason == "stop"
    assert_valid(reply.choices[0].message.content or "")


@pytest.mark.slow
def test_a_streamed_chat_answers_in_the_form_of_a_schema(client: openai.OpenAI):
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    stream = client.chat.completions.create(
        messages=ASKED, response_format=form, reasoning_effort="none", stream=True, **HOT
    )
    assert_valid("".join(chunk.choices[0].delta.content or "" for chunk in stream))


@pytest.mark.slow
def test_a_response_answers_in_the_form_of_a_schema(client: openai.OpenAI):
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}
    reply = client.responses.create(
        model="any", input="Where?", text=form, reasoning={"effort": "none"}, temperature=1.5
    )
    assert_valid(reply.output_text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "rain"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ({"type": "function", "function": {"name": "rain"}}, {"rain"}),
    ],
    ids=["any", "weather", "rain"],
)
def test_a_required_call_satisfies_the_schema_of_its_tool(
    client: openai.OpenAI, choice: Any, names: set[str]
):
    tools: Any = [{"type": "function", "function": one} for one in (WEATHER, RAIN)]
    reply = client.chat.completions.create(
        messages=ASKED, tools=tools, tool_choice=choice, reasoning_effort="none", **HOT
    )
    calls: Any = reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls"
    for call in calls:
        assert call.function.name in names
        schema = {"weather": SCHEMA, "rain": RAIN["parameters"]}[call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), schema)


@pytest.mark.slow
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_required_use_of_a_tool_satisfies_its_schema(claude: anthropic.Anthropic, choice: Any):
    tool: Any = {"name": "weather", "input_schema": SCHEMA}
    hot = {"temperature": 1.5}
    reply = claude.messages.create(
        model="any", max_tokens=LIMIT, messages=ASKED, tools=[tool], tool_choice=choice, extra_body=hot
    )
    assert reply.stop_reason == "tool_use"
    for block in reply.content:
        assert block.type == "tool_use"
        jsonschema.validate(block.input, SCHEMA)


def test_a_message_answers_in_the_form_of_a_schema(claude: anthropic.Anthropic):
    form = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    reply = claude.messages.create(model="any", max_tokens=300, messages=ASKED, extra_body=form)
    assert reply.content[0].type == "text"
    assert_valid(reply.content[0].text)


@pytest.mark.slow
def test_a_strict_tool_is_never_called_against_its_schema(client: openai.OpenAI):
    tools: Any = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    reply = client.chat.completions.create(messages=ASKED, tools=tools, reasoning_effort="none", **HOT)
    for call in reply.choices[0].message.tool_calls or ():
        assert_valid(call.function.arguments)  # pyright: ignore


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": IMPOSSIBLE}}},
            "greater than maximum",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format is no"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "'f' cannot be promised: its arguments depend on not",
        ),
    ],
    ids=["impossible", "missing", "unsupported"],
)
def test_a_schema_that_cannot_be_promised_is_refused_in_a_sentence(
    client: openai.OpenAI, fields: dict[str, Any], words: str
):
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(**{"messages": ASKED, "model": "any", **fields})  # pyright: ignore
    assert "\n" not in caught.value.body["message"]  # pyright: ignore
