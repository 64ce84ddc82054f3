"""The user's editor: which one, what it is given, and what it leaves."""

import stat
from pathlib import Path

import pytest

from qchat.core.errors import UsageError
from qchat.tui.user.editor import edit, editor


def script(folder: Path, body: str) -> dict[str, str]:
    path = folder / "my editor"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return {"EDITOR": f"'{path}' --wait"}


def test_the_text_comes_back_as_it_was_left(tmp_path: Path):
    env = script(tmp_path, 'printf "%s and more\\n" "$(cat "$2")" > "$2"')
    assert edit("wörd", env) == "wörd and more"


def test_only_the_user_can_read_it_meanwhile(tmp_path: Path):
    seen = tmp_path / "seen"
    edit(
        "secret",
        script(
            tmp_path, f'stat -c %a "$(dirname "$2")" > "{seen}" || stat -f %Lp "$(dirname "$2")" > "{seen}"'
        ),
    )
    assert int(seen.read_text(), 8) & (stat.S_IRWXG | stat.S_IRWXO) == 0


def test_an_editor_that_failed_changes_nothing(tmp_path: Path):
    assert edit("text", script(tmp_path, 'echo other > "$2"; exit 1')) is None


def test_visual_comes_before_editor():
    assert editor({"VISUAL": "code --wait", "EDITOR": "ed"}) == ["code", "--wait"]


@pytest.mark.parametrize(
    ("env", "why"),
    [({"EDITOR": "no-such-editor"}, "cannot be started"), ({"EDITOR": "'open"}, "is not a command")],
)
def test_an_editor_that_is_none_is_refused_in_a_sentence(env: dict[str, str], why: str):
    with pytest.raises(UsageError, match=why):
        edit("text", env)


def test_what_is_no_text_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot be read"):
        edit("text", script(tmp_path, "printf '\\377' > \"$2\""))
