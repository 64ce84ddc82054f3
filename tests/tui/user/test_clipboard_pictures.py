"""Pictures on the clipboard: by whichever program this desktop has, or one sentence."""

import sys
from pathlib import Path

import pytest

from qchat.core.errors import UsageError
from qchat.tui.user import clipboard

PICTURE = b"\x89PNG\r\n\x1a\nrest"
APPLESCRIPT = f"\u00abdata PNGf{PICTURE.hex().upper()}\u00bb"


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("platform", "name", "variables", "output"),
    [
        ("darwin", "pngpaste", {}, PICTURE),
        ("darwin", "osascript", {}, APPLESCRIPT.encode()),
        ("linux", "wl-paste", {"WAYLAND_DISPLAY": "w"}, PICTURE),
        ("linux", "xclip", {"DISPLAY": ":0"}, PICTURE),
    ],
)
def test_the_picture_on_the_clipboard_becomes_a_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    name: str,
    variables: dict[str, str],
    output: bytes,
):
    here(monkeypatch, tmp_path, platform, variables)
    program(tmp_path, name, f"sys.stdout.buffer.write({output!r})")
    first, second = (clipboard.picture(tmp_path / "pasted") for _ in range(2))
    assert (first.name, second.name) == ("picture-1.png", "picture-2.png")
    assert first.read_bytes() == second.read_bytes() == PICTURE


@pytest.mark.parametrize(
    ("platform", "body", "words"),
    [
        ("darwin", None, "no program here reads pictures from the clipboard .wanted pngpaste or osascript"),
        ("linux", None, "no program here reads pictures from the clipboard .wanted wl-paste or xclip"),
        ("darwin", "sys.exit(1)", "the clipboard holds no picture"),
        ("darwin", "print('text')", "the clipboard holds no picture"),
    ],
)
def test_a_clipboard_without_a_picture_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, body: str | None, words: str
):
    here(monkeypatch, tmp_path, platform, {})
    if body is not None:
        program(tmp_path, "pngpaste", body)
    with pytest.raises(UsageError, match=words):
        clipboard.picture(tmp_path / "pasted")
    assert not (tmp_path / "pasted").exists()


def here(monkeypatch: pytest.MonkeyPatch, folder: Path, platform: str, variables: dict[str, str]) -> None:
    """Be on another platform, with the programs of `folder` alone."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("PATH", str(folder))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
