"""Requests of the transcript to the screen that holds it."""

from textual.message import Message


class CopyRequested(Message):
    """Put `text` on the clipboard; `what` says what it is: `answer 3`, `code`."""

    def __init__(self, text: str, what: str) -> None:
        super().__init__()
        self.text, self.what = text, what


class TurnMessage(Message):
    """A request about turn number `turn`."""

    def __init__(self, turn: int) -> None:
        super().__init__()
        self.turn = turn


class EditRequested(TurnMessage):
    """Ask the turn's question differently."""


class RetryRequested(TurnMessage):
    """Answer the turn's question again."""


class ForkRequested(TurnMessage):
    """Begin a branch after the turn."""


class MenuRequested(TurnMessage):
    """Offer what can be done with the turn."""


class SiblingRequested(TurnMessage):
    """Show the sibling `step` places (1 or -1) from the reply that is shown."""

    def __init__(self, turn: int, step: int) -> None:
        super().__init__(turn)
        self.step = step


class TablesRequested(Message):
    """Show the tables of a Markdown source whole, beginning with table `number`, from 0."""

    def __init__(self, source: str, number: int = 0) -> None:
        super().__init__()
        self.source, self.number = source, number


class FindRequested(Message):
    """Ask the user what to find."""
