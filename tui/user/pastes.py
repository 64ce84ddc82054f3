"""Long pastes: short markers in the prompt, replaced by the pasted text when it is sent."""

import re

FOLD_LINES = 10
FOLD_CHARACTERS = 1_200
# limits for text that was typed: beyond them the prompt's editor slows down
RECALL_LINES = 400
RECALL_CHARACTERS = 40_000
_MARKER = re.compile(r"\[pasted [0-9,]+ (?:lines|characters)(?: #[0-9]+)?\]")


def line_count(text: str) -> int:
    return text.count("\n") + (not text.endswith("\n"))


class Pastes:
    """The texts behind the markers of one prompt; a marker that the user edits becomes plain text."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def fold(self, text: str, lines: int = FOLD_LINES, characters: int = FOLD_CHARACTERS) -> str:
        """Return `text`, or a marker for it if it is longer than `lines` or `characters`."""
        count = line_count(text)
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
        """Return `text` as the prompt shows it when it is edited again."""
        return self.fold(text, RECALL_LINES, RECALL_CHARACTERS)

    def expand(self, text: str) -> str:
        """Return `text` with its markers replaced; pasted text is not searched for markers."""
        return _MARKER.sub(lambda match: self._texts.get(match[0], match[0]), text)

    def marker_before(self, line: str) -> str:
        """Return the marker at the end of `line`, or an empty text."""
        found = next((match[0] for match in _MARKER.finditer(line) if match.end() == len(line)), "")
        return found if found in self._texts else ""

    def clear(self) -> None:
        self._texts.clear()
