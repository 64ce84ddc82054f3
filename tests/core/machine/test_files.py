"""Files: what is read, what is refused in one sentence, and what writing leaves however it ends."""

import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qchat.core.errors import ConfigError, UsageError
from qchat.core.hub.library import Locations
from qchat.core.machine.files import (
    cache_path,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
    user_folder,
    whole_file,
    write_whole,
)
from qchat.tui.user.paths import cache_dir
from tests.paths import ROOT

WRITE = """
import sys
import time
from pathlib import Path
from qchat.core.machine.files import write_whole
for _ in range(200):
    write_whole(Path(sys.argv[1]), sys.argv[2] * 100_000)
"""


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
        (b'{"a": 1' + b"0" * 400 + b"}", "is out of range"),
        (b'{"a": -1' + b"0" * 400 + b"}", "is out of range"),
        (b'{"a":' * 100_000, "nests too deeply"),
    ],
)
def test_what_is_no_plain_object_is_refused_by_name(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_json(path, ConfigError)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_json_of_very_many_values_is_refused_before_it_is_parsed():
    with pytest.raises(ConfigError, match="holds more than 8,000,000 values"):
        parse_json('{"a": [' + "[]," * 4_100_000 + "[]]}", "a.json", ConfigError)


def test_a_byte_order_mark_is_skipped(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json", ConfigError) == {"a": 1}


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13901056\n")
    with pytest.raises(ConfigError, match=r"a\.json is a Git LFS pointer.*git lfs pull"):
        read_json(path, ConfigError)


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 32_000 + " = 1",
        "a" + ' . "a"' * 8_000 + " = 1",
        "[a" + ".'a'" * 16_000 + "]",
        "[[a" + ".a" * 32_000 + "]]",
        "x = { a" + ".a" * 32_000 + " = 1 }",
        "[a" + ".a" * 8_000 + "]\n" + "b = 1\n" * 8_000,
    ],
)
def test_toml_keys_of_many_parts_are_refused_at_once(text: str):
    started = time.process_time()
    with pytest.raises(ValueError, match="more than 32 parts"):
        parse_toml(text)
    assert time.process_time() - started < 1


def test_dots_in_toml_texts_comments_and_numbers_are_no_keys():
    dots = "." * 500
    text = (
        f'a = "{dots}"\nb = """\n{dots}\n"quoted"{dots}\n"""\nc = \'{dots}\' # {dots}\n'
        f"d = '''\n{dots}\n'''\ne = [{'1.5, ' * 100}]"
    )
    assert parse_toml(text)["e"] == [1.5] * 100


@pytest.mark.parametrize("text", ["a = " + "9" * 5000, "a = ", "a = " + "[" * 5000])
def test_toml_that_cannot_be_read_is_a_value_error(text: str):
    with pytest.raises(ValueError, match=r"[a-z]+"):
        parse_toml(text)


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


# --- writing ---


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_processes_that_write_the_same_file_leave_one_whole_version(tmp_path: Path):
    """With a fixed temporary name one renamed what the other was writing, or found nothing to rename."""
    path = tmp_path / "a.json"
    write_whole(path, "x" * 100_000)
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev")}
    command = [sys.executable, "-c", WRITE, str(path)]
    writers = [subprocess.Popen([*command, letter], env=environment) for letter in "yz"]
    while any(writer.poll() is None for writer in writers):
        text = path.read_text()
        assert text == text[0] * 100_000
    assert [writer.returncode for writer in writers] == [0, 0]
    assert path.read_text() in ("y" * 100_000, "z" * 100_000)
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_the_same_file_leave_one_whole_version(tmp_path: Path):
    path, texts = tmp_path / "a.json", [letter * 100_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_whole(path, text), texts * 10))
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path):
    path = tmp_path / "a.json"
    write_whole(path, b"old", sync=True)
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \udc80")
    assert path.read_bytes() == b"old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", "new")
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "a.json", "new")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.json", "folder"}


@pytest.mark.usefixtures("usual_umask")
def test_a_new_file_has_the_permissions_asked_for_or_those_of_any_new_file(tmp_path: Path):
    """Also where a more open file is replaced, and while it is being written."""
    for mode, wanted in ((0o666, 0o644), (0o600, 0o600)):
        path = tmp_path / "a.json"
        with whole_file(path, mode=mode) as temporary:
            temporary.write_text("text")
            assert stat.S_IMODE(temporary.stat().st_mode) == wanted
        assert stat.S_IMODE(path.stat().st_mode) == wanted


def test_a_link_is_replaced_and_the_file_behind_it_stays(tmp_path: Path):
    (tmp_path / "blob").write_text("shared")
    link = tmp_path / "a.json"
    link.symlink_to("blob")
    write_whole(link, "own")
    assert not link.is_symlink() and link.read_text() == "own"
    assert (tmp_path / "blob").read_text() == "shared"


def test_a_temporary_file_is_hidden_and_ends_like_the_file_unless_told_otherwise(tmp_path: Path):
    for suffix, wanted in ((None, ".safetensors"), (".part", ".part")):
        with whole_file(tmp_path / "a.safetensors", suffix=suffix) as temporary:
            assert temporary.name.startswith(".a.safetensors.") and temporary.suffix == wanted


def test_every_part_finds_its_folders_by_the_same_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Absolute XDG variables count, relative ones do not, and without a home there is no folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, folder in (("/elsewhere", Path("/elsewhere")), ("not/absolute", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_path("kernels") == folder / "qchat" / "kernels"
        assert user_folder("XDG_CACHE_HOME", ".cache") == folder / "qchat"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_path("kernels") is None
    with pytest.raises(UsageError, match="set HOME or XDG_CACHE_HOME"):
        cache_dir()
    monkeypatch.delenv("XDG_STATE_HOME")
    with pytest.raises(UsageError, match="set HOME or XDG_STATE_HOME"):
        Locations((), tmp_path)
