"""`qchat config`: what is in force, where each value comes from, and the file to be edited."""

import json
import stat
import sys
import tomllib
from pathlib import Path

import pytest

from qchat.tui.cli.main import main
from qchat.tui.cli.verbs.config import template
from qchat.tui.user.paths import config_file
from qchat.tui.user.settings import KEYS


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["config", *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_every_setting_is_listed_with_its_origin(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("QCHAT_SEED", "7")
    Path(".qchat.toml").write_text("theme = 'night'\nsystem = \"Two\\nlines\"\n")
    code, out, err = shown(capsys)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert list(rows) == list(KEYS)
    assert rows["seed"].split()[:3] == ["seed", "7", "QCHAT_SEED"]
    assert rows["theme"].split()[1:3] == ["night", str(Path(".qchat.toml").absolute())]
    assert "Two lines" in rows["system"]
    assert "generation_config.json" in rows["temperature"]


def test_only_the_keys_asked_for_are_shown(capsys: pytest.CaptureFixture[str]):
    _, out, _ = shown(capsys, "show", "top-p", "theme")
    assert [line.split()[0] for line in out.splitlines()] == ["setting", "top_p", "theme"]
    code, _, err = shown(capsys, "show", "them")
    assert code == 2
    assert "did you mean theme?" in err


def test_as_json_values_keep_their_kinds(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("QCHAT_MOUSE", "off")
    _, out, _ = shown(capsys, "show", "mouse", "measure", "--json")
    assert json.loads(out) == {
        "mouse": {"value": False, "origin": "QCHAT_MOUSE"},
        "measure": {"value": 100, "origin": "default"},
    }


def test_a_models_recommendations_are_shown_for_it(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "nonsense": 1}')
    _, out, _ = shown(capsys, "show", "temperature", "--model", str(folder), "--json")
    origin = str(folder / "generation_config.json")
    assert json.loads(out) == {"temperature": {"value": 0.25, "origin": origin}}


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 9999, '{"temperature": "hot"}'])
def test_a_models_bad_file_is_no_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str):
    (tmp_path / "generation_config.json").write_text(text)
    code, _, err = shown(capsys, "--model", str(tmp_path))
    assert code in (0, 2)
    assert "internal" not in err


def test_a_missing_model_is_a_sentence(capsys: pytest.CaptureFixture[str]):
    code, _, err = shown(capsys, "--model", "nowhere")
    assert (code, err) == (2, "qchat: --model: there is no model folder at nowhere\n")


def test_the_path_is_printed_for_scripts(capsys: pytest.CaptureFixture[str]):
    assert shown(capsys, "path") == (0, f"{config_file()}\n", "")
    assert shown(capsys, "path", "theme")[0] == 2


def editor(text: str) -> str:
    """An editor that appends `text`, as $EDITOR."""
    write = f"import sys; open(sys.argv[1], 'a').write({text!r})"
    return f'{sys.executable} -c "{write}"'


def test_editing_begins_with_all_keys_and_tells_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setenv("EDITOR", "true")
    assert shown(capsys, "edit") == (0, "", "")
    text = config_file().read_text()
    assert stat.S_IMODE(config_file().stat().st_mode) == 0o600
    assert tomllib.loads(text) == {}
    monkeypatch.setenv("EDITOR", editor("seed = 5"))
    assert shown(capsys, "edit")[0] == 0
    assert config_file().read_text() == f"{text}seed = 5"
    monkeypatch.setenv("VISUAL", editor("6\nseeed = 5"))
    code, _, err = shown(capsys, "edit")
    assert code == 2
    assert f"{config_file()}: there is no setting seeed; did you mean seed?" in err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("no-such-editor", "the editor no-such-editor cannot be started"),
        ("'", "$EDITOR is no command"),
        ("false", "ended with code 1"),
    ],
)
def test_an_editor_that_fails_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch, command: str, said: str
):
    monkeypatch.setenv("EDITOR", command)
    code, _, err = shown(capsys, "edit")
    assert code == 2
    assert said in err


def test_without_an_editor_of_the_users_it_is_what_every_system_has(
    capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
):
    nano = tmp_path / "nano"
    nano.write_text('#!/bin/sh\necho "seed = 5" >> "$1"\n')
    nano.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shown(capsys, "edit")[0] == 0
    assert config_file().read_text().endswith("seed = 5\n")


def test_the_template_names_every_key_and_is_toml_once_a_line_counts():
    text = template()
    lines = text.splitlines()
    for name in KEYS.keys() - {"keys"}:
        assert f"# {name} =" in lines
    assert tomllib.loads(text.replace("# seed =", "seed = 3")) == {"seed": 3}
