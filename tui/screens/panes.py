"""The panes on the chat screen: where they stand, what they are told, what the engine is asked for them."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from textual.geometry import Size

from ...core.conversation.summary import CacheSummary
from ...core.errors import QchatError
from ...core.events import Thought
from ...core.worker.wire import MemoryResult
from ..chat.controller import Chat
from ..chat.decoding import Batch
from ..widgets.panes.facts import PaneFacts
from ..widgets.panes.panes import Panel, PaneStrip

# from these sizes on there is a panel, a strip, and a strip of two rows
PANEL_COLUMNS = 120
STRIP_COLUMNS, STRIP_ROWS, TWO_ROWS = 60, 16, 28
LEAST_PANEL, MOST_PANEL = 42, 52
THOUGHT_CHARACTERS = 6_000


class ScreenPanes:
    """Owns the panel and the strip; `go` runs work beside the screen, `leave` gives the focus back."""

    def __init__(
        self,
        chat_of: Callable[[], Chat],
        go: Callable[[Coroutine[Any, Any, Any]], Any],
        leave: Callable[[], Any],
    ):
        self._chat_of, self._go, self._leave = chat_of, go, leave
        self.panel, self.strip = Panel(self.facts), PaneStrip(self.facts, id="strip")
        self._names: Sequence[str] = ()
        self._size = Size(0, 0)
        self._thought = ""
        self._memory: MemoryResult | None = None
        self._cache: CacheSummary | None = None
        self._phase = ""

    def facts(self) -> PaneFacts:
        """Return what the panes show now."""
        chat = self._chat_of()
        return PaneFacts(
            status=chat.status,
            state=chat.state,
            model=chat.model,
            thought=self._thought,
            budget=chat.settings["thinking_budget"],
            memory=self._memory if chat.model else None,
            cache=self._cache if chat.model else None,
            chosen=self.panel.chosen,
        )

    # where they stand

    def show(self, names: Sequence[str]) -> None:
        """Show these panes and no others."""
        self._names = self.panel.shown = self.strip.shown = tuple(names)
        self.place(self._size)
        for panes in (self.panel, self.strip):
            panes.redraw()
        self._ask()

    def place(self, size: Size) -> None:
        """Stand beside the conversation in a wide window, below it in others, and nowhere in small ones."""
        self._size = size
        width, height = size
        wide = bool(self._names) and width >= PANEL_COLUMNS and height >= STRIP_ROWS
        narrow = bool(self._names) and not wide and width >= STRIP_COLUMNS and height >= STRIP_ROWS
        self.panel.styles.width = min(max(width * 3 // 10, LEAST_PANEL), MOST_PANEL)
        self.strip.styles.height = 2 if height >= TWO_ROWS and len(self._names) > 2 else 1
        if self.panel.has_focus and not wide:
            self._leave()
        self.panel.display, self.strip.display = wide, narrow
        self._ask()

    def in_sight(self) -> set[str]:
        """Return the names of the panes that can be seen."""
        return self.panel.in_sight() | self.strip.in_sight()

    # what they are told

    def begin(self) -> None:
        """Begin without a thought: a question was asked, or another conversation is shown."""
        self._thought = ""
        self.moved()

    def follow(self, batch: Batch) -> None:
        """Keep the end of the running thought."""
        said = "".join(event.text for event in batch if isinstance(event, Thought))
        if said:
            self._thought += said
        if len(self._thought) > THOUGHT_CHARACTERS:  # half at once, so that the lines seldom break anew
            self._thought = self._thought[-THOUGHT_CHARACTERS // 2 :]

    def moved(self) -> None:
        """Draw what has changed, and ask the engine for more once it is idle."""
        phase = self._chat_of().status.phase
        if phase != self._phase:
            self._phase = phase
            self._ask()
        self.panel.moved()
        self.strip.moved()

    def _ask(self) -> None:
        chat = self._chat_of()
        if self.panel.display and self._phase == "idle" and chat.model is not None and not chat.busy:
            self._go(self._ask_engine(chat))

    async def _ask_engine(self, chat: Chat) -> None:
        """Ask what the memory holds and which snapshots there are."""
        try:
            if "branches" in self._names:
                self._cache = await chat.request("explain")
            if "memory" in self._names:
                self._memory = await chat.request("memory")
        except QchatError:
            return  # asked again after the next reply
        self.panel.moved()


def opened(chat: Chat) -> Sequence[str]:
    """Return the panes that the settings show."""
    return chat.settings["shown_panes"] if chat.settings["panes"] else ()
