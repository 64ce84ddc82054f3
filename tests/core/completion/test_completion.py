"""Stateless replies: exact ids of replies that come back, caches that equal cold runs, logprobs, cancels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qchat.core import Session
from qchat.core.completion.completion import Completer, CompletionRequest
from qchat.core.engine.engine import Engine
from qchat.core.errors import ContextLengthExceeded, TemplateError, UsageError
from qchat.core.events import Done, Event, Logprobs, Prefill, Sync, Text, Thought, ToolUse
from qchat.core.generation.decode import Decoder
from qchat.core.hub.catalog import BUILT_IN_MODEL
from qchat.core.machine.backend import mx
from qchat.core.prompt_cache.live_state import LiveState
from qchat.core.text.template import BUILT_IN, Template
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms
from tests.core.conversation.test_session_tools import CALL, LOOK, TOOLS, script

GREEDY = {"temperature": 0, "max_new_tokens": 60}
SYSTEM = {"role": "system", "content": "Be brief."}
PARIS = {"role": "user", "content": "What is the capital of France?"}
BERLIN = {"role": "user", "content": "And of Germany?"}


@pytest.fixture(scope="module")
def trained() -> Engine:
    return Engine.load(BUILT_IN_MODEL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return replace(Engine.load(folder), template=Template(BUILT_IN, "built-in"))


def completer(engine: Engine, limit: int = 2048) -> Completer:
    return Completer(engine, LiveState(engine, None, quantized_kv=False), limit)


def complete(replier: Completer, messages: Sequence[Any], **options: Any) -> list[Event]:
    settings = GREEDY | options.pop("settings", {})
    return list(replier.stream(CompletionRequest(messages, settings=settings, **options)))


def done_of(events: Sequence[Event]) -> Done:
    *others, done = events
    assert isinstance(done, Done)
    assert not any(isinstance(event, Done) for event in others)
    return done


def answer(done: Done, *, thought: bool = False) -> dict[str, Any]:
    """The message that a client keeps of a reply."""
    calls = [
        {"id": f"call_{n}", "function": {"name": call.name, "arguments": call.arguments}}
        for n, call in enumerate(done.tool_calls)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": done.text}
    message |= {"reasoning_content": done.thinking} if thought else {}
    return message | ({"tool_calls": calls} if calls else {})


def cold_logits(engine: Engine, ids: Sequence[int]) -> mx.array:
    return engine.logits(ids)[-1]


def assert_equals_cold(replier: Completer) -> None:
    live = replier.live
    assert len(live.ids) == live.cache.length
    assert relative_rms(live.logits(), cold_logits(replier.engine, live.ids)) < 2e-5


@pytest.mark.slow
def test_a_stateless_reply_is_that_of_a_session(trained: Engine):
    done = done_of(complete(completer(trained), [SYSTEM, PARIS]))
    reply = Session(trained, "Be brief.").send(PARIS["content"], **GREEDY)
    assert (done.text, done.thinking) == (reply.text, reply.thinking)
    assert "Paris" in done.text
    assert (done.prompt_tokens, done.generated_tokens) == (reply.prompt_tokens, reply.generated_tokens)
    assert done.reasoning_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("thought", [True, False], ids=["with its thought", "without it"])
def test_a_reply_that_comes_back_is_read_from_the_cache_to_its_last_id(trained: Engine, thought: bool):
    """Chat clients drop the thought; without the exact ids the next turn would diverge inside it."""
    replier, messages, read = completer(trained), [SYSTEM, PARIS], 0
    for turn in range(3):
        done = done_of(complete(replier, messages))
        assert done.cached_tokens == read
        read = done.prompt_tokens + done.generated_tokens
        assert_equals_cold(replier)
        messages = [*messages, answer(done, thought=thought), {"role": "user", "content": f"And {turn}?"}]


def test_text_that_does_not_encode_to_its_ids_comes_back_exactly(tiny: Engine):
    """A random model's bytes are mostly no UTF-8: their text has another encoding."""
    replier = completer(tiny, 4096)
    settings = {"enable_thinking": False, "temperature": 1.0, "seed": 7, "max_new_tokens": 40}
    first = done_of(complete(replier, [PARIS], settings=settings))
    ids = list(replier.live.ids)
    assert tiny.tokenizer.encode(first.text, special=False) != ids[first.prompt_tokens :]
    second = done_of(complete(replier, [PARIS, answer(first), BERLIN], settings=settings))
    assert replier.live.ids[: len(ids)] == ids
    assert second.cached_tokens == len(ids)
    assert_equals_cold(replier)


