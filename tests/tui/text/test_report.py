"""Tables and pictures: never wider than the screen, whatever is in them, and right in their proportions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.tui.text.diff import Diff
from qchat.tui.text.report import (
    Bar,
    Bars,
    Curve,
    Gauge,
    Lines,
    Markdown,
    Plot,
    Point,
    Report,
    Spark,
    Table,
    report_lines,
    report_text,
    sparkline,
)
from qchat.tui.text.sanitise import cells, printable
from qchat.tui.text.trend import Series, Trend

TEXT = st.one_of(
    st.text(max_size=40), st.sampled_from(["漢字" * 9, "👩‍👩‍👧 family", "\x1b[31mred\x07", "שלום", "a\nb\tc"])
)
NUMBER = st.floats(allow_nan=True, allow_infinity=True)
STYLES = {"", "title", "dim", "accent", "good", "warn", "bad", "bar"}


@st.composite
def tables(draw: st.DrawFn) -> Table:
    width = draw(st.integers(0, 8))
    row = st.lists(TEXT, min_size=width, max_size=width)
    return Table(
        draw(row), draw(st.lists(row, max_size=4)), draw(st.sampled_from(["", "<" * width, ">" * width]))
    )


PARTS = st.one_of(
    tables(),
    st.builds(Bars, st.lists(st.builds(Bar, TEXT, NUMBER, TEXT), max_size=4), NUMBER),
    st.builds(Spark, st.lists(NUMBER, max_size=20), TEXT),
    st.builds(Plot, st.lists(st.builds(Point, NUMBER, NUMBER, TEXT), max_size=30), TEXT, TEXT),
    st.builds(Gauge, NUMBER, NUMBER, TEXT),
    st.builds(Curve, st.lists(st.tuples(NUMBER, NUMBER), max_size=9), st.tuples(NUMBER, NUMBER), TEXT, TEXT),
    st.builds(Lines, st.lists(TEXT, max_size=3), st.sampled_from(sorted(STYLES))),
    st.builds(
        Trend,
        st.lists(st.builds(Series, TEXT, st.lists(st.tuples(NUMBER, NUMBER), max_size=5)), max_size=7),
        TEXT,
        TEXT,
    ),
    st.builds(Diff, TEXT, TEXT, TEXT, TEXT),
    st.builds(Markdown, TEXT),
)
REPORTS = st.builds(Report, TEXT, st.lists(PARTS, max_size=3))


def drawn(report: Report, width: int = 80, unicode: bool = True) -> list[str]:
    return ["".join(text for _, text in line) for line in report_lines(report, width, unicode)]


@given(REPORTS, st.integers(1, 120), st.booleans())
def test_no_line_is_too_wide_and_none_reaches_the_terminal_raw(report, width, unicode):
    for line in report_lines(report, width, unicode):
        text = "".join(part for _, part in line)
        assert cells(text) <= width
        assert "\n" not in text and "\t" not in text and printable(text) == text
        assert {style for style, _ in line} <= STYLES


@given(REPORTS)
def test_words_for_files_and_reading_aloud_are_printable(report):
    assert printable(report_text(report)) == report_text(report)


def test_a_table_cuts_the_widest_and_wraps_the_last_column():
    table = Table(
        ("name", "n", "what"), [("a" * 30, "1", "one two three four five six seven"), ("b", "22", "x")], "<><"
    )
    assert drawn(Report("T", (table,)), 40) == [
        "T",
        "name             n  what",
        "aaaaaaaaaaaaa…   1  one two three four",
        "                    five six seven",
        "b               22  x",
    ]
    assert drawn(Report("", (table,)), 80)[1].endswith("  1  one two three four five six seven")


def test_columns_keep_their_places_with_wide_characters():
    rows = drawn(Report("", (Table(("", ""), [("漢字", "x"), ("ab", "x")]),)))
    assert [cells(row.split("x")[0]) for row in rows] == [6, 6]


def test_bars_are_in_proportion():
    lines = report_lines(
        Report("", (Bars([Bar("a", 10, "ten"), Bar("b", 5, "five"), Bar("c", 0, "none")]),)), 80
    )
    filled = [cells(dict(line)["bar"]) if "bar" in dict(line) else 0 for line in lines]
    assert filled == [30, 15, 0]


def test_a_bar_without_unicode_is_of_signs():
    assert drawn(Report("", (Bars([Bar("a", 1, "1"), Bar("b", 2, "2")]),)), 80, unicode=False) == [
        "a  ###############...............  1",
        "b  ##############################  2",
    ]


@given(st.lists(NUMBER, max_size=30))
def test_a_sparkline_has_one_sign_for_each_value(values):
    line = sparkline(values)
    assert len(line) == len(values)
    finite = [value for value in values if math.isfinite(value) and value > 0]
    assert not finite or line[values.index(max(finite))] == "█"


@pytest.mark.parametrize(("done", "share"), [(0, "0%"), (5, "50%"), (10, "100%"), (20, "100%")])
def test_a_gauge_says_how_far(done, share):
    (line,) = drawn(Report("", (Gauge(done, 10, "left"),)))
    assert f" {share}  left" in line


def test_a_plot_puts_points_where_they_belong():
    plot = Plot([Point(1, 1, "low"), Point(2, 2, "high"), Point(2, 2, "same")], "GB", "KL")
    lines = drawn(Report("", (plot,)), 60)
    grid = lines[1:11]
    assert grid[0].rstrip().endswith("CB") and grid[-1][3:].startswith("A")
    assert lines[11].startswith("  └─") and lines[12].endswith("GB")
    assert lines[-1] == "C same  2 GB, 2 KL"


@pytest.mark.parametrize("width", [20, 60])
def test_a_curve_falls_over_a_logarithmic_axis_with_the_chosen_point_marked(width: int):
    points = [(float(x), 10.0**-x) for x in range(8)]
    first, *grid, axis, scale, chosen = drawn(Report("", (Curve(points, (7.0, 1e-7), "GB", "KL"),)), width)
    assert (first, chosen) == ("KL", "X 7 GB, 1e-07 KL")
    assert scale.split() == ["0", "7", "GB"] and "└" in axis
    starts = [row.index("·") for row in grid[:-1]]
    assert starts == sorted(starts) and len(grid) == 8 and grid[-1].endswith("X")
    assert grid[0].startswith("    1 │·") and grid[-1].startswith("1e-07 │")


def test_a_curve_whose_chosen_point_is_no_number_is_not_drawn():
    assert drawn(Report("", (Curve([(1.0, 1.0)], (1.0, math.nan), "GB", "KL"),))) == []


def test_points_that_are_no_numbers_are_left_out():
    plot = Plot([Point(math.nan, 1, "no"), Point(1, 1, "yes")], "x", "y")
    assert "no" not in "\n".join(drawn(Report("", (plot,))))


def test_a_report_in_words_draws_nothing():
    report = Report(
        "T",
        (
            Table(("size", "code"), [("1 GB", "affine"), ("", "x")]),
            Bars([Bar("a", 2, "two"), Bar("b", 3)]),
            Spark([1, 3], "speed"),
            Plot([Point(1, 2, "p")], "GB", "KL"),
            Gauge(1, 2, "left"),
            Curve([(1, 2), (2, 1)], (2, 1), "GB", "KL"),
            Lines(["said"]),
            Markdown("*x*"),
        ),
    )
    words = Table(("command", "what it does"), [("/new", "Begin"), ("/bye", "Quit")], named=False)
    assert report_text(Report("", (words,))) == "/new, Begin\n/bye, Quit"
    assert report_text(report).split("\n") == [
        "T", "size 1 GB, code affine", "code x", "a: two", "b: 3", "speed: 1 to 3", "p: 1 GB, 2 KL",
        "50% left", "KL by size: 1 GB: 2, 2 GB: 1", "chosen: 2 GB, 1 KL", "said", "*x*",
    ]  # fmt: skip
