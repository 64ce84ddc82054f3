"""The pictures of a transcript in the terminal: sent when they come into sight, deleted when they go.

Without a protocol, and until a picture was sent, half blocks stand in its place. Asks the terminal nothing.
"""

import fcntl
import random
import struct
import sys
import termios
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from itertools import count

from ....core.conversation.summary import ShownPicture
from ....core.errors import UsageError
from ....core.vision.picture import Picture
from ...text.kitty import MOST_HANDLES, Handle, delete, send, through_tmux
from ...text.markdown import Line
from ...user.sequences import Graphics
from .thumbnails import draw_blocks, draw_cells, draw_nothing, size_in_cells

MOST_PIXELS = 800  # in width and height of what is sent
USUAL_CELL = 10, 20  # pixels, where the terminal does not tell


@dataclass(frozen=True)
class Sent:
    """A picture that the terminal has; `png` is kept for a terminal that lost it."""

    picture: ShownPicture
    handle: Handle
    png: bytes


class Gallery:
    """Which pictures the terminal has. `load` returns a file by its digest, None where it is gone."""

    def __init__(
        self,
        write: Callable[[str], None],
        load: Callable[[str], bytes | None],
        first: int | None = None,
    ):
        """Begin with handle number `first`, by default any, so that other programs have other ones."""
        self._write, self._load = write, load
        self._handles = count(random.randrange(MOST_HANDLES) if first is None else first)
        self._graphics: Graphics | None = None
        self._shown, self._paused = True, False
        self._sent: dict[str, Sent] = {}
        self._begun: set[str] = set()  # pictures that are being prepared, or cannot be

    def use(self, graphics: Graphics | None, *, shown: bool = True) -> None:
        """Draw by these `graphics` from now on, or in half blocks, or not at all unless `shown`."""
        self.close()
        self._graphics, self._shown = graphics if shown else None, shown
        self._begun.clear()

    def draw(self, picture: ShownPicture) -> list[Line]:
        """Return the lines of a picture as the terminal can show them now."""
        if not self._shown:
            return draw_nothing(picture)
        sent = self._sent.get(picture.digest)
        return draw_blocks(picture) if sent is None else draw_cells(picture, sent.handle)

    def take_unsent(self, pictures: Iterable[ShownPicture]) -> list[ShownPicture]:
        """Return those of `pictures` to be prepared and sent, each only once."""
        if self._graphics is None:
            return []
        known = {*self._sent, *self._begun, ""}
        unsent = {picture.digest: picture for picture in pictures if picture.digest not in known}
        self._begun |= unsent.keys()
        return list(unsent.values())

    def prepare(self, picture: ShownPicture) -> bytes | None:
        """Return a picture as PNG in the size in which it is drawn; None where its file is gone or damaged.

        Takes a while: meant for a thread.
        """
        data = self._load(picture.digest)
        (columns, rows), (width, height) = size_in_cells(picture), cell_pixels()
        try:
            return data and Picture(data).png_within(
                min(columns * width, MOST_PIXELS), min(rows * height, MOST_PIXELS)
            )
        except UsageError:
            return None

    def send(self, picture: ShownPicture, png: bytes) -> None:
        """Send a prepared picture, unless it is not wanted any more."""
        if self._graphics is not None and picture.digest in self._begun:
            self._begun.discard(picture.digest)
            self._sent[picture.digest] = Sent(picture, Handle.nth(next(self._handles)), png)
            self._send(self._sent[picture.digest])

    def resume(self) -> None:
        """Send all pictures to a terminal that has lost them, and those that come from now on."""
        self._paused = False
        for sent in self._sent.values():
            self._send(sent)

    def keep(self, digests: Container[str]) -> None:
        """Delete the other pictures in the terminal."""
        self._begun = {digest for digest in self._begun if digest in digests}
        for digest in [digest for digest in self._sent if digest not in digests]:
            self._delete(self._sent.pop(digest))

    def pause(self) -> None:
        """Lend the terminal to another program: it has no pictures, and gets none until `resume`."""
        for sent in self._sent.values():
            self._delete(sent)
        self._paused = True

    def close(self) -> None:
        """Delete all pictures for good; more than once does nothing."""
        self.keep(())

    def _send(self, sent: Sent) -> None:
        self._put(lambda number: send(number, sent.png, *size_in_cells(sent.picture)), sent)

    def _delete(self, sent: Sent) -> None:
        self._put(delete, sent)

    def _put(self, make: Callable[[int], list[str]], sent: Sent) -> None:
        """Write at once what `make` returns for the picture's number: nothing may come between."""
        if self._graphics is not None and not self._paused:
            sequences = make(sent.handle.number(truecolor=self._graphics.truecolor))
            self._write("".join(map(through_tmux, sequences) if self._graphics.in_tmux else sequences))


def cell_pixels() -> tuple[int, int]:
    """Return width and height of a cell in pixels, as the terminal tells them."""
    try:
        answer = fcntl.ioctl(sys.__stderr__ or 2, termios.TIOCGWINSZ, bytes(8))
    except (OSError, ValueError):
        return USUAL_CELL
    rows, columns, width, height = struct.unpack("HHHH", answer)
    return (width // columns, height // rows) if rows and columns and width and height else USUAL_CELL
