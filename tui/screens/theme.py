"""The theme picker: the theme under the cursor is applied at once; esc returns to the one before.

It checks the files once a second, so that a theme can be edited beside it.
"""

from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from ...core.errors import UsageError
from ..text.sanitise import printable
from ..user.settings import save
from ..user.themes import Shelf
from ..widgets.choices import Choices
from ..widgets.hints import hint_line
from .listing import CSS

if TYPE_CHECKING:
    from ..chat.controller import Chat
    from ..commands import Front

POLL_SECONDS = 1.0
# the lines of the sample, each with the variable that colours it
SAMPLE = (
    ("▌ How fast is merge sort?", "bold $user-bar"),
    ("▸ thought 4.1 s · 212 tokens", "$think-fg"),
    ("It takes n log n steps.", "$foreground"),
    ("  def merge(a, b): ...          copy ", "on $code-bg"),
    ("● 23.4 tok/s ▁▃▅▆▆▅▆▆", "$tok-fast"),
    ("ctx ━━╌╌╌╌ 31 %", "$gauge-ok"),
    ("ctx ━━━━━╌ 84 %", "$gauge-warn"),
    ("ctx ━━━━━━ 97 %", "$gauge-hot"),
)


class ThemeScreen(ModalScreen[str | None]):
    """The themes; dismissed with the command that keeps one, or None."""

    CSS_PATH = CSS
    AUTO_FOCUS = "#sheet-list"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,ctrl+c", "revert", "revert", priority=True)]

    def __init__(self):
        super().__init__()
        self.shelf = Shelf.open()
        self._names: list[str] = []
        self._before = ""

    def compose(self) -> ComposeResult:
        with Vertical(classes="theme-panel"):
            yield Static("Themes", id="theme-title")
            yield Choices(id="sheet-list", compact=True)
            sample = Content("\n").join(Content.styled(text, style) for text, style in SAMPLE)
            yield Static(id="theme-description")
            yield Static(sample, id="theme-sample")
            yield Static(id="theme-problems")
            yield Static(id="theme-space")
            yield Static(hint_line((("↑↓", "try"), ("enter", "keep"), ("esc", "revert"))), id="sheet-keys")

    def on_mount(self) -> None:
        self._before = self.app.theme
        self._show(self._before)
        self.set_interval(POLL_SECONDS, self._look_again)

    def _look_again(self) -> None:
        if self.shelf.refresh():
            self._show(self._worn)

    @property
    def _worn(self) -> str:
        place = self.query_one(OptionList).highlighted
        return self._names[place] if place is not None and place < len(self._names) else self._before

    def _show(self, name: str) -> None:
        """List the themes with the cursor on `name`, and apply it."""
        self._names = list(self.shelf.looks)
        options = self.query_one(OptionList)
        with self.prevent(OptionList.OptionHighlighted):
            options.clear_options()
            options.add_options([Option(Content(name)) for name in self._names])
            options.highlighted = self._names.index(name) if name in self._names else 0
        problems = "\n".join(printable(problem) for problem in self.shelf.problems)
        self.query_one("#theme-problems", Static).update(Content(problems))
        self._wear(self._worn)

    def _wear(self, name: str) -> None:
        look = self.shelf.looks.get(name)
        if look is None:
            return
        self.query_one("#theme-description", Static).update(Content(printable(look.description)))
        self.app.register_theme(look.theme)
        if self.app.theme == name:
            self.app.refresh_css()  # the file changed under the same name
        self.app.theme = name

    @on(OptionList.OptionHighlighted)
    def _moved(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        self._wear(self._worn)

    @on(OptionList.OptionSelected)
    def _kept(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        name = self._worn
        try:
            save("theme", name)
        except UsageError as error:
            self.notify(printable(str(error)), severity="warning", markup=False)
        self.dismiss(f"/theme {name}")

    def action_revert(self) -> None:
        self._wear(self._before)
        self.dismiss(None)


def make(chat: "Chat", front: "Front") -> ThemeScreen:
    del chat, front
    return ThemeScreen()
