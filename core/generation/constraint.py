"""Constraints on the ids of an answer by llguidance: JSON of a schema, and calls of given tools.

Owns the vocabulary in llguidance's form and the mask of each step. A mask is computed on the host while the
device computes the logits that it applies to. Thoughts are not constrained; they only cannot end the reply.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..calls.answer_schema import check_grammar, matcher_error, require_llguidance
from ..calls.call_grammar import NO_CALLS, CallGrammar, CallStyle
from ..calls.json_grammar import Schema, json_rule
from ..errors import UsageError
from ..machine.backend import mx
from ..text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# a small model that must call without sampling repeats its call as long as it may
MAX_FORCED_CALLS = 8


@dataclass(frozen=True)
class AnswerForm:
    """What an answer must be: JSON of `schema`, calls of `tools`, or text; None for `schema` is text.

    `forced_call` names the one tool that is called, at least once and at most MAX_FORCED_CALLS times; empty
    means any. Arguments satisfy the schemas of `strict` tools, and in a forced call of every tool.
    """

    schema: Schema | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    style: CallStyle = "xml"
    forced_call: str | None = None
    strict: Collection[str] = ()

    @property
    def is_free(self) -> bool:
        """Whether any answer will do."""
        return self.schema is None and self.forced_call is None and not self.strict

    def grammar(self, tokenizer: Tokenizer, *, after_thought: bool) -> str:
        """Return the Lark grammar of the answer. Raises UsageError for what it cannot promise."""

        def token(text: str) -> str:
            id = tokenizer.token_id(text)
            return f'"{text}"' if id is None else f"<[{id}]>"

        calls, rules, answers = CallGrammar(self.style, token), [], []
        if self.schema is not None and self.forced_call is None:
            rules.append(f"document: {json_rule(self.schema)}")
            answers.append("document")
        if tools := [t for t in self.tools if self.forced_call in (None, "", t.get("function", t)["name"])]:
            forced = self.forced_call is not None
            call = calls.add_calls(tools, checked=lambda name: forced or name in self.strict)
            more = f"{{0,{MAX_FORCED_CALLS - 1}}}" if forced else "*"
            answers.append(f'{call} ("\\n" {call}){more}')
            if self.schema is None and not forced:
                rules.append(f"TEXT: /(?s:.+)/ & {NO_CALLS}")
                answers = ["TEXT", f"TEXT? {answers[0]}"]
        begin = '"\\n\\n" ' if after_thought else ""
        return "\n".join([f"start: {begin}({' | '.join(answers)})", *rules, *calls.rules])


class Vocabulary:
    """A model's vocabulary in llguidance's form, built beside other work from the first use on."""

    def __init__(self, tokenizer: Tokenizer, size: int):
        """`size` is that of the logits. Raises UsageError without llguidance or a byte-level vocabulary."""
        require_llguidance()
        if not tokenizer.is_byte_level:
            raise UsageError("this model's replies cannot be constrained: its vocabulary is not byte-level")
        self.size, self.tokenizer = size, tokenizer
        executor = ThreadPoolExecutor(1, "vocabulary")
        self._built: Future[LLTokenizer] = executor.submit(_build, tokenizer, size)
        executor.shutdown(wait=False)

    def matcher(self, grammar: str) -> "LLMatcher":
        """Return a matcher of a new answer."""
        from llguidance import LLMatcher

        return LLMatcher(self._built.result(), grammar, log_level=0)

    @cached_property
    def stop_mask(self) -> mx.array:
        """Whether each id [V] ends the reply."""
        ids = mx.arange(self.size)
        return mx.any(ids[:, None] == mx.array(sorted(self.tokenizer.stop_ids))[None], axis=1)


class Constraint:
    """The ids that may come next in one reply."""

    def __init__(self, vocabulary: Vocabulary, form: AnswerForm, *, in_thought: bool):
        """`in_thought` means that the reply begins inside a thought. Raises UsageError for a bad schema."""
        self._vocabulary, self._in_thought, self._ended = vocabulary, in_thought, False
        self._grammar = form.grammar(vocabulary.tokenizer, after_thought=in_thought)
        check_grammar(self._grammar)

    def accept(self, token: int) -> None:
        """Continue after `token`, an id of the reply."""
        tokenizer = self._vocabulary.tokenizer
        if token in tokenizer.stop_ids:
            self._ended = True
        elif self._in_thought:
            self._in_thought = token != tokenizer.think_close_id
        elif not self._matcher.consume_token(token):
            raise RuntimeError(f"the answer left its form: {matcher_error(self._matcher.get_error())}")

    def restrict(self, logits: mx.array) -> mx.array:
        """Return logits [V] that are -inf for ids that may not come next, and otherwise the same.

        Raises RuntimeError where no id may, or the form is too complex to tell.
        """
        if self._ended:
            return logits
        if self._in_thought:
            return mx.where(self._vocabulary.stop_mask, -math.inf, logits)
        bias = self._matcher.compute_logit_bias()
        if self._matcher.is_error() or bias.count(0) == len(bias):
            problem = self._matcher.get_error() or "nothing can follow"
            raise RuntimeError(f"the answer cannot be continued in its form: {matcher_error(problem)}")
        allowed = mx.array(memoryview(bias))[: self._vocabulary.size] > 0  # pyright: ignore[reportArgumentType]
        return mx.where(allowed, logits, -math.inf)

    @cached_property
    def _matcher(self) -> "LLMatcher":
        return self._vocabulary.matcher(self._grammar)


def _build(tokenizer: Tokenizer, size: int) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, size)), eos_token=sorted(tokenizer.stop_ids))


class _Tokens:
    """A tokenizer as llguidance reads it; every added token is special, so no text contains one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int):
        self._tokenizer = tokenizer
        names = tokenizer.added_tokens
        self.eos_token_id = min(tokenizer.stop_ids)
        self.special_token_ids = sorted(names)
        known = [
            names[id].encode() if id in names else tokenizer.token_bytes(id)
            for id in range(tokenizer.vocab_size)
        ]
        self.tokens = [*known, *[b""] * (size - len(known))]

    def __call__(self, text: str | bytes) -> list[int]:
        words = text if isinstance(text, str) else text.decode(errors="replace")
        return self._tokenizer.encode(words, special=False)
