"""The top row: the model and its bits per weight, the title of the conversation, its branch."""

from typing import ClassVar

from ...core.conversation.summary import Branch, ConversationState
from ...core.worker.wire import ModelInfo
from ..text.output import printable
from .line import Line, Piece, piece


class Header(Line):
    """Shows facts that seldom change."""

    PREFIX = "header"
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "header--model",
        "header--fact",
        "header--title",
        "header--branch",
    }

    def __init__(self) -> None:
        super().__init__(id="header")
        self._model: ModelInfo | None = None
        self._title = ""
        self._branches: tuple[Branch, ...] = ()

    def show(self, model: ModelInfo | None, state: ConversationState) -> None:
        self._model, self._title, self._branches = model, state.title, state.branches
        self.refresh()

    def left(self) -> list[Piece]:
        if self._model is None:
            return [piece("qchat", "model"), piece("no model", "fact", 1)]
        facts = (f"{self._model.bits_per_weight:.1f} bpw", "MLX")
        name = Piece((("model", printable(self._model.name)),))
        return [name, *(piece(f"· {fact}", "fact", 2) for fact in facts)]

    def right(self) -> list[Piece]:
        return [piece(printable(self._title), "title", 3), piece(self._branch(), "branch", 4)]

    def _branch(self) -> str:
        if len(self._branches) < 2:
            return ""
        place = next((n for n, branch in enumerate(self._branches, 1) if branch.current), None)
        return f"branch {place}/{len(self._branches)}" if place else f"{len(self._branches)} branches"
