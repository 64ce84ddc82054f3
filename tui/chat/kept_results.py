"""Results of jobs and commands, kept in the store with the conversation in which they were asked for.

A result that came before the first question waits for the conversation's number. Nothing here is ever part
of a prompt. Without a store nothing is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...core.errors import StoreError
from ...core.storage.records import ModelIdentity
from ..text.report import Lines, Report, report_text
from ..text.stored_report import decode_parts, encode_parts
from .conversations import when
from .jobs import Job

if TYPE_CHECKING:
    from ...core.storage.store import Store

KEPT = ("bench", "compare", "convert", "eval", "calibrate", "inspect", "plan", "memory_plan")
# what takes so long that it is kept even where there is no conversation
LASTING = ("bench", "compare", "eval")
MAX_TEXT = 50_000  # characters, in exports


@dataclass(frozen=True)
class Result:
    """A report that was shown after turn number `turn`, and `when`."""

    turn: int
    when: str
    report: Report


class KeptResults:
    """The results of one chat on their way into its store; what cannot be kept becomes a note."""

    def __init__(self, store: "Store | None", note: Callable[[str, Literal["error"]], None]):
        self._store, self._note = store, note
        self._waiting: list[tuple[str, int, Report]] = []

    def keep_job(self, job: Job, conversation: int | None) -> None:
        """Keep the result of a finished job with its conversation, by default this one."""
        if job.state == "done" and job.method in KEPT:
            number, turn = job.place
            warning = [Lines((job.warning,), "warn")] if job.warning else []
            report = Report(job.title, (*job.report().parts, *warning))
            self.keep(report, number or conversation, turn, job.method)

    def keep(self, report: Report, conversation: int | None, turn: int, method: str = "") -> None:
        """Keep a report that was shown after turn number `turn`."""
        self._waiting.append((method, turn, report))
        self.settle(conversation)

    def settle(self, conversation: int | None) -> None:
        """Store what waits for a conversation, if there is one."""
        if conversation is None or self._store is None or not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for _, turn, report in waiting:
            title, text = report.title or "result", report_text(Report("", report.parts))[:MAX_TEXT]
            try:
                self._store.add_result(conversation, turn, title, text, encode_parts(report))
            except StoreError as error:
                self._note(f"the result of {title} is not kept: {error}", "error")

    def leave(self, name: str, folder: str) -> None:
        """Store what took long and waits in vain in a conversation of its own, with the model in `folder`."""
        self._waiting = [one for one in self._waiting if one[0] in LASTING]
        if self._store is None or not self._waiting:
            return
        title = self._waiting[0][2].title
        try:
            self.settle(self._store.create(title=title, model=ModelIdentity(name, folder)))
        except StoreError as error:
            self._note(f"the result of {title} is not kept: {error}", "error")

    def read(self, conversation: int) -> list[Result]:
        """Return the results kept with a conversation; none where they cannot be read."""
        try:
            found = self._store.results(conversation) if self._store else []
        except StoreError:
            return []
        return [Result(one.turn, when(one.created), decode_parts(one.title, one.parts)) for one in found]


def list_results(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """Return a row for each result: its place, its turn, its time and its title."""
    return [(str(place), str(one.turn), one.when, one.report.title) for place, one in enumerate(results, 1)]
