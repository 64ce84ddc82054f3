"""Kitty's graphics protocol, by a terminal that was written from its description."""

import random

import pytest
from PIL import Image
from rich.color import Color, ColorSystem

from qchat.tui.text import kitty
from qchat.tui.text.kitty import Handle, delete, send, through_tmux
from tests.tui.kitty_terminal import MARKS, KittyTerminal
from tests.vision_checkpoints import png

HANDLE = Handle.nth(1234)


def test_marks_are_those_of_the_protocol():
    assert list(kitty.MARKS) == MARKS


def test_every_handle_has_a_number_of_its_own_with_both_ways_to_write_its_colour():
    handles = [Handle.nth(index) for index in range(kitty.MOST_HANDLES)]
    for truecolor in (True, False):
        assert len({handle.number(truecolor=truecolor) for handle in handles}) == len(handles)
    assert Handle.nth(kitty.MOST_HANDLES) == handles[0]
    for handle in handles[: len(kitty.COLOURS)]:
        colour = Color.parse(f"#{handle.colour}")
        low = colour.downgrade(ColorSystem.EIGHT_BIT).number
        assert handle.number(truecolor=False) == handle.high << 24 | (low or 0)
        assert handle.number(truecolor=True) == handle.high << 24 | int(handle.colour, 16)


@pytest.mark.parametrize("behind_tmux", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (40, 30), (300, 200)])
def test_a_picture_arrives_whole_and_goes(size: tuple[int, int], behind_tmux: bool):
    terminal, number = KittyTerminal(behind_tmux=behind_tmux), HANDLE.number(truecolor=True)
    file = png(*size, seed=1)
    pieces = send(number, file, 4, 3)
    assert (len(pieces) > 1) == (size == (300, 200))
    terminal.feed("".join(map(through_tmux, pieces) if behind_tmux else pieces))
    kept = terminal.pictures[number]
    assert (kept.columns, kept.rows, kept.image.size) == (4, 3, size)
    assert kept.image.tobytes() == _pixels(file)
    terminal.feed("".join(map(through_tmux, delete(number)) if behind_tmux else delete(number)))
    assert not terminal.pictures


def test_each_cell_tells_its_place_so_that_any_part_may_be_written_alone():
    terminal = KittyTerminal()
    red, green, blue = (int(HANDLE.colour[at : at + 2], 16) for at in (0, 2, 4))
    cells = {(row, column): cell for row in range(10) for column, cell in enumerate(HANDLE.row(row, 32))}
    shuffled = random.Random(1).sample(sorted(cells), 100)
    for row, column in shuffled:
        cell = cells[row, column]
        terminal.feed(f"\x1b[{row + 1};{column + 1}H\x1b[38;2;{red};{green};{blue}m{cell}\x1b[0m")
    assert terminal.parts.keys() == set(shuffled)
    for at, part in terminal.parts.items():
        assert (part.number, part.row, part.column) == (HANDLE.number(truecolor=True), *at)


def _pixels(file: bytes) -> bytes:
    from io import BytesIO

    return Image.open(BytesIO(file)).convert("RGB").tobytes()
