"""The probabilities of an answer's tokens, computed anew from its exact ids."""

from typing import TYPE_CHECKING

from ..chat.probabilities import ALTERNATIVES, ScoredAnswer, probabilities_report, tokens_of
from .base import Command, Front, complete_turn, need_model, turn_or_last

if TYPE_CHECKING:
    from ..chat.controller import Chat


class Probs(Command):
    """Show how likely each token of the last answer was, or of answer N, and what else could have come.

    The loaded model reads the answer once more, beside the conversation, which stays as it is. Its own
    distribution counts: temperature and penalties change what is drawn, not what is shown here.
    """

    names = ("probs",)
    usage = "[N]"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return complete_turn(chat, argument)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        need_model(chat)
        turn = turn_or_last(chat, argument)
        chat.scored = ScoredAnswer(turn, tokens_of(await chat.score(turn, ALTERNATIVES)))
        if not front.screen("probs"):
            front.report(probabilities_report(chat.scored))
