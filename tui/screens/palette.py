"""The command palette's entries, from the same table as the slash commands."""

from collections.abc import Callable
from functools import partial

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.content import Content
from textual.markup import escape

from ..commands import COMMANDS
from ..commands.base import Command


class Commands(Provider):
    """Runs a command, or begins its line in the prompt if it needs an argument."""

    async def discover(self) -> Hits:
        for command in COMMANDS:
            line = f"/{command.name}"
            shown = Content(f"{line} {command.usage}".rstrip())
            yield DiscoveryHit(shown, self._action(command), line, escape(command.help))

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in COMMANDS:
            line = f"/{command.name}"
            score = max(matcher.match(line), 0.8 * matcher.match(command.help))
            if score > 0:
                shown = Content.assemble(matcher.highlight(line), Content(f" {command.usage}".rstrip()))
                yield Hit(score, shown, self._action(command), line, escape(command.help))

    def _action(self, command: Command) -> Callable[[], None]:
        front = self.screen
        line = f"/{command.name}"
        if command.usage and not command.usage.startswith("["):
            return partial(getattr(front, "put_prompt"), f"{line} ")  # noqa: B009  a Screen to the type checker
        return partial(getattr(front, "run_line"), line)  # noqa: B009
