"""Parsers of command lines that raise where argparse would print or exit."""

import argparse
from collections.abc import Iterator
from typing import Any, NoReturn

from ...core.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print an error and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help lists the options)")


class HelpRequested(Exception):
    """The help page that a `PageParser` was asked for."""


class PageParser(Parser):
    """Raises HelpRequested where others print a page, since nothing may be printed over a chat."""

    def print_help(self, file: Any = None) -> None:
        del file
        raise HelpRequested(self.format_help())


def all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the options and words of a parser and of its actions."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from all_actions(part)


def action_names(parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of a parser's actions, as in `sessions export`."""
    found = (one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    return [name for choices in found for name in choices]