@pytest.mark.slow
def test_what_requests_have_in_common_is_read_once(trained: Engine):
    """A sub-agent with the same system prompt, and an edited question, read no more than their own words."""
    system = {"role": "system", "content": "You answer questions about capitals. " * 20}
    replier = completer(trained)
    first = done_of(complete(replier, [system, PARIS]))
    edited = done_of(complete(replier, [system, PARIS, answer(first), BERLIN]))
    sub_agent = done_of(complete(replier, [system, {"role": "user", "content": "Name a river."}]))
    again = done_of(complete(replier, [system, PARIS, answer(first), {"role": "user", "content": "Why?"}]))
    size = trained.tokenizer.encode(system["content"])
    assert sub_agent.cached_tokens >= len(size)
    assert again.cached_tokens == edited.cached_tokens == first.prompt_tokens + first.generated_tokens
    assert_equals_cold(replier)


@pytest.mark.slow
def test_an_edited_reply_is_no_longer_the_one_that_was_generated(trained: Engine):
    replier = completer(trained)
    first = done_of(complete(replier, [SYSTEM, PARIS]))
    edited = {**answer(first), "content": "It is Lyon."}
    events = complete(replier, [SYSTEM, PARIS, edited, BERLIN])
    assert done_of(events).cached_tokens < first.prompt_tokens
    assert "It is Lyon." in trained.tokenizer.decode(replier.live.ids)


