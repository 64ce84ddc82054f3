"""Pictures by Kitty's graphics protocol: sent once under a number, then shown by cells that are text.

A cell is U+10EEEE with marks for its row and column in the picture; its colour is the picture's number. So
pictures scroll, and are covered and cut, as text is. Returns text and writes nothing.
https://sw.kovidgoyal.net/kitty/graphics-protocol/#unicode-placeholders
"""

import base64
from dataclasses import dataclass
from itertools import product

ESC = "\x1b"
PLACEHOLDER = "\U0010eeee"
CHUNK = 4096  # characters in one sequence at most
# marks for 0, 1, ..., the first of the protocol's rowcolumn-diacritics.txt
MARKS = "".join(
    map(
        chr,
        (
            *(0x305, 0x30D, 0x30E, 0x310, 0x312, 0x33D, 0x33E, 0x33F, 0x346, 0x34A, 0x34B, 0x34C, 0x350),
            *(0x351, 0x352, 0x357, 0x35B, 0x363, 0x364, 0x365, 0x366, 0x367, 0x368, 0x369, 0x36A, 0x36B),
            *(0x36C, 0x36D, 0x36E, 0x36F, 0x483, 0x484, 0x485, 0x486, 0x487, 0x592, 0x593, 0x594, 0x595),
            *(0x597, 0x598, 0x599, 0x59C, 0x59D, 0x59E, 0x59F, 0x5A0, 0x5A1, 0x5A8, 0x5A9, 0x5AB, 0x5AC),
        ),
    )
)
# the colours of xterm's cube but for greys, which toolkits round to others
LEVELS = (0, 95, 135, 175, 215, 255)
COLOURS = [rgb for rgb in product(LEVELS, repeat=3) if len(set(rgb)) > 1]
FIRST_OF_CUBE = 16
MOST_HANDLES = len(COLOURS) * (len(MARKS) - 1)


@dataclass(frozen=True)
class Handle:
    """What the terminal finds a picture by: the colour of its cells, and a byte, their third mark."""

    red: int
    green: int
    blue: int
    high: int

    @classmethod
    def nth(cls, index: int) -> "Handle":
        """Return one of some thousand handles."""
        high, colour = divmod(index, len(COLOURS))
        red, green, blue = COLOURS[colour]
        return cls(red, green, blue, 1 + high % (len(MARKS) - 1))

    @property
    def colour(self) -> str:
        """The colour in six hexadecimal digits."""
        return f"{self.red:02x}{self.green:02x}{self.blue:02x}"

    def number(self, *, truecolor: bool) -> int:
        """Return the picture's number where the colour is written whole, or else as one of 256."""
        low = int(self.colour, 16)
        if not truecolor:
            red, green, blue = map(LEVELS.index, (self.red, self.green, self.blue))
            low = FIRST_OF_CUBE + 36 * red + 6 * green + blue
        return self.high << 24 | low

    def row(self, row: int, columns: int) -> list[str]:
        """Return the cells of a row of the picture; each holds its place, so that rows may be cut."""
        return [f"{PLACEHOLDER}{MARKS[row]}{MARKS[column]}{MARKS[self.high]}" for column in range(columns)]


def send(number: int, png: bytes, columns: int, rows: int) -> list[str]:
    """Return what sends a picture to be shown in a box of cells, where it keeps its proportions."""
    data = base64.b64encode(png).decode()
    chunks = [data[begin : begin + CHUNK] for begin in range(0, len(data), CHUNK)]
    heads = [f"a=T,U=1,q=2,f=100,i={number},c={columns},r={rows},", *[""] * (len(chunks) - 1)]
    return [
        _command(f"{head}m={int(left > 0)}", chunk)
        for left, head, chunk in zip(range(len(chunks) - 1, -1, -1), heads, chunks, strict=True)
    ]


def delete(number: int) -> list[str]:
    """Return what deletes a picture and its data."""
    return [_command(f"a=d,d=I,q=2,i={number}")]


def through_tmux(sequence: str) -> str:
    """Return a sequence as tmux passes it to the terminal around it."""
    return f"{ESC}Ptmux;{sequence.replace(ESC, ESC + ESC)}{ESC}\\"


def _command(keys: str, payload: str = "") -> str:
    return f"{ESC}_G{keys}{';' if payload else ''}{payload}{ESC}\\"
