"""What a chat begins with, in both front ends."""

from dataclasses import dataclass
from typing import Literal

# where a user goes from a front end; the chat goes along, but for the shell
Goal = Literal["shell", "plain", "full"]


@dataclass(frozen=True)
class Beginning:
    """The beginning of a chat.

    `model` is a folder, `conversation` the number of a stored one to continue, `text` the first message if
    any, `said` what to tell the user first; with `stats` each reply ends with its figures.
    """

    model: str
    conversation: int | None = None
    text: str = ""
    stats: bool = False
    said: str = ""