@pytest.mark.slow
def test_calls_and_their_results_come_back_exactly(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    script(monkeypatch, tiny, LOOK, "Done.\n</think>\n\nSunny in both.<|im_end|>")
    replier = completer(tiny, 4096)
    settings = {"enable_thinking": True, "max_new_tokens": 400}
    first = done_of(complete(replier, [PARIS], tools=TOOLS, settings=settings))
    assert [call.arguments["city"] for call in first.tool_calls] == ["Paris", "Rome"]
    results = [
        {"role": "tool", "tool_call_id": f"call_{n}", "content": text} for n, text in ((1, "dry"), (0, "wet"))
    ]
    second = done_of(complete(replier, [PARIS, answer(first), *results], tools=TOOLS, settings=settings))
    assert second.cached_tokens == first.prompt_tokens + first.generated_tokens
    assert second.text == "Sunny in both."
    read = tiny.tokenizer.decode(replier.live.ids)
    assert read.index("wet") < read.index("dry")
    assert_equals_cold(replier)


def test_without_parallel_calls_nothing_comes_after_the_first(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    script(monkeypatch, tiny, LOOK, "Done.\n</think>\n\nSunny.<|im_end|>")
    replier = completer(tiny, 4096)
    settings = {"enable_thinking": True, "max_new_tokens": 400}
    asked: Any = {"tools": TOOLS, "parallel_calls": False, "settings": settings}
    first = done_of(complete(replier, [PARIS], **asked))
    assert ([call.arguments["city"] for call in first.tool_calls], first.text.strip()) == (
        ["Paris"],
        "One moment.",
    )
    assert (first.finish_reason, first.unread_call) == ("stop", False)
    assert first.raw_text.endswith("</tool_call>")
    result = {"role": "tool", "tool_call_id": "call_0", "content": "dry"}
    second = done_of(complete(replier, [PARIS, answer(first), result], **asked))
    assert second.cached_tokens == first.prompt_tokens + first.generated_tokens
    assert_equals_cold(replier)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weather", ""], ids=["one tool", "any tool"])
def test_a_forced_call_begins_the_answer_after_the_thought(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch, name: str
):
    body = CALL.format("Rome").split("<function=weather>\n" if name else "<function=")[1]
    thought = tiny.tokenizer.encode("So.\n</think>")
    forced = tiny.tokenizer.encode("\n\n<tool_call>\n<function=" + (f"{name}>\n" if name else ""))
    rest = tiny.tokenizer.encode(f"{body}<|im_end|>")
    place, real = iter([*thought, *[None] * len(forced), *rest]), Decoder.next

    def say(decoder: Decoder) -> int:
        token = next(place)
        if token is not None:
            decoder.force(token)
        return real(decoder)

    monkeypatch.setattr(Decoder, "next", say)
    settings = {"enable_thinking": True, "max_new_tokens": 200}
    done = done_of(complete(completer(tiny), [PARIS], tools=TOOLS, forced_call=name, settings=settings))
    assert [(call.name, call.arguments) for call in done.tool_calls] == [
        ("weather", {"city": "Rome", "days": 3})
    ]


@pytest.mark.parametrize("name", ["rain", "", "weather"])
def test_a_forced_call_needs_its_tool(tiny: Engine, name: str):
    with pytest.raises(UsageError, match="none of the given tools"):
        complete(completer(tiny), [PARIS], forced_call=name, tools=TOOLS if name == "rain" else ())


@pytest.mark.slow
def test_the_words_at_the_end_are_continued_without_a_thought(trained: Engine):
    replier = completer(trained)
    begun = {"role": "assistant", "content": "The capital of France is"}
    done = done_of(complete(replier, [SYSTEM, PARIS, begun]))
    assert "Paris" in done.text
    assert done.thinking == ""
    whole = {"role": "assistant", "content": begun["content"] + done.text}
    after = done_of(complete(replier, [SYSTEM, PARIS, whole, BERLIN]))
    assert after.cached_tokens == done.prompt_tokens + done.generated_tokens
    assert_equals_cold(replier)


@pytest.mark.slow
def test_a_raw_prompt_is_continued_as_it_is(trained: Engine):
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    replier = completer(trained)
    by_text = list(replier.stream(CompletionRequest(prompt=prompt, settings=GREEDY)))
    ids = trained.tokenizer.encode(prompt)
    by_ids = list(replier.stream(CompletionRequest(prompt=ids, settings=GREEDY)))
    done = done_of(by_text)
    assert done_of(by_ids).text == done.text
    assert "</think>" in done.text
    assert not any(isinstance(event, Thought | ToolUse) for event in by_text)
    assert "".join(event.text for event in by_text if isinstance(event, Text)) == done.text


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3], ids=["without drafts", "with drafts"])
def test_logprobs_are_those_of_the_models_logits(trained: Engine, drafts: int):
    replier = completer(trained)
    settings = {"top_logprobs": 3, "draft_tokens": drafts, "temperature": 0.7, "seed": 3}
    events = complete(replier, [SYSTEM, PARIS], settings=settings)
    found = [event for event in events if isinstance(event, Logprobs)]
    done, ids = done_of(events), replier.live.ids
    logits = trained.logits(ids)
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    drawn = [
        (place, id)
        for place, id in enumerate(ids)
        if place >= done.prompt_tokens
        and id not in {*trained.tokenizer.stop_ids, trained.tokenizer.think_close_id}
    ]
    assert [id for _, id in drawn] == [event.token.id for event in found]
    for (place, id), event in zip(drawn, found, strict=True):
        row = expected[place - 1]
        assert event.token.logprob == pytest.approx(float(row[id]), abs=2e-4)
        best = [int(id) for id in mx.argsort(-row)[:3]]
        assert [one.id for one in event.top] == best
        assert [one.logprob for one in event.top] == pytest.approx([float(row[i]) for i in best], abs=2e-4)
    answered = bytes(b for event in found if not event.in_thought for b in event.token.data)
    assert answered.decode().strip() == done.text
    assert sum(event.in_thought for event in found) == done.reasoning_tokens


@pytest.mark.slow
def test_a_cancel_ends_within_one_token_and_keeps_what_was_read(trained: Engine):
    replier = completer(trained)
    events: list[Event] = []
    for event in replier.stream(CompletionRequest([SYSTEM, PARIS], settings=GREEDY)):
        events.append(event)
        if isinstance(event, Thought) and sum(isinstance(e, Thought) for e in events) == 5:
            replier.cancel()
    done = done_of(events)
    assert done.finish_reason == "cancelled"
    assert done.generated_tokens <= 7
    repeated = complete(replier, [SYSTEM, PARIS])
    assert done_of(repeated).cached_tokens == done.prompt_tokens
    assert_equals_cold(replier)


