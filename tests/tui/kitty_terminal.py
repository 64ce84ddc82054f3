"""A terminal that knows as much of Kitty's graphics protocol as qchat uses, and refuses everything else.

It keeps the pictures that it was sent, and which part of which picture each cell of its screen shows. Written
from https://sw.kovidgoyal.net/kitty/graphics-protocol/, apart from the code under test.
"""

import base64
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO

from PIL import Image
from rich.cells import cell_len

TOKEN = re.compile(
    r"\x1bPtmux;(?P<passed>(?:[^\x1b]|\x1b\x1b)*)\x1b\\"
    r"|\x1b_G(?P<keys>[^;\x1b]*)(?:;(?P<payload>[^\x1b]*))?\x1b\\"
    r"|\x1b\[(?P<arguments>[0-9;:<>=?$]*)(?P<final>[@-~])"
    r"|\x1b\](?P<osc>[^\x07\x1b]*)(?:\x07|\x1b\\)"
    r"|(?P<character>[^\x1b])",
    re.DOTALL,
)
CELL = "\U0010eeee"


def _marks() -> list[str]:
    """The marks of rows and columns: of class 230, and neither composed nor part of what is."""
    parts = {
        chr(int(part, 16))
        for number in range(0x110000)
        for part in unicodedata.decomposition(chr(number)).split()
        if not part.startswith("<")
    }
    marks = [
        chr(number)
        for number in range(0x306, 0x5AD)
        if unicodedata.combining(chr(number)) == 230
        and not unicodedata.decomposition(chr(number))
        and chr(number) not in parts
    ]
    return ["\u0305", *marks]  # which was no part of anything in Unicode 6


MARKS = _marks()


@dataclass(frozen=True)
class Part:
    """What a cell shows: a part of picture `number`."""

    number: int
    row: int
    column: int


@dataclass
class Kept:
    """A picture, and the box of cells in which it is shown."""

    image: Image.Image
    columns: int
    rows: int

    def colour(self, part: Part) -> tuple[int, ...]:
        """The colour in the middle of a part, where the picture fills its box."""
        width, height = self.image.size
        x = (2 * part.column + 1) * width // (2 * self.columns)
        y = (2 * part.row + 1) * height // (2 * self.rows)
        pixel = self.image.getpixel((x, y))
        assert isinstance(pixel, tuple)
        return pixel


class KittyTerminal:
    """`behind_tmux`: only what tmux passes on is taken. `sent` counts the pictures that came."""

    def __init__(self, *, behind_tmux: bool = False):
        self.pictures: dict[int, Kept] = {}
        self.cells: dict[tuple[int, int], str] = {}
        self.sent = 0
        self._behind_tmux = behind_tmux
        self._coming: tuple[dict[str, str], list[str]] | None = None
        self._at = (0, 0)
        self._ink: str = ""

    def feed(self, text: str) -> None:
        """Take what a program writes."""
        end = 0
        for token in TOKEN.finditer(text):
            assert token.start() == end, f"not understood: {text[end : end + 40]!r}"
            end = token.end()
            if token["passed"] is not None:
                assert self._behind_tmux
                inner = TOKEN.fullmatch(token["passed"].replace("\x1b\x1b", "\x1b"))
                assert inner
                assert inner["keys"] is not None
                self._command(inner["keys"], inner["payload"] or "")
            elif token["keys"] is not None:
                assert not self._behind_tmux, "tmux drops it"
                self._command(token["keys"], token["payload"] or "")
            elif token["final"]:
                self._control(token["arguments"], token["final"])
            elif token["character"]:
                self._character(token["character"])
        assert end == len(text), f"not understood: {text[end : end + 40]!r}"

    def paint(self, rows: Iterable[str]) -> None:
        """Take the whole screen, row by row."""
        self.cells.clear()
        for y, row in enumerate(rows):
            self.feed(f"\x1b[{y + 1};1H{row}")

    @property
    def parts(self) -> dict[tuple[int, int], Part]:
        """The parts of pictures by row and column of the screen."""
        return {at: self._part(cell) for at, cell in self.cells.items() if CELL in cell}

    def shown(self, row: int, column: int) -> tuple[int, ...]:
        """The colour of the picture in a cell of the screen."""
        part = self.parts[row, column]
        return self.pictures[part.number].colour(part)

    def _part(self, cell: str) -> Part:
        colour, marks = cell.split(CELL)
        row, column, high = map(MARKS.index, marks)
        return Part(high << 24 | int(colour), row, column)

    def _command(self, keys: str, payload: str) -> None:
        given = dict(key.split("=") for key in keys.split(","))
        assert len(payload) <= 4096
        if self._coming is not None:
            assert given.keys() == {"m"}, "something came between the pieces of a picture"
            self._piece(payload, more=given["m"])
            return
        assert given.pop("q") == "2", "an answer would be taken for keys"
        match given.pop("a"):
            case "T":
                assert (given.pop("U"), given.pop("f")) == ("1", "100")
                more = given.pop("m")
                assert given.keys() == {"i", "c", "r"}
                self._coming = given, []
                self._piece(payload, more=more)
            case "d":
                assert given.pop("d") == "I"
                assert given.keys() == {"i"}
                del self.pictures[int(given["i"])]
            case other:
                raise AssertionError(other)

    def _piece(self, payload: str, *, more: str) -> None:
        assert self._coming is not None
        given, pieces = self._coming
        pieces.append(payload)
        if more == "1":
            assert payload
            assert len(payload) % 4 == 0
            return
        self._coming = None
        image = Image.open(BytesIO(base64.b64decode("".join(pieces), validate=True)), formats=["PNG"])
        self.pictures[int(given["i"])] = Kept(image.convert("RGB"), int(given["c"]), int(given["r"]))
        self.sent += 1

    def _control(self, arguments: str, final: str) -> None:
        if final == "H":
            row, column = (arguments or "1;1").split(";")
            self._at = int(row) - 1, int(column) - 1
        elif final == "J":
            self.cells.clear()
        elif final == "m":
            self._colour(arguments.split(";"))

    def _colour(self, codes: list[str]) -> None:
        while codes:
            code = codes.pop(0)
            if code in ("", "0", "39"):
                self._ink = ""
            elif code in ("38", "48"):
                kind = codes.pop(0)
                values = [int(codes.pop(0)) for _ in range(3 if kind == "2" else 1)]
                number = values[0] if kind == "5" else values[0] << 16 | values[1] << 8 | values[2]
                self._ink = str(number) if code == "38" else self._ink
            elif code.isdecimal() and (30 <= int(code) <= 37 or 90 <= int(code) <= 97):
                self._ink = f"-{code}"

    def _character(self, character: str) -> None:
        row, column = self._at
        if character == "\n":
            self._at = row + 1, column
        elif character == "\r":
            self._at = row, 0
        elif character == "\b":
            self._at = row, max(column - 1, 0)
        elif unicodedata.combining(character):
            if (row, column - 1) in self.cells:
                self.cells[row, column - 1] += character
        elif character.isprintable() or character == CELL:
            self.cells[self._at] = f"{self._ink}{CELL}" if character == CELL else character
            self._at = row, column + cell_len(character)
