"""Streaming layout of Markdown: finished lines are kept, only the open rest is laid out again."""

from itertools import takewhile

from .highlight import MAX_WHOLE
from .lines import BLANK, Frame, Line
from .render import blocks, fence, render
from .splitter import MAX_LINE, Piece, Splitter


def document(source: str, frame: Frame) -> list[Line]:
    """Return the lines of a whole text, the same that a stream of it ends with. It must be printable."""
    if max(map(len, source.split("\n"))) <= MAX_LINE:
        return blocks(source, frame)
    stream = Stream(frame)
    stream.feed(source)
    stream.finish()
    return stream.lines


def _same(pair: tuple[Line, Line]) -> bool:
    return pair[0] == pair[1]


class Stream:
    """`lines` shows the text fed so far; of them, the first `fixed` will stay as they are.

    A fence's lines count as fixed while it is open, and are replaced once, by as many, when it closes.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.lines: list[Line] = []
        self.fixed = 0
        self._splitter = Splitter()
        self._fence_at = 0

    def feed(self, text: str) -> int:
        """Add text; returns the number of the first line that may have changed."""
        fixed, before = self.fixed, self.lines[self.fixed :]
        changed = self._keep(self._splitter.feed(text))
        for piece in self._splitter.rest:
            self.lines += render(piece, self.frame)
        if changed == fixed:
            changed += sum(1 for _ in takewhile(_same, zip(before, self.lines[fixed:], strict=False)))
        return changed

    def finish(self) -> int:
        """End the text; returns the number of the first line that may have changed."""
        return self._keep(self._splitter.finish())

    def _keep(self, pieces: list[Piece]) -> int:
        changed = self.fixed
        del self.lines[self.fixed :]
        for piece in pieces:
            changed = min(changed, self._add(piece))
        self.fixed = len(self.lines)
        return changed

    def _add(self, piece: Piece) -> int:
        start = len(self.lines)
        if piece.fence is not None and piece.fence.opening:
            self._fence_at = start
        if piece.fence is None or piece.fence.whole is None or len(piece.fence.whole) > MAX_WHOLE:
            self.lines += render(piece, self.frame)
            return start
        gap = [BLANK] if piece.lead.gap else []
        whole = fence(piece.fence.whole, piece.fence.info, self.frame, closed=True)
        self.lines[self._fence_at :] = gap + whole
        return self._fence_at
