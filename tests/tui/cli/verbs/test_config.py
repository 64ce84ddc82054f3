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
        ("'", "$EDITOR is not a command"),
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


# --- get, set, unset ---

FILE = """# mine
seed = 4  # lucky

# the look
theme = 'night'

[keys]  # of actions
stop = "escape"
"""


@pytest.fixture
def file() -> Path:
    path = config_file()
    path.parent.mkdir(parents=True)
    path.write_text(FILE)
    return path


def test_a_value_in_force_is_printed_for_scripts(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("QCHAT_MODELS_DIR", "/a:/b c")
    monkeypatch.setenv("QCHAT_SYSTEM", "Two\nlines")
    assert shown(capsys, "get", "models-dir") == (0, "/a\n/b c\n", "")
    assert shown(capsys, "get", "models_dir", "--json") == (0, '["/a", "/b c"]\n', "")
    assert shown(capsys, "get", "system") == (0, "Two\nlines\n", "")
    assert shown(capsys, "get", "mouse") == (0, "true\n", "")
    assert shown(capsys, "get", "measure") == (0, "100\n", "")
    assert shown(capsys, "get", "seed") == (0, "", "")
    assert shown(capsys, "get", "sed") == (
        2,
        "",
        "qchat: qchat config get: there is no setting sed; did you mean seed?\n",
    )


def test_setting_a_value_keeps_every_other_line_and_comment(capsys: pytest.CaptureFixture[str], file: Path):
    assert shown(capsys, "set", "theme", "day") == (0, "", "")
    assert file.read_text() == FILE.replace("'night'", '"day"')
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert shown(capsys, "set", "top-p", "0.5") == (0, "", "")
    assert tomllib.loads(file.read_text()) == {
        "seed": 4,
        "theme": "day",
        "top_p": 0.5,
        "keys": {"stop": "escape"},
    }
    assert all(line in file.read_text() for line in ("# mine", "# lucky", "# the look", "# of actions"))


def test_a_set_value_is_the_one_in_force_and_can_be_unset(capsys: pytest.CaptureFixture[str]):
    for name, text, printed in (
        ("think", "auto", ""),
        ("think", "off", "false\n"),
        ("snapshot_budget", "2 KB", "2000\n"),
        ("stop", "END", "END\n"),
        ("presence_penalty", "-1.5", "-1.5\n"),
        ("system", 'Say "so".\nBriefly.', 'Say "so".\nBriefly.\n'),
    ):
        assert shown(capsys, "set", name, text) == (0, "", "")
        assert shown(capsys, "get", name) == (0, printed, "")
    assert shown(capsys, "unset", "system") == (0, "", "")
    assert shown(capsys, "get", "system") == (0, "", "")
    code, _, err = shown(capsys, "unset", "system")
    assert (code, err) == (2, f"qchat: {config_file()} does not set system\n")


@pytest.mark.parametrize("name", sorted(KEYS.keys() - {"keys", "servers"}))
def test_every_setting_can_be_set_by_its_own_name(capsys: pytest.CaptureFixture[str], name: str):
    texts = ("1", "true", "strip", "high", "16", "100", "1000", "night", "off", "speed", "shell")
    assert any(shown(capsys, "set", name, text)[0] == 0 for text in texts)
    assert name in tomllib.loads(config_file().read_text())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("set", "sed", "1"), "there is no setting sed; did you mean seed?"),
        (("set", "seed", "x"), "qchat config set: seed is 'x', wanted a whole number"),
        (("set", "keys", "x"), "keys is 'x', wanted a table"),
        (("set", "seed"), "1 words follow `qchat config set`, wanted `qchat config set NAME VALUE`"),
        (("set", "system", "Be", "brief."), "3 words follow"),
        (("get",), "wanted `qchat config get NAME`"),
        (("unset", "top_k"), "does not set top_k"),
        (("unset", "nonsense"), "there is no setting nonsense"),
    ],
)
def test_a_refused_change_leaves_the_file(
    capsys: pytest.CaptureFixture[str], file: Path, words: tuple[str, ...], said: str
):
    code, out, err = shown(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert file.read_text() == FILE


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"theme = ", "is not TOML"), (b"\xff", "is not UTF-8"), (b"#" * (65 << 10), "more than 64 KiB")],
)
@pytest.mark.parametrize("words", [("set", "seed", "1"), ("unset", "seed")])
def test_a_damaged_file_is_one_sentence_and_stays_as_it_is(
    capsys: pytest.CaptureFixture[str], file: Path, text: bytes, said: str, words: tuple[str, ...]
):
    file.write_bytes(text)
    code, _, err = shown(capsys, *words)
    assert code == 2
    assert err.count("\n") == 1
    assert str(file) in err
    assert said in err
    assert file.read_bytes() == text


def test_a_wrong_name_or_value_in_the_file_can_be_put_right(capsys: pytest.CaptureFixture[str], file: Path):
    file.write_text("seeed = 5\nseed = 'x'\n")
    code, _, err = shown(capsys, "set", "seed", "5")
    assert code == 0
    assert "seed is saved" in err
    assert "did you mean seed?" in err
    assert shown(capsys, "unset", "seeed") == (0, "", "")
    assert file.read_text() == "seed = 5\n"


def test_a_source_that_takes_precedence_is_named(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("QCHAT_SEED", "7")
    code, _, err = shown(capsys, "set", "seed", "5")
    assert (code, err) == (
        0,
        f"qchat: seed is saved in {config_file()}, but here QCHAT_SEED takes precedence\n",
    )


def test_what_cannot_be_written_is_a_sentence(capsys: pytest.CaptureFixture[str], file: Path):
    file.unlink()
    file.symlink_to(file)
    code, _, err = shown(capsys, "set", "seed", "5")
    assert code == 2
    assert err.count("\n") == 1
    assert str(file) in err
