"""The form that begins a conversion: recipe, bits or budget, and folder, with the size and quality they give.

Only enter converts.

Every choice becomes a line of `/convert`, which the task itself reads, plans and in the end runs.
"""

import asyncio
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.css.query import NoMatches
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from ...core.errors import QchatError, UsageError
from ..commands.task_command import door_of
from ..tasks.base import JobRequest, decode
from ..tasks.budget import BEST, allocation_parts, budget_flags, kl_text
from ..tasks.convert import TASK
from ..text.report import Report, report_lines
from ..text.sanitise import printable
from ..user.paths import user_path
from ..widgets.hints import hint_line
from .listing import CSS

if TYPE_CHECKING:
    from ...core.hub.library import LocalModel
    from ...core.quant.results import PlanSummary
    from ..chat.client import EngineClient
    from ..chat.controller import Chat
    from ..commands import Front

GB = 10**9
FLOAT_BITS = 10  # a weight; with fewer a model is quantized already
OWN_BITS = "the recipe's"
RECIPES = ("none", "unsloth", "qwen3_5", "mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6", BEST)
USUAL_BUDGET = "4.5bpw"
CURVE_FROM_ROWS = 30  # of the screen
BITS = (OWN_BITS, "2", "3", "4", "5", "6", "8")


class Cycle(Static, can_focus=True):
    """One value of a few, changed by the arrow keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "turn(-1)", show=False),
        Binding("right,space", "turn(1)", show=False),
    ]

    class Changed(Message):
        """Another value of `cycle` was chosen."""

        def __init__(self, cycle: "Cycle"):
            super().__init__()
            self.cycle = cycle

    def __init__(self, values: Sequence[str], value: str, id: str):
        super().__init__(id=id)
        self._values, self.value = values, value

    def on_mount(self) -> None:
        self.choose(self.value)

    def choose(self, value: str) -> None:
        self.value = value
        self.update(Content(f"‹ {value} ›"))

    def action_turn(self, step: int) -> None:
        self.choose(self._values[(self._values.index(self.value) + step) % len(self._values)])
        self.post_message(self.Changed(self))


class ConvertForm(ModalScreen[str | None]):
    """Dismissed with the line of `/convert`, or None.

    `plan` is the prediction for what the fields say now, `problem` why there is none.
    """

    CSS_PATH = CSS
    AUTO_FOCUS = "#convert-recipe"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,ctrl+c", "dismiss(None)", "close", priority=True),
        Binding("enter", "accept", "convert", priority=True),
        Binding("down", "app.focus_next", show=False),
        Binding("up", "app.focus_previous", show=False),
    ]

    def __init__(self, model: "LocalModel", chat: "Chat"):
        super().__init__()
        self._model, self._chat = model, chat
        self._client: EngineClient | None = None
        self._started: asyncio.Future[Any] | None = None
        self._suggested = ""
        self.plan: PlanSummary | None = None
        self.problem = ""

    def compose(self) -> ComposeResult:
        with Vertical(classes="sheet-ask", id="convert-form"):
            yield Static(Content.styled(printable(f"Convert {self._model.name}"), "bold"))
            yield Static(Content.styled(source_line(self._model), "$text-muted"))
            for label, field in (
                ("recipe", Cycle(RECIPES, "none", "convert-recipe")),
                ("bits", Cycle(BITS, "4", "convert-bits")),
                ("budget", Input(id="convert-budget", compact=True, select_on_focus=False)),
                ("folder", Input(id="convert-folder", compact=True, select_on_focus=False)),
            ):
                with Horizontal(classes="form-row", id=f"form-{label}"):
                    yield Static(label, classes="form-label")
                    yield field
            yield Static(id="convert-plan")
            yield Static(id="convert-line")
            keys = (("enter", "convert"), ("←→", "change"), ("↑↓", "next field"), ("esc", "leave"))
            yield Static(hint_line(keys))

    def on_mount(self) -> None:
        with self.prevent(Input.Changed):  # it is planned below
            self.query_one("#convert-budget", Input).value = USUAL_BUDGET
        self._show_fields()
        self.refresh_plan()

    def _show_fields(self) -> None:
        """Show the budget for the recipe best, and the bits for all others."""
        best = self.query_one("#convert-recipe", Cycle).value == BEST
        self.query_one("#form-budget").display = best
        self.query_one("#form-bits").display = not best

    @property
    def words(self) -> list[str]:
        """The words of `/convert` that the fields stand for. Raises UsageError for a budget that is none."""
        recipe, bits = self.query_one("#convert-recipe", Cycle), self.query_one("#convert-bits", Cycle)
        words = [str(self._model.path), "-q", "--q-recipe", recipe.value]
        if recipe.value == BEST:
            words += budget_flags(self.query_one("#convert-budget", Input).value)
        elif bits.value != OWN_BITS:
            words += ["--q-bits", bits.value]
        folder = self.query_one("#convert-folder", Input).value.strip()
        return [*words, "-o", folder] if folder not in ("", self._suggested) else words

    def _request(self, *more: str) -> JobRequest:
        door = door_of(self._chat)
        args = TASK.parse([*self.words, *more], door)
        return TASK.request(args, [Path(self._model.path)], door)

    @on(Input.Changed)
    def _text_changed(self, event: Input.Changed) -> None:
        event.stop()
        self.refresh_plan()

    @on(Cycle.Changed)
    def _choice_changed(self, event: Cycle.Changed) -> None:
        """Leave the bits to a recipe that has its own."""
        event.stop()
        recipe, bits = self.query_one("#convert-recipe", Cycle), self.query_one("#convert-bits", Cycle)
        if event.cycle is recipe and recipe.value.startswith("mixed"):
            bits.choose(OWN_BITS)
        elif event.cycle is recipe and bits.value == OWN_BITS:
            bits.choose("4")
        self._show_fields()
        self.refresh_plan()

    @work(exclusive=True)
    async def refresh_plan(self) -> None:
        """Show what the fields give: the line, its folder, and the predicted size."""
        self.plan, self.problem = None, ""
        with suppress(NoMatches):  # the form was closed meanwhile
            try:
                await self._refresh_plan()
            except QchatError as error:
                self.problem = str(error)
                self._show("", self.problem, "$error")

    async def _refresh_plan(self) -> None:
        target = Path(self._request().params["target"])
        self._suggest(target)
        self._show(f"/convert {shlex.join(self.words)}", "planning…")
        if target.exists():
            raise UsageError(f"{target} exists already: choose another folder")
        request = self._request("--plan")
        client = await self._planner()
        params = {**request.params, "measure": False}  # that would take minutes
        plan = decode(await client.request(request.method, **params), request.result)
        quality = self._quality(plan)
        self._show(f"/convert {shlex.join(self.words)}", f"{plan_line(plan, target)}{quality}")
        self.plan = plan

    def _quality(self, plan: "PlanSummary") -> str:
        """Draw the curve of KL against size where there is room, or say what is measured first."""
        if plan.allocation is not None:
            curve, *said = allocation_parts(plan.allocation)
            tall = self.app.size.height >= CURVE_FROM_ROWS
            width = max(self.query_one("#convert-plan").size.width, 1)
            report = Report("", (curve, *said) if tall else said)
            drawn = report_lines(report, width)
            return "".join(f"\n{''.join(text for _, text in line)}" for line in drawn)
        if self.query_one("#convert-recipe", Cycle).value == BEST:
            return "\nwhat each matrix matters is measured first, once for all sizes"
        return "" if plan.predicted_kl is None else f"\n{kl_text(plan.predicted_kl)}"

    def _suggest(self, target: Path) -> None:
        """Follow the other fields with the folder, until the user writes another one."""
        field = self.query_one("#convert-folder", Input)
        if field.value in ("", self._suggested):
            self._suggested = str(target)
            with self.prevent(Input.Changed):
                field.value = self._suggested
            field.cursor_position = len(field.value)

    def _show(self, line: str, plan: str, style: str = "$foreground") -> None:
        self.query_one("#convert-line", Static).update(Content.styled(printable(line), "$text-muted"))
        self.query_one("#convert-plan", Static).update(Content.styled(printable(plan), style))

    async def _planner(self) -> Any:
        """Return the engine process that plans, as long as the form is open."""
        if self._client is None or (self._started and self._started.done() and not self._client.alive):
            self._client = self._chat.job_queue.client_factory()
            self._started = asyncio.ensure_future(self._client.start())
        if self._started is not None:
            await asyncio.shield(self._started)  # a newer plan ends this one, not the start
        return self._client

    async def on_unmount(self) -> None:
        if self._client is not None:
            await self._client.stop()

    def action_accept(self) -> None:
        """Convert, unless it is known that this would be refused."""
        if self.problem:
            self.app.bell()
        else:
            self.dismiss(f"/convert {shlex.join(self.words)}")


def source_line(model: "LocalModel") -> str:
    """Say what is converted, and that quantizing twice is worse."""
    bits = model.bits_per_weight
    size = f"{model.nbytes / GB:,.2f} GB" + (f", {bits:.1f} bits per weight" if bits else "")
    twice = ""
    if bits and bits < FLOAT_BITS:
        twice = f"; it is quantized already ({bits:.1f} bpw): twice is worse"
    return size + twice


def plan_line(plan: "PlanSummary", target: Path) -> str:
    """Say what a conversion gives and takes."""
    folder = user_path(str(target))
    there = next((place for place in (folder, *folder.parents) if place.exists()), None)
    free = f" of {shutil.disk_usage(there).free / GB:,.2f} GB free" if there else ""
    size = f"→ {plan.total_bytes / GB:,.2f} GB, {plan.bits_per_weight:.2f} bits per weight"
    return "\n".join((f"{size}; needs {plan.disk_bytes / GB:,.2f} GB{free}", *plan.notes))


def make(chat: "Chat", front: "Front") -> ConvertForm:
    """Return the form for the loaded model. Raises UsageError without one."""
    from ...core.hub.library import local_model

    del front
    if chat.model is None:
        raise UsageError("say which model to convert: /convert MODEL")
    return ConvertForm(local_model(Path(chat.model.path)), chat)
