"""The words of a command line in the chat, quoted as in a shell."""

import shlex
from io import StringIO

from ...core.errors import UsageError


def words(argument: str) -> list[str]:
    """Split an argument as a shell does. Raises UsageError for an open quote."""
    try:
        return shlex.split(argument)
    except ValueError as error:
        raise _unsplittable(argument, error) from error


def first_word(argument: str) -> tuple[str, str]:
    """Return the first word, and the rest as it is written. Raises UsageError for an open quote."""
    stream = StringIO(argument)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        word = lexer.get_token() or ""
    except ValueError as error:
        raise _unsplittable(argument, error) from error
    return word, stream.read().strip()


def _unsplittable(argument: str, error: ValueError) -> UsageError:
    return UsageError(f"the words {argument!r:.60} cannot be told apart: {error}".lower())
