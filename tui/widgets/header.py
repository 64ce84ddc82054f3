"""The top row: which model and how it is quantized, the conversation's title, its branch."""

from typing import Any, ClassVar

from ..text.output import printable
from .line import Line, Piece, piece


class Header(Line):
    """Slow facts only; repaints when one changes."""

    PREFIX = "header"
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "header--model",
        "header--fact",
        "header--title",
        "header--branch",
    }

    def __init__(self) -> None:
        super().__init__(id="header")
        self._model: dict[str, Any] | None = None
        self._state: dict[str, Any] = {}

    def show(self, model: dict[str, Any] | None, state: dict[str, Any]) -> None:
        self._model, self._state = model, state
        self.refresh()

    def left(self) -> list[Piece]:
        if self._model is None:
            return [piece("qchat", "model"), piece("no model", "fact", 1)]
        facts = [f"{self._model['bits_per_weight']:.1f} bpw"] if self._model.get("bits_per_weight") else []
        facts.append("MLX")
        name = Piece((("model", printable(str(self._model.get("name", "")))),))
        return [name, *(piece(f"· {fact}", "fact", 2) for fact in facts)]

    def right(self) -> list[Piece]:
        title = printable(str(self._state.get("title") or ""))
        return [piece(title, "title", 3), piece(self._branch(), "branch", 4)]

    def _branch(self) -> str:
        branches = self._state.get("branches") or []
        if len(branches) < 2:
            return ""
        place = next((n for n, branch in enumerate(branches, 1) if branch.get("current")), 1)
        return f"⌥ {place}/{len(branches)}"
