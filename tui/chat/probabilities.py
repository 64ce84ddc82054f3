"""The tokens of an answer with their probabilities, as text for people, from the engine's events.

A character whose bytes are spread over several tokens belongs to the last of them. Text is made printable;
characters that cannot be seen have signs.
"""

import codecs
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...core.events import Logprobs, TokenProbability
from ..text.report import Bar, Bars, Lines, Report, Style, Table
from ..text.sanitise import printable

# the style of tokens that are at least so likely; the last one is for the others
LEVELS: tuple[tuple[float, Style, str], ...] = (
    (0.9, "", "90% and more"),
    (0.5, "good", "50%"),
    (0.2, "warn", "20%"),
    (0.0, "bad", "less"),
)
ALTERNATIVES = 8
SHOWN_ROWS = 40  # of the table; more tokens are those that were least likely
SIGNS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍", " ": "␣"})


@dataclass(frozen=True)
class Token:
    """A piece of an answer: its `text`, its probability, and the likeliest `others` in its place."""

    text: str
    probability: float
    others: tuple[tuple[str, float], ...]

    @property
    def style(self) -> Style:
        """Return the style that says how likely it was."""
        return next(style for least, style, _ in LEVELS if self.probability >= least)


@dataclass(frozen=True)
class ScoredAnswer:
    """The answer in turn `turn`, token by token."""

    turn: int
    tokens: Sequence[Token]

    @property
    def perplexity(self) -> float:
        """Return e to the mean of the negative log probabilities."""
        logs = [math.log(max(token.probability, 1e-300)) for token in self.tokens]
        return math.exp(min(-sum(logs) / len(logs), 700.0)) if logs else 1.0

    @property
    def title(self) -> str:
        return f"Answer {self.turn} · {len(self.tokens):,} tokens · perplexity {self.perplexity:,.2f}"


def tokens_of(events: Iterable[Logprobs]) -> list[Token]:
    """Return the tokens of the answer; those of the thought are left out."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [
        Token(
            printable(decoder.decode(bytes(event.token.data))),
            math.exp(event.token.logprob),
            tuple((_text(one), math.exp(one.logprob)) for one in event.top),
        )
        for event in events
        if not event.in_thought
    ]


def _text(token: TokenProbability) -> str:
    """Return the text of a token by itself; that of a special one is its number."""
    return printable(bytes(token.data).decode(errors="replace")) if token.data else f"token {token.id}"


def visible(text: str) -> str:
    """Return `text` with signs for what cannot be seen."""
    return text.translate(SIGNS) or "·"


def percent(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.001 or not probability else "<0.1%"


def alternatives(token: Token) -> Bars:
    """Return what could have come in the place of a token, the token itself marked."""
    here = [] if any(text == token.text for text, _ in token.others) else [(token.text, token.probability)]
    return Bars(
        [
            Bar(
                f"{'›' if text == token.text else ' '} {visible(text)}",
                probability,
                percent(probability),
                "accent" if text == token.text else "bar",
            )
            for text, probability in (*token.others, *here)
        ],
        top=1.0,
    )


def probabilities_report(answer: ScoredAnswer) -> Report:
    """Return the tokens as a table; of a long answer the ones that were least likely, in their order."""
    numbered = list(enumerate(answer.tokens, 1))
    shown = sorted(sorted(numbered, key=lambda one: one[1].probability)[:SHOWN_ROWS])
    rows = [
        (str(place), visible(token.text), percent(token.probability), _others(token))
        for place, token in shown
    ]
    left_out = len(numbered) - len(shown)
    rest = [Lines((f"{left_out:,} tokens that were likelier are not shown",), "dim")] if left_out else []
    table = Table(("place", "token", "probability", "instead"), rows, "><><")
    return Report(answer.title, (table, *rest) if rows else (Lines(("the answer is empty",)),))


def _others(token: Token) -> str:
    others = [(text, one) for text, one in token.others if text != token.text][:3]
    return ", ".join(f"{visible(text)} {percent(one)}" for text, one in others)
