"""Small files of a downloaded folder: what is read, and what is refused in one sentence."""

import os
from pathlib import Path

import pytest

from qchat.core.errors import ConfigError
from qchat.core.machine.files import parse_json, read_bytes, read_json


def test_an_object_is_read_as_it_is_written(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, "é", null, true]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", ConfigError) == {"a": [1, 2.5, "é", None, True]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[1]", "is a JSON list, wanted an object"),
        (b"\xff{}", "is not UTF-8 text"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1e999}', "1e999 is out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a":' * 100_000, "nests too deeply"),
    ],
)
def test_what_is_no_plain_object_is_refused_by_name(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_json(path, ConfigError)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_a_file_over_its_limit_is_refused_and_one_at_the_limit_is_read(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bytes(path, ConfigError, 5) == b"12345"
    with pytest.raises(ConfigError, match="larger than the 4 bytes"):
        read_bytes(path, ConfigError, 4)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path):
        with pytest.raises(ConfigError, match="is not a regular file"):
            read_json(path, ConfigError)


def test_a_file_that_cannot_be_read_is_refused_with_the_systems_words(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="No such file"):
        read_json(tmp_path / "none.json", ConfigError)
    with pytest.raises(ConfigError, match="symbolic links"):
        read_json(tmp_path / "loop", ConfigError)


def test_a_link_to_a_file_elsewhere_is_followed_as_download_caches_need(tmp_path: Path):
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json", ConfigError) == {}


def test_text_that_came_from_no_file_is_named_as_the_caller_says():
    with pytest.raises(ConfigError, match=r"^message 3 is not valid JSON"):
        parse_json("{", "message 3", ConfigError)
