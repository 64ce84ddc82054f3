"""A front end that records what the chat and its commands call, and answers from a script."""

from collections.abc import Sequence
from typing import Any

from qchat.core.conversation.summary import ConversationState, Turn
from qchat.core.events import Done, Text
from qchat.tui.chat.decoding import Batch
from qchat.tui.chat.jobs import Job
from qchat.tui.chat.kept_results import Result
from qchat.tui.chat.start import Goal
from qchat.tui.text.report import Report, report_lines, report_text
from qchat.tui.text.sanitise import cells
from qchat.tui.tools.consent import Decision, Question

NOTES = ("info", "warning", "error")


class FakeFront:
    """Record every call, and return `answers`, in order, from `confirm`, `choose` and `edit_text`.

    `calls` are (method, argument), but notes are (kind, text). `phases` are those of the status, without
    repetitions; `text` is the answer to the latest question.
    """

    def __init__(self, *answers: Any, screens: bool = False):
        self.answers, self.screens = list(answers), screens
        self.calls: list[tuple[str, Any]] = []
        self.phases: list[str] = []
        self.text = ""

    def question(self, turn: Turn) -> None:
        self.text = ""
        self.calls.append(("results", turn.results) if turn.results else ("question", turn.question))

    def pictures(self, turn: Turn) -> None:
        self.calls.append(("pictures", [picture.name for picture in turn.pictures]))

    def events(self, batch: Batch) -> None:
        self.text += "".join(event.text for event in batch if isinstance(event, Text))

    def finished(self, done: Done, turn: Turn) -> None:
        self.calls.append(("finished", (done.finish_reason, turn.answer)))

    async def ask_tool(self, question: Question) -> Decision:
        self.calls.append(("ask_tool", (question.tool.name, question.lines())))
        answer = self.answers.pop(0)
        return answer if isinstance(answer, Decision) else await answer

    def returned(self, text: str) -> None:
        self.calls.append(("returned", text))

    def rebuilt(self, state: ConversationState) -> None:
        self.calls.append(("rebuilt", [turn.question for turn in state.turns]))

    def status(self, status: Any) -> None:
        if self.phases[-1:] != [status.phase]:
            self.phases.append(status.phase)

    def note(self, text: str, kind: str = "info") -> None:
        self.calls.append((kind, text))

    def report(self, report: Report) -> None:
        self.calls.append(("report", report))

    def results(self, results: Sequence[Result]) -> None:
        if results:
            self.calls.append(("kept results", [(one.turn, one.report.title) for one in results]))

    def job(self, job: Job) -> None:
        self.calls.append(("job", job.title))

    def job_changed(self, job: Job) -> None:
        if job.state != "running":
            self.calls.append(("job ended", job.state))

    async def confirm(self, question: str) -> bool:
        self.calls.append(("confirm", question))
        return self.answers.pop(0)

    async def choose(self, title: str, options: list[tuple[str, str]]) -> str | None:
        self.calls += [("title", title), ("choose", options)]
        return self.answers.pop(0)

    can_edit = True

    def put_prompt(self, text: str) -> None:
        self.calls.append(("put_prompt", text))

    async def edit_text(self, text: str) -> str | None:
        self.calls.append(("edit_text", text))
        return self.answers.pop(0)

    def copy(self, text: str) -> str:
        self.calls.append(("copy", text))
        return "copied"

    def find(self, text: str) -> int:
        self.calls.append(("find", text))
        return 2

    def screen(self, name: str) -> bool:
        self.calls.append(("screen", name))
        return self.screens

    def set_theme(self, name: str) -> None:
        self.calls.append(("set_theme", name))

    def show_thinking(self, shown: bool) -> None:
        self.calls.append(("show_thinking", shown))

    def show_pictures(self, how: str) -> None:
        self.calls.append(("show_pictures", how))

    def show_panes(self, names: Sequence[str]) -> bool:
        self.calls.append(("show_panes", list(names)))
        return True

    def mouse(self, on: bool) -> None:
        self.calls.append(("mouse", on))

    async def leave(self, to: Goal) -> None:
        self.calls.append(("leave", to))

    def all(self, kind: str) -> list[Any]:
        return [value for name, value in self.calls if name == kind]

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Return every note as (kind, text)."""
        return [(name, value) for name, value in self.calls if name in NOTES]

    @property
    def said(self) -> str:
        """Every note and report, as text."""
        shown = [report_text(v) if k == "report" else v for k, v in self.calls if k in (*NOTES, "report")]
        return "\n".join(shown)

    def check_widths(self) -> None:
        """Every report fits into narrow and wide screens."""
        for report in self.all("report"):
            for width in (20, 60, 100):
                lines = report_lines(report, width)
                assert all(cells("".join(text for _, text in line)) <= width for line in lines)
