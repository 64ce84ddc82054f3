"""Two answers to the same question, compared word by word."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.conversation.summary import Turn
from ...core.errors import UsageError
from ...core.worker.wire import RepliesResult
from ..text.diff import Diff
from ..text.report import Lines, Report
from .base import Command, Front, complete_turn, first_words, need_model, turn_or_last, turns, whole

if TYPE_CHECKING:
    from ..chat.controller import Chat


class DiffCommand(Command):
    """Compare the last answer, or answer N, with another one to the same question: the one before, or OTHER.

    /retry, an edited question and other models give other answers; OTHER is its place among them, as ‹ 1/3 ›
    shows it. Wide windows show both side by side.
    """

    names = ("diff",)
    usage = "[N [OTHER]]"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return complete_turn(chat, argument)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        need_model(chat)
        number, _, other = argument.partition(" ")
        turn = turns(chat)[turn_or_last(chat, number) - 1]
        found: RepliesResult = await chat.request("replies")
        answers = [one for one in found.turns if one.node in turn.siblings]
        if len(answers) < 2:
            raise UsageError(f"question {turn.number} has one answer: /retry gives another one")
        front.report(_report(answers, *_places(answers, turn, other.strip())))


def _places(answers: Sequence[Turn], turn: Turn, other: str) -> tuple[int, int]:
    """Return the places of the two answers to compare, in ascending order. Raises UsageError."""
    here = next(place for place, one in enumerate(answers) if one.node == turn.node)
    there = whole(other, "the other answer", 1, len(answers)) - 1 if other else here - 1 if here else 1
    if there == here:
        raise UsageError(f"answer {here + 1} is the one shown: say another one of the {len(answers)}")
    return min(here, there), max(here, there)


def _report(answers: Sequence[Turn], first: int, second: int) -> Report:
    old, new = answers[first], answers[second]
    names = [
        f"answer {place + 1}/{len(answers)}{f' · {one.model_name}' if one.model_name else ''}"
        for place, one in ((first, old), (second, new))
    ]
    asked = [] if old.question == new.question else [Diff(old.question, new.question, *names), Lines(("",))]
    title = f"Question {new.number} · {first_words(new.question)}"
    return Report(title, (*asked, Diff(old.answer, new.answer, *names)))
