"""Reports as JSON: there and back, and values that no report ever was."""

import json
import math
from typing import Any

import pytest

from qchat.tui.text.report import (
    Bar,
    Bars,
    Gauge,
    Lines,
    Markdown,
    Plot,
    Point,
    Report,
    Spark,
    Table,
    report_text,
)
from qchat.tui.text.stored_report import MAX_CHARACTERS, decode_parts, encode_parts

EVERY_KIND = Report(
    "all",
    (
        Table(("a", "b"), [("1", "2")], "<>"),
        Bars([Bar("x", 2.0, "2", "good")]),
        Spark([1.0, 2.0], "speed"),
        Plot([Point(1.0, 2.0, "p")], "x", "y"),
        Gauge(1, 2, "half"),
        Lines(("one", "two"), "warn"),
        Markdown("*yes*"),
    ),
)


def test_every_kind_of_part_comes_back_as_it_was():
    back = decode_parts("all", json.loads(json.dumps(encode_parts(EVERY_KIND))))
    assert len(back.parts) == len(EVERY_KIND.parts)
    assert report_text(back) == report_text(EVERY_KIND)


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        [],
        {},
        {"kind": "Nonsense"},
        {"kind": ["Lines"]},
        {"kind": "Lines", "lines": 3},
        {"kind": "Lines", "lines": ["x"], "style": "blink"},
        {"kind": "Table", "columns": ["a"], "rows": [3]},
    ],
)
def test_what_is_no_part_is_left_out(value: Any):
    back = decode_parts("x", [value, *encode_parts(Report("", (Lines(("kept",)),)))])
    assert report_text(back) == "x\nkept"


def test_figures_that_json_lacks_do_not_prevent_it():
    parts = encode_parts(Report("", (Spark([math.nan, math.inf, 1.0]),)))
    assert json.loads(json.dumps(parts, allow_nan=False))[0]["values"] == [0.0, 0.0, 1.0]


def test_a_huge_report_is_kept_as_the_beginning_of_its_text():
    rows = [(f"tensor {number}", "4 bits") for number in range(20_000)]
    (part,) = decode_parts("", encode_parts(Report("", (Table(("name", "form"), rows),)))).parts
    assert isinstance(part, Lines) and "too long" in part.lines[-1]
    assert "tensor 0" in "\n".join(part.lines) and sum(map(len, part.lines)) < MAX_CHARACTERS + 100
