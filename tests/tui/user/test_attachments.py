"""Files that go with a message: found by @, bounded, text only."""

import os
from pathlib import Path

import pytest

from qchat.core.errors import UsageError
from qchat.tui.user import attachments
from qchat.tui.user.attachments import (
    Attachment,
    attach,
    complete,
    find,
    missing,
    read,
    split_attached,
    with_files,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "notes.md").write_text("# Notes\n")
    (tmp_path / "two words.txt").write_text("hello")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text("print(1)\n")
    (tmp_path / ".hidden").write_text("")
    return tmp_path


def refused(path: str, folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read(path, folder)
    assert path in str(caught.value)
    return str(caught.value)


def test_mentions_are_the_existing_paths_that_begin_a_word(folder: Path):
    text = 'see @notes.md, @src/main.py and @"two words.txt"; mail me@notes.md or @nobody @notes.md'
    assert find(text, folder) == ["notes.md", "src/main.py", "two words.txt"]


def test_a_message_gets_its_files_in_fences(folder: Path):
    assert attach("explain @src/main.py", folder) == (
        "explain @src/main.py\n\nsrc/main.py:\n```py\nprint(1)\n```"
    )


def test_a_message_without_mentions_is_left_alone(folder: Path):
    assert attach("price: 5 @ 3 each", folder) == "price: 5 @ 3 each"


def test_no_file_can_close_its_fence():
    said = with_files("x", [Attachment("a.md", "````\ncode\n````\n")])
    assert said.endswith("`````md\n````\ncode\n````\n`````")


@pytest.mark.parametrize(
    ("content", "why"), [(b"a\0b", "not a text file"), (b"caf\xe9", "byte 3 is not UTF-8")]
)
def test_what_is_no_text_is_refused(folder: Path, content: bytes, why: str):
    (folder / "bad.bin").write_bytes(content)
    assert why in refused("bad.bin", folder)


def test_a_large_file_is_refused(folder: Path, monkeypatch):
    monkeypatch.setattr(attachments, "MAX_FILE_NBYTES", 4)
    assert "larger than" in refused("notes.md", folder)


def test_files_that_are_too_large_together_are_refused(monkeypatch):
    monkeypatch.setattr(attachments, "MAX_ALL_NBYTES", 5)
    with pytest.raises(UsageError, match="6 bytes in all"):
        with_files("", [Attachment("a", "aaa"), Attachment("b", "bbb")])


def test_folders_pipes_and_missing_files_are_refused(folder: Path):
    os.mkfifo(folder / "pipe")
    assert "it is a folder" in refused("src", folder)
    assert "not a regular file" in refused("pipe", folder)
    assert "no such file" in refused("nothing", folder)


def test_paths_are_completed_with_folders_marked_and_hidden_ones_on_demand(folder: Path):
    assert complete("", folder) == ["notes.md", "src/", "two words.txt"]
    assert complete("sr", folder) == ["src/"]
    assert complete("src/", folder) == ["src/main.py"]
    assert complete(".h", folder) == [".hidden"]
    assert complete("no/where/", folder) == []
    assert f"{folder}/notes.md" in complete(f"{folder}/no", folder)


def test_a_message_is_split_into_what_was_typed_and_its_files(tmp_path: Path):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "b.md").write_text("```\ncode\n```\n")
    message = attach("compare @a.py and @b.md", tmp_path)
    typed, files = split_attached(message)
    assert typed == "compare @a.py and @b.md"
    assert [(one.name, one.lines, one.characters) for one in files] == [("a.py", 2, 11), ("b.md", 3, 12)]
    assert split_attached("nothing:\n```\nx\n``` here") == ("nothing:\n```\nx\n``` here", [])


def test_a_mention_that_names_no_file_is_found_missing(tmp_path: Path):
    (tmp_path / "a.py").write_text("")
    assert missing("@a.py, @b.py! mail@example.org @a.py", tmp_path) == ["b.py"]


def test_letters_that_begin_no_path_find_files_below(tmp_path: Path):
    (tmp_path / "src" / "deep").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("src/deep/sidebar.py", "src/side.py", ".git/side"):
        (tmp_path / name).write_text("")
    assert complete("side", tmp_path) == ["src/side.py", "src/deep/sidebar.py"]
    assert complete("src/", tmp_path) == ["src/deep/", "src/side.py"]


# --- pictures ---


def test_pictures_are_left_to_the_engine_as_whole_paths(folder: Path):
    (folder / "cat.PNG").write_bytes(b"\x89PNG")
    (folder / "my cat.jpg").write_bytes(b"\xff\xd8")
    text = 'what are @cat.PNG and @"my cat.jpg" in @notes.md?'
    assert attachments.pictures(text, folder) == [str(folder / "cat.PNG"), str(folder / "my cat.jpg")]
    assert attach(text, folder) == f"{text}\n\nnotes.md:\n```md\n# Notes\n```"
    assert attachments.split_pictures(["a.txt", "b.webp", "c.Jpeg"]) == (["b.webp", "c.Jpeg"], ["a.txt"])


@pytest.mark.parametrize(
    ("pasted", "mentioned"),
    [
        ("{}/cat.png", "@{}/cat.png"),
        ("{}/cat.png ", "@{}/cat.png"),
        ("'{}/my cat.png'", '@"{}/my cat.png"'),
        ("{}/my\\ cat.png", '@"{}/my cat.png"'),
        ("{}/my cat.png", '@"{}/my cat.png"'),
        ("file://{}/my%20cat.png", '@"{}/my cat.png"'),
        ("cat.png", "@cat.png"),
        ("{}/other.png", None),
        ("{}/notes.md", None),
        ("look at {}/cat.png", None),
        ("{}/cat.png\n{}/cat.png", None),
        ("it's", None),
        ("x" * 10_000 + ".png", None),
    ],
)
def test_a_pasted_or_dropped_path_of_a_picture_becomes_its_mention(
    folder: Path, pasted: str, mentioned: str | None
):
    for name in ("cat.png", "my cat.png"):
        (folder / name).write_bytes(b"\x89PNG")
    wanted = mentioned and mentioned.replace("{}", str(folder))
    assert attachments.pasted_picture(pasted.replace("{}", str(folder)), folder) == wanted
