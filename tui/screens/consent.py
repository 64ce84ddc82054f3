"""The panel that asks for the user's consent to a call of a tool."""

import asyncio
import time
from typing import Any, ClassVar

from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from ..text.sanitise import printable
from ..tools.consent import Decision, Question, Scope
from ..widgets.hints import hint_line

FOLDED_LINES = 8
# keys that were meant for the prompt must not answer: the panel comes while the user types
GUARD_SECONDS = 0.5
REFUSED = Decision(False)
REASON = "why not? The model reads it"


class AskTool(ModalScreen[Decision]):
    """A call with its arguments; dismissed with the user's decision."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("1", "decide('once')", "once"),
        Binding("2", "decide('conversation')", "this conversation"),
        Binding("3", "decide('always')", "always"),
        Binding("n", "refuse", "no"),
        Binding("w", "explain", "no, and why"),
        Binding("f", "unfold", "show all"),
        Binding("escape,ctrl+c", "refuse", "no", priority=True),
    ]

    def __init__(self, question: Question):
        super().__init__()
        self._question = question
        self._lines = question.lines()
        self._since = time.monotonic()
        scopes: tuple[Scope, ...] = ("once", "conversation", "always") if question.may_last else ("once",)
        self._scopes = scopes

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Content(printable(self._question.title)))
            with VerticalScroll(can_focus=False):
                yield Static(Content(self._folded()), id="arguments")
            yield OptionList(*self._options(), compact=True)
            yield Input(placeholder=REASON, id="reason", disabled=True)
            unfold = [("f", "show all")] if self._is_folded else []
            yield Static(hint_line([("↑↓ enter", "choose"), *unfold, ("n", "no")]), classes="dialog-keys")

    def on_mount(self) -> None:
        self.query_one(Input).display = False

    @property
    def _is_folded(self) -> bool:
        return len(self._lines) > FOLDED_LINES

    def _folded(self) -> str:
        if not self._is_folded:
            return "\n".join(self._lines) or "(no arguments)"
        left_out = len(self._lines) - FOLDED_LINES
        return "\n".join([*self._lines[:FOLDED_LINES], f"▸ {left_out:,} more lines"])

    def _options(self) -> list[Option]:
        words = {
            "once": "1  allow it once",
            "conversation": "2  allow it in this conversation",
            "always": f"3  always allow {self._question.tool.name}",
        }
        allowing = [Option(words[scope], id=scope) for scope in self._scopes]
        return [*allowing, Option("n  no", id="no"), Option("w  no, and say why", id="why")]

    @property
    def _is_guarded(self) -> bool:
        return time.monotonic() - self._since < GUARD_SECONDS

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        match event.option_id:
            case "no":
                self.action_refuse()
            case "why":
                self.action_explain()
            case "once" | "conversation" | "always" as scope:
                self.action_decide(scope)

    def action_decide(self, scope: Scope) -> None:
        if not self._is_guarded and scope in self._scopes:
            self.dismiss(Decision(True, scope))

    def action_refuse(self) -> None:
        if not self._is_guarded:
            self.dismiss(REFUSED)

    def action_explain(self) -> None:
        """Ask for the reason of a refusal."""
        if self._is_guarded:
            return
        reason = self.query_one(Input)
        self.query_one(OptionList).display = False
        reason.display, reason.disabled = True, False
        reason.focus()

    def action_unfold(self) -> None:
        """Show all arguments."""
        self.query_one("#arguments", Static).update(Content("\n".join(self._lines)))

    @on(Input.Submitted)
    def _explained(self, event: Input.Submitted) -> None:
        event.stop()
        self.dismiss(Decision(False, reason=event.value.strip()))


async def ask_tool(app: App[Any], question: Question) -> Decision:
    """Show the panel until the user decides; a cancelled call takes it away."""
    answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

    def decided(decision: Decision | None) -> None:
        if not answer.done():
            answer.set_result(decision or REFUSED)

    panel = AskTool(question)
    await app.push_screen(panel, decided)
    try:
        return await answer
    finally:
        if panel.is_current:
            panel.dismiss(REFUSED)
