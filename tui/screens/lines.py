"""What a line in the prompt may become: its completions, and the files that it names in vain."""

from pathlib import Path

from ..chat.controller import Chat
from ..commands import completions
from ..user.attachments import complete, missing
from ..widgets.completion import Candidate


def candidates(before: str, chat: Chat) -> list[Candidate]:
    """Return commands for a line that begins with a slash, files for a word that begins with @."""
    if before.startswith("/"):
        return [
            Candidate(one.line, one.shown, one.help, ready=_is_ready(one.shown))
            for one in completions(before, chat)
        ]
    word = before[max(before.rfind(" "), before.rfind("\t")) + 1 :]
    if not word.startswith("@"):
        return []
    start = len(before) - len(word)
    return [Candidate(f"@{path}", path, start=start) for path in complete(word[1:], Path.cwd())]


def _is_ready(shown: str) -> bool:
    """Whether a command can run without an argument."""
    usage = shown.partition(" ")[2]
    return not usage or usage.startswith("[")


def describe_missing(line: str) -> str:
    """Say which files a message names in vain; empty if there is none."""
    absent = missing(line, Path.cwd())
    return f"no file {', '.join(absent)} here: sent as it was typed" if absent else ""
