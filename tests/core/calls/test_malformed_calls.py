"""Malformed tool calls from public reports: each is read as its author wished, or stays text."""

import json
import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.calls.toolcalls import Piece, ToolCallParser
from qchat.core.events import ToolUse

CASES = tomllib.loads(Path(__file__).with_name("malformed_calls.toml").read_text())["case"]
PROPERTIES = {
    "bash": {"command": "string"},
    "write": {"path": "string", "content": "string"},
    "weather": {
        "city": "string",
        "days": "integer",
        "detailed": "boolean",
        "hours": "array",
        "units": "object",
    },
}
TOOLS = [
    {
        "name": name,
        "parameters": {"properties": {argument: {"type": kind} for argument, kind in types.items()}},
    }
    for name, types in PROPERTIES.items()
]


def parsed(parser: ToolCallParser, text: str, step: int) -> list[Piece]:
    given = [piece for i in range(0, len(text), step) for piece in parser.add(text[i : i + step])]
    given += parser.flush()
    joined: list[Piece] = []
    for is_text, run in groupby(given, lambda piece: isinstance(piece, str)):
        neighbours = list(run)
        joined += ["".join(map(str, neighbours))] if is_text else neighbours
    return joined


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_malformed_call_is_read_as_its_author_wished(case: dict[str, Any], step: int):
    parser = ToolCallParser(TOOLS)
    pieces = parsed(parser, case["text"], step)
    calls = [[piece.name, piece.arguments] for piece in pieces if isinstance(piece, ToolUse)]
    assert json.dumps(calls) == json.dumps(case["calls"])
    words = [piece for piece in pieces if isinstance(piece, str)]
    assert words == (case.get("words", []) if calls else [case["text"]])
    assert bool(parser.unread) == case.get("unread", False)


def test_the_table_is_large_and_says_why_a_case_stays_text():
    assert len(CASES) >= 60
    assert all(case["calls"] or case["why"] for case in CASES)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CASES), st.sampled_from(CASES), st.data())
def test_any_damage_keeps_every_character_and_any_split_gives_the_same(
    first: dict[str, Any], second: dict[str, Any], data: st.DataObject
):
    text = first["text"] + second["text"]
    begin = data.draw(st.integers(0, len(text)))
    text = (
        text[:begin]
        + data.draw(st.sampled_from(["", "<", ">", '"', "}", "\n", "`", "</"]))
        + text[begin + 1 :]
    )
    whole = parsed(ToolCallParser(TOOLS), text, len(text))
    assert parsed(ToolCallParser(TOOLS), text, data.draw(st.integers(1, 9))) == whole
    assert "".join(piece if isinstance(piece, str) else piece.raw for piece in whole) == text


UNIT = 3000
ENDLESS = [
    "<tool_call>" * UNIT,
    "<tool_call><function=bash>" * UNIT,
    "<function=bash><parameter=command>" * UNIT,
    "<tool_call><function=bash><parameter=command>" + "</parameter>\n" * UNIT,
    "<tool_call><function=bash><parameter=command>" + "</function>\n</tool_call>\n" * UNIT,
    "<tool_call><function=weather><parameter=units>{" + '"</parameter></function></tool_call>' * UNIT,
    '<tool_call>{"name": "bash", "arguments": {"command": "' + "</tool_call>" * UNIT,
    '{"name": "bash", "arguments": {' + '"command": {},' * UNIT,
    "<tool_call>" + "[" * UNIT + "{" * UNIT,
    "<function=ba" * UNIT,
]


@pytest.mark.slow
@pytest.mark.parametrize("text", ENDLESS, ids=lambda text: text[:60])
def test_readings_take_time_linear_in_the_text(text: str, monkeypatch: pytest.MonkeyPatch):
    """Counts the characters that readings begin with: one at each tag would take thousands of times more."""
    read = 0
    real = ToolCallParser._read

    def counted(self: ToolCallParser, block: str, how: Any) -> Any:
        nonlocal read
        read += len(block)
        return real(self, block, how)

    monkeypatch.setattr(ToolCallParser, "_read", counted)
    pieces = parsed(ToolCallParser(TOOLS), text, 4)
    assert "".join(piece if isinstance(piece, str) else piece.raw for piece in pieces) == text
    assert read <= 4_000_000 + 64 * len(text)
