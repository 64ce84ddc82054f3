"""An answer coloured by the probability of its tokens, and what could have come in the place of each."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from ...core.errors import UsageError
from ..chat.probabilities import LEVELS, ScoredAnswer, alternatives, percent, visible
from ..text.report import Report
from ..widgets.hints import hint_line
from ..widgets.token_text import TokenText
from .listing import CSS, STYLES, drawn

if TYPE_CHECKING:
    from ..chat.controller import Chat
    from ..commands import Front

KEYS = (("←→↑↓", "token"), ("n p", "unlikely ones"), ("esc", "close"))


class ProbsScreen(ModalScreen[str | None]):
    """The tokens of one answer."""

    CSS_PATH = CSS
    AUTO_FOCUS = "TokenText"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,ctrl+c,q,enter", "dismiss(None)", "close", priority=True)
    ]

    def __init__(self, answer: ScoredAnswer):
        super().__init__()
        self._answer = answer
        self._text = TokenText([(token.text, token.style) for token in answer.tokens])

    def compose(self) -> ComposeResult:
        with Vertical(classes="sheet"):
            with Horizontal(classes="sheet-head"):
                yield Static(Content.styled(self._answer.title, "bold"), id="sheet-title")
            yield self._text
            yield Static(id="probs-here")
            yield Static(_legend(), id="probs-legend")
            yield Static(hint_line(KEYS), id="sheet-keys")

    def on_resize(self, _: events.Resize) -> None:
        self.call_after_refresh(self._show_alternatives)

    @on(TokenText.Moved)
    def _show_alternatives(self) -> None:
        """Show what could have come in the place of the token under the cursor, as far as there is room."""
        for here in self.query("#probs-here").results(Static):  # none while the screen is being closed
            here.update(drawn(self._report(), max(20, self.size.width - 4)))

    def _report(self) -> Report:
        if not self._answer.tokens:
            return Report("the answer is empty")
        token = self._answer.tokens[self._text.cursor]
        bars = alternatives(token)
        room = max(2, self.size.height // 2 - 4)
        title = f"{self._text.cursor + 1:,}  {visible(token.text)}  {percent(token.probability)}"
        return Report(title, (replace(bars, rows=bars.rows[:room]),))


def _legend() -> Content:
    shown = [Content.styled(f"■ {words}", STYLES.get(style, "")) for _, style, words in LEVELS]
    return Content("  ").join(shown)


def make(chat: "Chat", front: "Front") -> ProbsScreen:
    """Return the screen. Raises UsageError if no answer was scored."""
    del front
    if chat.scored is None:
        raise UsageError("no answer was scored: /probs does it")
    return ProbsScreen(chat.scored)
