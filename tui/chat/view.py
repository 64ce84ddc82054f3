"""What a front end shows of a chat, as a protocol: the app's screen and the plain REPL each are one."""

from typing import TYPE_CHECKING, Any, Literal, Protocol

from .client import Events
from .jobs import Job
from .meter import Status

if TYPE_CHECKING:
    from ..text.report import Report

NoteKind = Literal["info", "warning", "error"]


class View(Protocol):
    """What a front end shows; everything is called on the event loop."""

    def question(self, turn: dict[str, Any]) -> None:
        """A new turn begins with its question."""
        ...

    def events(self, events: Events) -> None:
        """A batch of events of the turn being answered."""
        ...

    def finished(self, done: dict[str, Any], turn: dict[str, Any]) -> None:
        """The turn is answered."""
        ...

    def returned(self, text: str) -> None:
        """A question was not answered and is no part of the conversation: the user may want to change it."""
        ...

    def rebuilt(self, state: dict[str, Any]) -> None:
        """The conversation is another: draw all of it anew."""
        ...

    def status(self, status: Status) -> None:
        """The figures changed; comes often."""
        ...

    def note(self, text: str, kind: NoteKind = "info") -> None: ...
    def report(self, report: "Report") -> None: ...
    def job(self, job: Job) -> None:
        """A job began; show it as a live block."""
        ...

    def job_changed(self, job: Job) -> None: ...
