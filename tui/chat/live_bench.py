"""What each reply cost, for those who watch it: a line after every reply, and the figures of all branches.

The engine keeps the counts and speeds of every reply with its turn; here is what it does not keep, the speed
over the reply, for the replies given while this is on. Holds nothing of conversations but the one shown.
"""

from collections.abc import Sequence

from ...core.conversation.summary import ConversationState, Turn
from .meter import GB


class LiveBench:
    """The replies of a conversation on all of its branches, and the speeds over those given meanwhile."""

    def __init__(self) -> None:
        self._conversation: int | None = None
        self._known: Sequence[Turn] = ()
        self._speeds: dict[float, tuple[float, ...]] = {}

    def record(self, turn: Turn, speeds: Sequence[float]) -> None:
        """Keep the tokens/s of every quarter second of a reply."""
        self._speeds[turn.created] = tuple(speeds)

    def hold(self, conversation: int | None, replies: Sequence[Turn]) -> None:
        """Take over the replies of all branches, as the engine lists them."""
        self._conversation, self._known = conversation, replies

    def replies(self, state: ConversationState) -> list[Turn]:
        """Return the replies of the current branch, and those of others that are known, oldest first."""
        known = self._known if self._conversation == state.conversation else ()
        nodes = {turn.node for turn in state.turns}
        return sorted(
            [*state.turns, *(turn for turn in known if turn.node not in nodes)], key=lambda turn: turn.created
        )

    def speeds(self, turn: Turn) -> tuple[float, ...]:
        """Return the tokens/s over a reply; nothing unless it was given while this was on."""
        return self._speeds.get(turn.created, ())


def cached_share(turn: Turn) -> float:
    """Return the share of the prompt that was not read again."""
    stats = turn.stats
    return stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0


def live_line(turn: Turn) -> str:
    """Return the figures of a reply in one line, the speed first."""
    speed = turn.stats.performance
    parts = (
        f"{speed.decode_tokens_per_s:,.1f} tok/s",
        f"first token {speed.seconds_to_first_token:.2f} s",
        f"{cached_share(turn):.0%} of the prompt reused",
        f"{speed.peak_nbytes / GB:,.1f} GB at peak",
        *([turn.model_name] if turn.model_name else ()),
    )
    return " · ".join(parts)
