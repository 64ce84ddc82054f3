"""What a chat begins with, for both front ends."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Beginning:
    """`model` is a folder, `conversation` a stored one to go on with, `text` what is sent at once, `said`
    what the user should know first."""

    model: str
    conversation: int | None = None
    text: str = ""
    stats: bool = False
    said: str = ""
