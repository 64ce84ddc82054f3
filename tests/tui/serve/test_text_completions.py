"""`/v1/completions` with the official client."""

from typing import Any

import openai
import pytest

from qchat.core import Engine
from qchat.core.hub.catalog import BUILT_IN_MODEL

QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
PROMPT = f"{QUESTION}<|im_start|>assistant\n<think>\n\n</think>\n\n"
SETTINGS: Any = {"model": "any", "temperature": 0, "max_tokens": 20}


def test_a_raw_prompt_is_continued(client: openai.OpenAI):
    whole = client.completions.create(prompt=PROMPT, **SETTINGS)
    assert whole.choices[0].text == "The capital of France is Paris."
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, **SETTINGS))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_ids_are_a_prompt_too(client: openai.OpenAI):
    ids = Engine.load(BUILT_IN_MODEL).tokenizer.encode(PROMPT)
    for prompt in (ids, [ids], [PROMPT]):
        reply = client.completions.create(prompt=prompt, **SETTINGS)
        assert reply.choices[0].text == "The capital of France is Paris."
        assert reply.usage and reply.usage.prompt_tokens == len(ids)


def test_tags_of_thoughts_are_text(client: openai.OpenAI):
    prompt = PROMPT.partition("\n\n</think>")[0] + "\n"
    text = client.completions.create(prompt=prompt, **{**SETTINGS, "max_tokens": 200}).choices[0].text
    assert "</think>" in text


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_logprobs_have_their_tokens(client: openai.OpenAI, streams: bool):
    wanted: Any = {**SETTINGS, "prompt": PROMPT, "logprobs": 2}
    if streams:
        choices = [chunk.choices[0] for chunk in client.completions.create(stream=True, **wanted)]
    else:
        choices = client.completions.create(**wanted).choices
    found = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for one in found for token in one.tokens or []]
    offsets = [offset for one in found for offset in one.text_offset or []]
    assert "".join(tokens) == "".join(choice.text for choice in choices)
    assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]
    assert all(len(top) == 2 for one in found for top in one.top_logprobs or [])


@pytest.mark.parametrize("prompt", [["one", "two"], [1.5], [[1], [2]], [1 << 40], [], ""])
def test_a_bad_prompt_is_refused(client: openai.OpenAI, prompt: Any):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(prompt=prompt, **SETTINGS)
