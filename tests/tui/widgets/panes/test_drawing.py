"""The small drawings: columns, stacked bars, items that flow."""

from math import inf, nan

import pytest

from qchat.tui.user.settings import PANE_NAMES
from qchat.tui.widgets.panes import drawing
from qchat.tui.widgets.panes.layout import PANES, share_rows
from tests.tui.widgets.panes.pane_facts import facts_of, text_of


def test_columns_are_scaled_to_the_largest_value():
    assert drawing.columns([0, 1, 2, 4], 1) == ["▁▂▄█"]
    assert drawing.columns([1, 2], 2) == [" █", "██"]
    assert drawing.columns([nan, inf, -1.0, 3.0], 1) == ["▁▁▁█"]
    assert drawing.columns([], 2) == ["", ""]


def test_more_values_than_columns_become_their_means():
    assert drawing.resample([1, 3, 5, 7], 2) == [2, 6]
    assert drawing.resample([1, 2], 5) == [1, 2]
    assert drawing.resample([1, 2], 0) == []


def test_a_small_part_keeps_one_cell_and_the_bar_its_width():
    bar = drawing.stacked([("a", "#", 99.0), ("b", "%", 0.1), ("c", "-", 0.0)], 100, 10)
    assert text_of(bar) == "#" * 10
    bar = drawing.stacked([("a", "#", 0.1), ("b", "%", 0.1)], 100, 10)
    assert text_of(bar) == "#%" + "·" * 8
    assert text_of(drawing.stacked([("a", "#", 5.0)], 0, 4)) in ("#···", "····")


def test_items_that_do_not_fit_are_left_out():
    items = [[("", word)] for word in ("one", "two", "a very long item", "three")]
    assert [text_of(line) for line in drawing.flow(items, 10, 2)] == ["one  two", "three"]


@pytest.mark.parametrize("height", range(0, 60))
def test_panes_share_the_rows_and_the_last_ones_go_first(height: int):
    shared = share_rows(PANES, facts_of(), height)
    used = sum(1 + rows for _, rows in shared) + bool(shared)
    assert [pane.name for pane, _ in shared] == [pane.name for pane in PANES[: len(shared)]]
    assert used <= height
    assert all(rows >= pane.least for pane, rows in shared)
    if len(shared) == len(PANES):
        assert used == height


def test_settings_know_the_panes_there_are():
    assert tuple(pane.name for pane in PANES) == PANE_NAMES
