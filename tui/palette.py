"""The command palette's entries, from the same table as the slash commands."""

from collections.abc import Callable
from functools import partial

from textual.command import DiscoveryHit, Hit, Hits, Provider

from .commands import COMMANDS
from .commands.base import Command


class Commands(Provider):
    """Runs a command, or begins its line in the prompt where it needs words."""

    async def discover(self) -> Hits:
        for command in COMMANDS:
            yield DiscoveryHit(_shown(command), self._action(command), help=command.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in COMMANDS:
            shown = _shown(command)
            score = max(matcher.match(shown), 0.8 * matcher.match(command.help))
            if score > 0:
                yield Hit(score, matcher.highlight(shown), self._action(command), help=command.help)

    def _action(self, command: Command) -> Callable[[], None]:
        front = self.screen
        line = f"/{command.name}"
        if command.usage and not command.usage.startswith("["):
            return partial(getattr(front, "put_prompt"), f"{line} ")  # noqa: B009  a Screen to the type checker
        return partial(getattr(front, "run_line"), line)  # noqa: B009


def _shown(command: Command) -> str:
    return f"/{command.name} {command.usage}".rstrip()
