"""`POST /v1/completions`: raw prompts, as text or ids, whole and streamed."""

from collections.abc import Iterable, Iterator
from typing import Any

from ...core.events import CallEvent, Done, Logprobs, Prefill, Text
from .backend import Backend, Completion
from .bodies import ignored_fields, read_fields
from .endpoint import Parsed, sse
from .errors import RequestError
from .openai_input import (
    Sampling,
    error_body,
    new_id,
    now,
    require_one_choice,
    stop_setting,
    token_text,
    usage,
)

DEFAULT_TOKENS = 16  # as the interface has it


class TextBody(Sampling, kw_only=True):
    """The fields that are read."""

    prompt: str | list[Any]
    model: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: int = DEFAULT_TOKENS
    stop: str | list[str] | None = None
    logprobs: int | None = None
    n: int = 1
    user: str | None = None


class TextCompletions:
    """The dialect of completions."""

    error = staticmethod(error_body)

    def read(self, body: dict[str, Any], backend: Backend) -> Parsed:
        """Parse a body. Raises RequestError."""
        fields = read_fields(body, TextBody)
        require_one_choice(fields.n)
        settings = {**backend.settings, **fields.settings(), **stop_setting(fields.stop)}
        settings["max_new_tokens"] = fields.max_tokens
        if fields.logprobs is not None:
            settings["top_logprobs"] = fields.logprobs
        completion = Completion(prompt=_one_prompt(fields.prompt), settings=settings)
        include_usage = bool((fields.stream_options or {}).get("include_usage"))
        answer = TextAnswer(fields.model or backend.model_name, include_usage=include_usage)
        return Parsed(completion, answer, fields.stream, ignored_fields(body, TextBody), fields.user or "")


def _one_prompt(prompt: str | list[Any]) -> str | list[int]:
    """Return the prompt, which may be a list of one. Raises RequestError for several."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) or all(type(id) is int for id in prompt):
        return prompt
    raise RequestError(400, "prompt is no text and no list of token ids", param="prompt")


class TextAnswer:
    """The answer to one request."""

    def __init__(self, model: str, *, include_usage: bool):
        self._about = {"id": new_id("cmpl-"), "object": "text_completion", "created": now(), "model": model}
        self._include_usage = include_usage
        self._waiting: list[Logprobs] = []
        self._offset = 0

    def begin(self, prompt: Prefill) -> Iterable[bytes]:
        del prompt
        return ()

    def add(self, event: CallEvent) -> Iterator[bytes]:
        match event:
            case Logprobs():
                self._waiting.append(event)
            case Text(text):
                yield sse(self._choice(text, None, self._take_logprobs()))

    def end(self, done: Done) -> Iterator[bytes]:
        yield sse(self._choice("", _finish_reason(done), self._take_logprobs()))
        if self._include_usage:
            yield sse({**self._about, "choices": [], "usage": usage(done)})
        yield sse("[DONE]")

    def fail(self, error: RequestError) -> Iterator[bytes]:
        yield sse(error_body(error))

    def whole(self, done: Done, logprobs: list[Logprobs]) -> dict[str, Any]:
        self._waiting = logprobs
        return {
            **self._choice(done.text, _finish_reason(done), self._take_logprobs()),
            "usage": usage(done),
        }

    def _choice(self, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return {**self._about, "choices": [choice]}

    def _take_logprobs(self) -> dict[str, Any] | None:
        found, self._waiting = self._waiting, []
        if not found:
            return None
        texts = [token_text(event.token) for event in found]
        offsets = [self._offset + sum(map(len, texts[:place])) for place in range(len(texts))]
        self._offset += sum(map(len, texts))
        return {
            "tokens": texts,
            "token_logprobs": [event.token.logprob for event in found],
            "top_logprobs": [{token_text(one): one.logprob for one in event.top} for event in found],
            "text_offset": offsets,
        }


def _finish_reason(done: Done) -> str:
    return "length" if done.finish_reason == "length" else "stop"