@pytest.mark.slow
def test_a_prompt_that_was_cut_short_is_continued_where_it_ended(trained: Engine):
    replier = completer(trained)
    long = {"role": "user", "content": "Tell me of capitals. " * 150}
    stream = replier.stream(CompletionRequest([SYSTEM, long], settings=GREEDY))
    for event in stream:
        if isinstance(event, Prefill) and event.done:
            replier.cancel()
    read = len(replier.live.ids)
    complete(replier, [SYSTEM, PARIS])
    assert (
        done_of(complete(replier, [SYSTEM, long], settings={"max_new_tokens": 1})).cached_tokens >= read > 0
    )


@pytest.mark.slow
def test_an_abandoned_stream_leaves_a_state_that_equals_a_cold_run(trained: Engine):
    replier = completer(trained)
    stream = replier.stream(CompletionRequest([SYSTEM, PARIS], settings=GREEDY))
    for event in stream:
        if isinstance(event, Thought):
            break
    stream.close()
    assert_equals_cold(replier)
    assert done_of(complete(replier, [SYSTEM, PARIS])).finish_reason == "stop"


@pytest.mark.slow
def test_counting_tells_the_length_of_the_prompt(trained: Engine):
    replier = completer(trained)
    request = CompletionRequest([SYSTEM, PARIS], settings=GREEDY)
    counted = replier.count(request)
    assert replier.live.ids == []
    assert counted == done_of(list(replier.stream(request))).prompt_tokens


def test_tools_are_part_of_what_is_cached(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    script(monkeypatch, tiny, "</think>\n\nNo.<|im_end|>", "</think>\n\nNo.<|im_end|>")
    replier = completer(tiny, 4096)
    first = complete(replier, [PARIS], tools=TOOLS)
    other = complete(replier, [PARIS])
    assert isinstance(other[0], Sync)
    assert other[0].cached == 0
    assert done_of(first).prompt_tokens > done_of(other).prompt_tokens


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (CompletionRequest([]), TemplateError, "no messages"),
        (CompletionRequest([{"role": "robot", "content": "x"}]), TemplateError, "message 1: role is 'robot'"),
        (CompletionRequest([{"role": "user", "content": 5}]), TemplateError, "message 1: content must be"),
        (CompletionRequest([PARIS], tools=[{"type": "function"}]), UsageError, "names its function"),
        (CompletionRequest([PARIS], settings={"temperature": -1}), UsageError, "temperature is -1"),
        (CompletionRequest([PARIS], settings={"top_logprobs": 21}), UsageError, "wanted at most 20"),
        (CompletionRequest([PARIS], settings={"top_logprobs": True}), UsageError, "wanted a whole number"),
        (CompletionRequest(prompt=[1, 1 << 40]), UsageError, "the prompt has the id 1099511627776"),
        (CompletionRequest(prompt=""), TemplateError, "empty prompt"),
        (
            CompletionRequest([PARIS], constraint={"type": "json_schema", "schema": {"type": "name"}}),
            UsageError,
            "cannot be constrained.*Invalid type: name",
        ),
        (
            CompletionRequest([PARIS], constraint={"type": "json"}),
            UsageError,
            "wanted json_object",
        ),
        (CompletionRequest([PARIS], tools=TOOLS, strict_tools=["rain"]), UsageError, "'rain' is strict, but"),
        (
            CompletionRequest([PARIS, {"role": "user", "content": "x " * 3000}]),
            ContextLengthExceeded,
            "2,048",
        ),
        (CompletionRequest(prompt="x " * 3000), ContextLengthExceeded, "2,048"),
    ],
)
def test_a_bad_request_is_one_sentence_and_nothing_is_read(
    trained: Engine, request_: CompletionRequest, error: type[Exception], words: str
):
    replier = completer(trained)
    with pytest.raises(error, match=words):
        replier.stream(request_)
    assert replier.live.ids == []
