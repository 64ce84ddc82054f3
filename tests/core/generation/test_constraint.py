"""Constrained replies: every answer satisfies its schema, and nothing else changes."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from qchat.core import Session
from qchat.core.completion.completion import Completer, CompletionRequest
from qchat.core.engine.engine import Engine
from qchat.core.errors import UsageError
from qchat.core.events import Done
from qchat.core.generation.constraint import MAX_FORCED_CALLS, AnswerForm, Constraint, Vocabulary
from qchat.core.generation.decode import Decoder
from qchat.core.generation.sampling import Sampling
from qchat.core.hub.catalog import BUILT_IN_MODEL
from qchat.core.machine.backend import mx
from qchat.core.prompt_cache.live_state import LiveState
from qchat.core.text.template import Template
from tests.random_schemas import SchemaMaker

SCHEMAS = int(os.environ.get("TESTS_SCHEMAS", "3"))
QUESTION = {"role": "user", "content": "What is the weather?"}
HOT = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "presence_penalty": 0.0}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
# a template that asks for calls in JSON, as those of Hermes do
HERMES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>a\n"
)
TINY = {"type": "integer", "minimum": 0, "maximum": 9}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(BUILT_IN_MODEL)


@pytest.fixture(scope="module")
def hermes(engine: Engine) -> Engine:
    return replace(engine, template=Template(HERMES, "hermes"))


def answer(engine: Engine, schema: dict[str, Any], **settings: Any) -> Done:
    session = Session(engine, enable_thinking=False)
    return session.send(QUESTION["content"], schema=schema, **settings)


def complete(engine: Engine, tools: Sequence[dict[str, Any]], **options: Any) -> Done:
    completer = Completer(engine, LiveState(engine, None, quantized_kv=False), 4096)
    settings = {"enable_thinking": False, "max_new_tokens": 1200} | options.pop("settings", {})
    *_, done = completer.stream(CompletionRequest([QUESTION], tools=tools, settings=settings, **options))
    assert isinstance(done, Done)
    return done


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def assert_valid(value: Any, schema: dict[str, Any]) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)


@pytest.mark.slow
def test_every_answer_does_satisfy_its_schema_at_a_high_temperature(engine: Engine):
    cut = 0
    for seed in range(SCHEMAS):
        schema = SchemaMaker(seed).document()
        done = answer(engine, schema, **HOT, seed=seed, max_new_tokens=1500)
        if done.finish_reason == "length":
            cut += 1
            continue
        assert done.finish_reason == "stop", done.detail
        assert_valid(json.loads(done.text), schema)
    assert cut <= SCHEMAS // 10


@pytest.mark.slow
@pytest.mark.parametrize("style", ["engine", "hermes"])
def test_arguments_of_a_forced_call_satisfy_the_schema_of_the_tool(style: str, request: Any):
    engine, cut = request.getfixturevalue(style), 0
    for seed in range(SCHEMAS):
        tools = [tool("first", SchemaMaker(seed).arguments()), tool("second", SchemaMaker(-seed).arguments())]
        named = {"forced_call": ("", "first", "second")[seed % 3]}
        done = complete(engine, tools, settings=HOT | {"seed": seed}, **named)
        if done.finish_reason == "length":
            cut += 1
            continue
        assert done.finish_reason == "stop", done.detail
        assert done.tool_calls
        assert not done.text.strip()
        for call in done.tool_calls:
            assert named["forced_call"] in ("", call.name)
            schemas = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
            assert_valid(call.arguments, schemas[call.name])
    assert cut <= SCHEMAS // 5


@pytest.mark.slow
def test_a_free_form_of_arguments_may_hold_tags_in_json(engine: Engine):
    """The end of a value in JSON is the end of its JSON, whatever tags its strings hold."""
    schema = {
        "type": "object",
        "properties": {
            "files": {"type": "array", "items": {"enum": ["</parameter></function></tool_call>"]}}
        },
        "required": ["files"],
    }
    schema["properties"]["files"] |= {"minItems": 1, "maxItems": 1}
    done = complete(engine, [tool("write", schema)], forced_call="write")
    assert done.tool_calls
    for call in done.tool_calls:
        assert call.arguments == {"files": ["</parameter></function></tool_call>"]}


@pytest.mark.slow
def test_a_strict_tool_may_be_called_or_not(engine: Engine):
    for seed in range(3):
        done = complete(
            engine,
            [tool("weather", CITY)],
            strict_tools=["weather"],
            settings=HOT | {"seed": seed, "max_new_tokens": 100},
        )
        for call in done.tool_calls:
            assert_valid(call.arguments, CITY)
        assert done.tool_calls or "<tool_call>" not in done.text


def test_json_object_is_any_object(engine: Engine):
    constraint = {"type": "json_object"}
    done = complete(engine, [], constraint=constraint, settings={"temperature": 0, "max_new_tokens": 400})
    assert done.finish_reason == "length" or isinstance(json.loads(done.text), dict)
    assert done.text.startswith("{")


@pytest.mark.slow
def test_a_thought_is_free_and_the_answer_after_it_is_not(engine: Engine):
    session = Session(engine, enable_thinking=True, thinking_token_budget=30)
    done = session.send(QUESTION["content"], schema=CITY, **HOT, seed=3, max_new_tokens=200)
    assert done.reasoning_tokens > 0
    assert done.thinking
    assert_valid(json.loads(done.text), CITY)


def values(logits: mx.array) -> list[float]:
    return logits.tolist()  # pyright: ignore


def test_a_thought_cannot_end_the_reply(engine: Engine):
    vocabulary = Vocabulary(engine.tokenizer, engine.config.vocab_size)
    constraint = Constraint(vocabulary, AnswerForm(TINY), in_thought=True)
    logits = mx.arange(engine.config.vocab_size).astype(mx.float32)
    allowed = constraint.restrict(logits)
    pairs = zip(values(logits), values(allowed), strict=True)
    changed = [i for i, (a, b) in enumerate(pairs) if a != b]
    assert changed == sorted(engine.tokenizer.stop_ids)


def test_allowed_logits_are_untouched_and_at_the_end_only_stop_tokens_remain(engine: Engine):
    constraint = Constraint(engine.vocabulary, AnswerForm(CITY), in_thought=False)
    logits, tokenizer = mx.random.normal([engine.config.vocab_size]), engine.tokenizer
    for id in tokenizer.encode('{"city": "Oslo", "days": 3}'):
        given, allowed = values(logits), values(constraint.restrict(logits))
        assert allowed[id] == given[id]
        assert all(b in (a, float("-inf")) for a, b in zip(given, allowed, strict=True))
        assert all(allowed[special] == float("-inf") for special in tokenizer.added_tokens)
        constraint.accept(id)
    rest = values(constraint.restrict(logits))
    assert {id for id, value in enumerate(rest) if value > float("-inf")} == tokenizer.stop_ids
    constraint.accept(min(tokenizer.stop_ids))
    assert constraint.restrict(logits).tolist() == logits.tolist()


@pytest.mark.slow
def test_a_greedy_answer_that_fits_anyway_is_the_same(engine: Engine):
    ids = engine.tokenizer.encode(
        "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )

    def greedy(constraint: Constraint | None) -> list[int]:
        cache = engine.model.new_cache()
        engine.model.hidden(ids, cache)
        decoder = Decoder(engine.model, cache, Sampling(temperature=0), constraint)
        drawn = [decoder.next()]
        while drawn[-1] not in engine.tokenizer.stop_ids and len(drawn) < 60:
            drawn.append(decoder.next())
        return drawn

    plain = greedy(None)
    text = engine.tokenizer.decode(plain)
    form = AnswerForm({"enum": [text, "x"]})
    assert text

    class Free(AnswerForm):
        def grammar(self, *_: Any, **__: Any) -> str:
            return "start: /(?s:.*)/"

    assert greedy(Constraint(engine.vocabulary, Free(), in_thought=False)) == plain
    assert greedy(Constraint(engine.vocabulary, form, in_thought=False)) != plain


@pytest.mark.slow
def test_a_cached_state_after_a_constrained_answer_equals_a_cold_one(engine: Engine):
    session = Session(engine, enable_thinking=False)
    done = session.send(QUESTION["content"], schema=CITY, **HOT, seed=1, max_new_tokens=60)
    assert mx.allclose(session.live.logits(), engine.logits(session.live.ids)[-1], rtol=1e-3, atol=1e-3)
    assert session.send("Thanks.", max_new_tokens=5).cached_tokens >= done.prompt_tokens


def accepts(engine: Engine, schema: dict[str, Any], text: str) -> bool:
    """Whether `text` is a whole answer in the form of `schema`."""
    constraint, none = Constraint(engine.vocabulary, AnswerForm(schema), in_thought=False), float("-inf")
    zeros = mx.zeros([engine.config.vocab_size])
    for id in engine.tokenizer.encode(text):
        if float(constraint.restrict(zeros)[id]) == none:
            return False
        constraint.accept(id)
    return float(constraint.restrict(zeros)[min(engine.tokenizer.stop_ids)]) > none


@pytest.mark.parametrize(
    ("low", "high", "outside", "inside"),
    [(-2.5, -2.0, "-2", "-2.25"), (0, 0.5, "0", "0.25"), (1, 1.25, "1.0", "1.125"), (-0.5, 0, "-0", "-0.25")],
)
def test_an_exclusive_bound_is_outside(engine: Engine, low: float, high: float, outside: str, inside: str):
    schema = {"type": "array", "items": {"exclusiveMinimum": low, "exclusiveMaximum": high, "type": "number"}}
    assert accepts(engine, schema, f"[{inside}]")
    assert not accepts(engine, schema, f"[{outside}]")


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"type": "integer", "minimum": 5, "maximum": 3}, r"minimum \(5\) is greater than maximum \(3\)"),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
    (
        {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]},
        "itself without end",
    ),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "itself without end"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "itself without end"),
    ({"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]}, "itself without end"),
    ({"$ref": "#/$defs/nowhere"}, "does not exist"),
    ({"type": "string", "pattern": "^ab$", "minLength": 5}, "Regex is empty"),
    ({"type": "string", "pattern": "("}, "regex parse error"),
    ({"not": {"type": "string"}}, "Unimplemented keys"),
    ({"enum": []}, "anyOf is empty"),
]


@pytest.mark.parametrize(("schema", "words"), IMPOSSIBLE)
def test_a_schema_that_nothing_satisfies_is_refused_in_a_sentence(
    engine: Engine, schema: dict[str, Any], words: str
):
    with pytest.raises(UsageError, match=words) as caught:
        answer(engine, schema)
    assert "\n" not in str(caught.value)
    assert "%json" not in str(caught.value)


def test_a_schema_that_may_end_is_not_refused(engine: Engine):
    tree = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "n": TINY},
        "required": ["next", "n"],
        "additionalProperties": False,
    }
    constraint = Constraint(engine.vocabulary, AnswerForm(tree), in_thought=False)
    for id in engine.tokenizer.encode('{"next": {"next": null, "n": 1}, "n": 2}'):
        constraint.accept(id)
    assert mx.isfinite(constraint.restrict(mx.zeros([engine.config.vocab_size]))).sum() == 2


REFUSED_TOOLS: list[tuple[dict[str, Any], str]] = [
    ({"properties": {"a": {"type": "integer", "minimum": 3, "maximum": 1}}}, "greater than maximum"),
    ({"properties": {"a": False}, "required": ["a"]}, "'a' is required and forbidden"),
    ({"properties": {"a>b": {}}}, "cannot be written in a tag"),
    ({"anyOf": [{"required": ["a"]}]}, "depend on anyOf"),
    ({"properties": {"a": {"type": "string", "not": {}}}}, "'a' depends on not"),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "leads nowhere"),
    ({"properties": {"a": {"type": "string", "minLength": 4, "maxLength": 2}}}, "no text has the length"),
    ({"properties": {"a": {"type": "string", "pattern": "("}}}, "cannot be constrained"),
    ({"required": ["a"], "additionalProperties": False}, "no schema of its own"),
    ({"minProperties": 3}, "counted"),
]


@pytest.mark.parametrize(("parameters", "words"), REFUSED_TOOLS)
def test_arguments_that_cannot_be_promised_are_refused_in_a_sentence(
    engine: Engine, parameters: dict[str, Any], words: str
):
    with pytest.raises(UsageError, match=words) as caught:
        complete(engine, [tool("look", parameters)], forced_call="look")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"type": "object", "properties": {}}])
def test_a_tool_without_a_schema_can_be_forced(engine: Engine, parameters: Any):
    done = complete(
        engine,
        [tool("look", parameters)],
        forced_call="look",
        settings={"temperature": 0, "max_new_tokens": 60},
    )
    assert {call.name for call in done.tool_calls} == {"look"}


def test_without_llguidance_one_sentence_names_the_extra(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = replace(engine)
    with pytest.raises(UsageError, match="extra `structured`"):
        answer(fresh, CITY)
    assert Session(fresh).send("Hello", max_new_tokens=3).finish_reason == "length"


def test_a_forced_call_ends_after_a_bounded_number_of_calls(engine: Engine):
    """A model that samples nothing repeats its call as long as the grammar lets it."""
    form = AnswerForm(tools=[tool("look", {"type": "object", "properties": {}})], forced_call="look")
    call = engine.tokenizer.encode("<tool_call>\n<function=look>\n</function>\n</tool_call>")
    more = [*engine.tokenizer.encode("\n"), *call]
    matcher = engine.vocabulary.matcher(form.grammar(engine.tokenizer, after_thought=False))
    most = call + more * (MAX_FORCED_CALLS - 1)
    assert matcher.try_consume_tokens(most) == len(most)
    assert matcher.is_accepting()
    assert matcher.try_consume_tokens(more) == 0
