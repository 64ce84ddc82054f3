"""What the transcript asks the screen that holds it to do."""

from textual.message import Message


class CopyRequested(Message):
    """Put `text` on the clipboard; `what` says what it is: `answer 3`, `code`."""

    def __init__(self, text: str, what: str) -> None:
        super().__init__()
        self.text, self.what = text, what


class TurnMessage(Message):
    """Something is to be done with turn number `turn`."""

    def __init__(self, turn: int) -> None:
        super().__init__()
        self.turn = turn


class EditRequested(TurnMessage):
    """Ask its question differently."""


class RetryRequested(TurnMessage):
    """Answer it again."""


class ForkRequested(TurnMessage):
    """Begin a branch after it."""


class MenuRequested(TurnMessage):
    """Offer what can be done with it."""


class SiblingRequested(TurnMessage):
    """Show the reply `step` (1 or -1) places from the one that is shown."""

    def __init__(self, turn: int, step: int) -> None:
        super().__init__(turn)
        self.step = step


class FindRequested(Message):
    """Ask what to find."""
