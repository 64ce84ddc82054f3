"""What a chat asks a front end to show; the full-screen app and the line-based chat implement it."""

from typing import TYPE_CHECKING, Literal, Protocol

from ...core.conversation.summary import ConversationState, Turn
from ...core.events import Done
from ..tools.consent import Decision, Question
from .decoding import Batch
from .jobs import Job
from .meter import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..text.report import Report
    from .kept_results import Result

NoteKind = Literal["info", "warning", "error"]


class Companion(Protocol):
    """A server that runs beside a chat and ends with it."""

    @property
    def url(self) -> str: ...

    @property
    def greeting(self) -> str:
        """A sentence that says what is served where."""
        ...

    def report(self) -> "Report":
        """Return a table of its requests."""
        ...

    async def stop(self, *, at_once: bool = False) -> None:
        """End it, `at_once` without waiting for anybody."""
        ...


class View(Protocol):
    """A front end as a chat sees it; every method is called on the event loop."""

    def question(self, turn: Turn) -> None:
        """Show the question of a new turn, or the results of tools."""
        ...

    def pictures(self, turn: Turn) -> None:
        """Show the pictures of the question, which come a moment after it."""
        ...

    def events(self, batch: Batch) -> None:
        """Show a batch of events of the turn being answered."""
        ...

    def finished(self, done: Done, turn: Turn) -> None:
        """Show the end of the turn."""
        ...

    async def ask_tool(self, question: Question) -> Decision:
        """Ask the user about a call of a tool; without anybody to ask the answer is no."""
        ...

    def returned(self, text: str) -> None:
        """Give a question back to the user that was not answered and is no part of the conversation."""
        ...

    def rebuilt(self, state: ConversationState) -> None:
        """Draw all of the conversation anew: another one, or another branch of it."""
        ...

    def status(self, status: Status) -> None:
        """Show changed figures; called often."""
        ...

    def note(self, text: str, kind: NoteKind = "info") -> None:
        """Show a sentence about what happens."""
        ...

    def report(self, report: "Report") -> None:
        """Show a report."""
        ...

    def results(self, results: "Sequence[Result]") -> None:
        """Show the results that were kept with the conversation which was just opened."""
        ...

    def job(self, job: Job) -> None:
        """Show a job that began as a live block."""
        ...

    def job_changed(self, job: Job) -> None:
        """Show a job's new state."""
        ...
