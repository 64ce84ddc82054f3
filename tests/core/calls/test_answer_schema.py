"""Schema files: what is read, and what is refused in one sentence, all of it without a model."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from qchat.core import read_schema
from qchat.core.calls.answer_schema import MAX_FILE_NBYTES, RESTRICTING, check_grammar
from qchat.core.calls.json_grammar import json_rule
from qchat.core.errors import UsageError

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "schema.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_schema(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "schema", [CITY, {}, {"enum": ["a"], "title": "A"}, {"$ref": "#/$defs/a", "$defs": {"a": CITY}}]
)
def test_a_schema_is_read_as_it_is_written(tmp_path: Path, schema: dict[str, Any]):
    path = written(tmp_path, json.dumps(schema, indent=2))
    assert read_schema(path) == read_schema(str(path)) == schema
    assert read_schema(written(tmp_path, b"\xef\xbb\xbf" + json.dumps(schema).encode())) == schema


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not valid JSON"),
        ("type: object", "is not valid JSON"),
        (b"\xff{}", "is not UTF-8 text"),
        ("[1, 2]", "is a JSON list, wanted an object"),
        ("true", "is a JSON bool, wanted an object"),
        ('"object"', "is a JSON str, wanted an object"),
        ('{"minimum": NaN}', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"not":' * 2000 + "{}" + "}" * 2000, "nests too deeply"),
        ('{"type": "name"}', "Invalid type: name"),
        ('{"properties": 3}', "properties must be an object"),
        ('{"not": {}}', 'Unimplemented keys: ["not"]'),
        ('{"if": {}, "then": {}}', 'Unimplemented keys: ["if", "then"]'),
        ('{"$ref": "https://example.org/schema"}', "retrieving it failed"),
        ('{"$ref": "#/nowhere"}', "'/nowhere' does not exist"),
        ('{"minimum": 2, "maximum": 1, "type": "integer"}', "greater than maximum"),
        ('{"type": "string", "pattern": "("}', "unclosed group"),
        ('{"type": "string", "format": "poem"}', "Unknown format: poem"),
        ('{"const": "\\ud800"}', "cannot be constrained"),
        ('{"city": "Paris", "days": 3}', "it has no keyword that restricts an answer"),
        ('{"name": "city", "schema": {"type": "object"}}', "it has no keyword that restricts an answer"),
        (json.dumps({"enum": ["x" * (1 << 20)]}), "the schema has 1,04"),
        (b" " * (MAX_FILE_NBYTES + 1), "is larger than the 4,194,304 bytes"),
    ],
)
def test_what_is_no_schema_or_cannot_be_promised_is_a_sentence(tmp_path: Path, text: str | bytes, words: str):
    assert words in refused(written(tmp_path, text))


def test_a_file_that_is_missing_or_none_is_named(tmp_path: Path):
    assert f"cannot read {tmp_path / 'nowhere'}" in refused(tmp_path / "nowhere")
    assert f"{tmp_path} is not a regular file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is not a regular file" in refused(tmp_path / "pipe")


def test_every_keyword_that_counts_as_one_restricts_an_answer():
    """llguidance reads each: a nonsensical value is refused, or, where any value has a meaning, one works."""
    any_value = {"const", "enum", "$ref", "additionalProperties", "items", "additionalItems"}
    for keyword in RESTRICTING - any_value:
        with pytest.raises(UsageError, match="cannot be constrained"):
            check_grammar(f"start: document\ndocument: {json_rule({keyword: {'no': [None]}})}")


def test_without_llguidance_one_sentence_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "extra `structured`" in refused(written(tmp_path, json.dumps(CITY)))
