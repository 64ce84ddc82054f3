"""Long pastes stand in the prompt as short markers, and are themselves again in what is sent."""

import re

FOLD_LINES = 10
FOLD_CHARACTERS = 1_200
# what even a text that was typed is folded beyond, as the prompt's editor slows down
RECALL_LINES = 400
RECALL_CHARACTERS = 40_000
_MARKER = re.compile(r"\[pasted [0-9,]+ (?:lines|characters)(?: #[0-9]+)?\]")


class Pastes:
    """The texts behind the markers of one prompt; a marker that the user changed is just text."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def fold(self, text: str, lines: int = FOLD_LINES, characters: int = FOLD_CHARACTERS) -> str:
        """`text`, or the marker that stands for it where it is longer than `lines` or `characters`."""
        count = text.count("\n") + 1
        if count <= lines and len(text) <= characters:
            return text
        size = f"{count:,} lines" if count > lines else f"{len(text):,} characters"
        marker = f"[pasted {size}]"
        number = 1
        while self._texts.get(marker, text) != text:
            number += 1
            marker = f"[pasted {size} #{number}]"
        self._texts[marker] = text
        return marker

    def recall(self, text: str) -> str:
        """`text` as it is put back for editing."""
        return self.fold(text, RECALL_LINES, RECALL_CHARACTERS)

    def expand(self, text: str) -> str:
        """`text` with what its markers stand for; what was pasted is not searched for markers again."""
        return _MARKER.sub(lambda match: self._texts.get(match[0], match[0]), text)

    def marker_before(self, line: str) -> str:
        """The marker that `line` ends with, or nothing."""
        found = next((match[0] for match in _MARKER.finditer(line) if match.end() == len(line)), "")
        return found if found in self._texts else ""

    def clear(self) -> None:
        self._texts.clear()
