"""Settings: which of several sources counts, what each may say, and what is refused how."""

import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.core.errors import UsageError
from qchat.tui.cli.arguments import parser
from qchat.tui.user.paths import cache_dir, config_dir, config_file, data_dir, state_dir
from qchat.tui.user.settings import KEYS, OTHER_VARIABLES, PROJECT_FILE, Settings, key_of, save
from qchat.tui.user.toml_file import MAX_FILE_NBYTES, read_toml
from tests.paths import ROOT

GIVEN = {"temperature": "0.1", "top_p": "0.2", "top_k": "3", "min_p": "0.4", "seed": "5"}


def write_user(text: str) -> Path:
    path = config_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        settings()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_any_source_everything_is_the_default(tmp_path: Path):
    settings = Settings.load(cwd=tmp_path)
    assert {name: settings[name] for name in settings} == {key.name: key.default for key in KEYS.values()}
    assert {settings.origin(name) for name in settings} == {"default"}
    assert (settings.reply(), settings.session()) == ({}, {})


def test_a_flag_counts_over_an_option_a_variable_a_project_a_user_and_a_model(tmp_path: Path):
    """Each source gives one key less than the one below it."""
    user = write_user("temperature = 1\ntop_p = 0.1\ntop_k = 1\nmin_p = 0.1\nseed = 1\n")
    project = tmp_path / PROJECT_FILE
    project.write_text("temperature = 2\ntop_p = 0.2\ntop_k = 2\nmin_p = 0.2\n")
    env = {**os.environ, "QCHAT_TEMPERATURE": "3", "QCHAT_TOP_P": "0.3", "QCHAT_TOP_K": "3"}
    settings = Settings.load({"temperature": 5.0}, tmp_path, env, ["temperature=4", "top-p=0.4"])
    settings = settings.with_model({"seed": 9, "temperature": 9, "presence_penalty": 6}, "model")
    assert {name: (settings[name], settings.origin(name)) for name in (*GIVEN, "presence_penalty")} == {
        "temperature": (5.0, "--temperature"),
        "top_p": (0.4, "-o top_p"),
        "top_k": (3, "QCHAT_TOP_K"),
        "min_p": (0.2, str(project)),
        "seed": (1, str(user)),
        "presence_penalty": (6, "model"),
    }
    assert settings.given("seed")
    assert not settings.given("presence_penalty")
    assert not settings.given("theme")


def test_what_was_given_is_named_as_the_session_names_it(tmp_path: Path):
    options = ["think=off", "effort=low", "max_tokens=9", "kv_bits=8", "system=Be brief.", "stop=END"]
    settings = Settings.load(cwd=tmp_path, options=[*options, "context-limit=512", "snapshot-budget=2 GB"])
    assert settings.reply() == {
        "enable_thinking": False,
        "reasoning_effort": "low",
        "max_new_tokens": 9,
        "stop": ["END"],
    }
    assert settings.session() == {
        "system": "Be brief.",
        "context_limit": 512,
        "snapshot_budget": 2 * 10**9,
        "quantized_kv": True,
    }


def test_thinking_left_to_the_model_is_not_sent(tmp_path: Path):
    settings = Settings.load(cwd=tmp_path, options=["think=auto"])
    assert settings.given("think")
    assert settings.reply() == {}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("snapshot_budget=512 MiB", 512 << 20),
        ("snapshot_budget=1.5g", 1_500_000_000),
        ("snapshot_budget=0", 0),
        ("measure=0", 0),
        ("mouse=off", False),
        ("mouse=YES", True),
        ("kv_bits=8", 8),
        ("stop=a,b", ["a,b"]),
        (f"models_dir=/a{os.pathsep}/b", ["/a", "/b"]),
        ("theme=solar-dark", "solar-dark"),
        ("shown_panes=memory, Speed", ["speed", "memory"]),
        ("temperature=1e-1", 0.1),
    ],
)
def test_words_become_values(tmp_path: Path, option: str, value: Any):
    settings = Settings.load(cwd=tmp_path, options=[option])
    assert settings[option.partition("=")[0]] == value


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("temperature=hot", "-o: temperature is 'hot', wanted a number from 0 to 100"),
        ("temperature=nan", "wanted a number from 0 to 100"),
        ("temperature=inf", "wanted a number from 0 to 100"),
        ("top_k=1.5", "wanted a whole number"),
        ("measure=5", "from 40 to 400, or 0"),
        ("snapshot_budget=-1", "'2 GB' or '512 MiB'"),
        ("snapshot_budget=99999999999999 GB", "'2 GB' or '512 MiB'"),
        ("kv_bits=4", "wanted 8 or 16"),
        ("think=perhaps", "wanted true, false or auto"),
        ("theme=../../x", "wanted the name of a theme"),
        ("system=", "wanted a text"),
        ("keys=x", "wanted a table"),
        ("tempreture=1", "-o: there is no setting tempreture; did you mean temperature?"),
        ("max_new_tokns=1", "did you mean max_tokens?"),
        ("zzzz=1", "there is no setting zzzz; known are model,"),
        ("temperature", "-o temperature: wanted KEY=VALUE"),
    ],
)
def test_a_bad_option_is_refused_with_what_was_wanted(tmp_path: Path, option: str, said: str):
    assert said in refused(lambda: Settings.load(cwd=tmp_path, options=[option]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temperature = 'hot'", "temperature is 'hot', wanted a number"),
        ("temperature = true", "temperature is True, wanted a number"),
        ("kv_bits = true", "wanted 8 or 16"),
        ("top_k = 1.0", "wanted a whole number"),
        ("stop = ['a', '']", "wanted at most 32 texts, none of them empty"),
        ("keys = 3", "wanted a table"),
        ("thme = 'x'", "there is no setting thme; did you mean theme?"),
        ("theme = ", "is not TOML"),
        ("x = " + "[" * 5000, "nests deeper"),
        ("#" * (MAX_FILE_NBYTES + 1), "has more than 64 KiB"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, said: str):
    path = write_user(text)
    sentence = refused(lambda: Settings.load(cwd=tmp_path))
    assert str(path) in sentence
    assert said in sentence


def test_a_file_that_is_no_text_or_no_file_is_refused_by_name(tmp_path: Path):
    path = tmp_path / PROJECT_FILE
    path.write_bytes(b"theme = '\xff'")
    assert "is not UTF-8: byte 9 is 0xff" in refused(lambda: Settings.load(cwd=tmp_path))
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is not a regular file" in refused(lambda: Settings.load(cwd=tmp_path))


@pytest.mark.parametrize("name", sorted(key.name for key in KEYS.values() if not key.project))
def test_a_project_may_not_set_what_names_files_keys_or_memory(tmp_path: Path, name: str):
    (tmp_path / PROJECT_FILE).write_text(f"{name} = 'x'\n")
    assert f"{name} may not be set by a project" in refused(lambda: Settings.load(cwd=tmp_path))


def test_a_project_may_only_shape_replies_and_their_look():
    looks = {"system", "show_thinking", "history", "theme", "measure"}
    names_a_file = {"schema"}
    assert {key.name for key in KEYS.values() if key.project} == looks | {
        key.name for key in KEYS.values() if key.reply and key.name not in names_a_file
    }


def test_a_slip_in_a_variables_name_is_refused_and_others_are_let_be(tmp_path: Path):
    def load(**env: str) -> Settings:
        return Settings.load(cwd=tmp_path, env={"HOME": str(tmp_path), **env})

    assert load(QCHAT_TEMPERATURE="")["temperature"] is None
    assert load(QCHAT_SOMETHING_ELSE="1", **dict.fromkeys(OTHER_VARIABLES - {"QCHAT_CONFIG_DIR"}, "1"))
    assert "did you mean QCHAT_DRAFTS?" in refused(lambda: load(QCHAT_DRAFT="1"))
    assert "did you mean QCHAT_TEMPERATURE?" in refused(lambda: load(QCHAT_TEMPERATUR="1"))
    assert "QCHAT_TOP_K: top_k is 'x'" in refused(lambda: load(QCHAT_TOP_K="x"))


def test_the_variables_of_others_are_those_that_the_program_reads():
    files = [path for part in ("core", "tui") for path in (ROOT / part).rglob("*.py")]
    read = {name for path in files for name in re.findall(r"QCHAT_[A-Z_]+", path.read_text(encoding="utf-8"))}
    assert read - {f"QCHAT_{name.upper()}" for name in KEYS} == OTHER_VARIABLES


@given(st.text(max_size=30))
def test_no_word_makes_any_key_fail_but_in_a_sentence(word: str):
    for key in KEYS.values():
        try:
            key.check(key.parse(word, "here"), "here")
        except UsageError as error:
            assert str(error).startswith(f"here: {key.name} is ")


def test_every_flag_that_is_a_setting_agrees_with_its_key(tmp_path: Path):
    """What the parser takes for granted, the table of keys must take too."""
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "string"}')
    words = [
        *("--schema", str(schema)),
        *("--think", "--effort", "low", "--thinking-budget", "5", "--max-tokens", "6", "--stop", "x"),
        *("--temperature", "0.5", "--top-p", "0.5", "--top-k", "5", "--min-p", "0.1", "--seed", "1"),
        *("--repetition-penalty", "1.1", "--presence-penalty", "1", "--frequency-penalty", "1"),
        *("--history", "strip", "--context-limit", "512", "--snapshot-budget", "1 GB", "--kv-bits", "8"),
        *("--image-tokens", "64"),
        *("--system", "x", "--show-thinking", "--plain", "--screen-reader", "--theme", "night"),
    ]
    flags = {name: value for name, value in vars(parser().parse_args(words)).items() if name in KEYS}
    settings = Settings.load({**flags, "model": None}, tmp_path)
    missing = {"model", "models_dir", "measure", "copy_on_select", "mouse", "keys", "drafts", "stop_loops"}
    missing |= {"panes", "shown_panes", "tools", "max_tool_rounds", "servers"}
    missing |= {"live_bench", "notify", "pictures", "window_title"}
    assert {name for name in KEYS if not settings.given(name)} == missing
    assert settings.origin("top_p") == "--top-p"
    assert settings.reply()["schema"] == {"type": "string"}


def test_a_setting_replaced_is_checked_and_the_others_stay(tmp_path: Path):
    before = Settings.load({"seed": 1}, tmp_path)
    after = before.replaced("/set", temperature=0.5)
    assert (before["temperature"], after["temperature"], after["seed"]) == (None, 0.5, 1)
    assert (after.origin("temperature"), after.origin("seed")) == ("/set", "--seed")
    assert "/set: temperature is -1" in refused(lambda: before.replaced("/set", temperature=-1))


def test_dashes_stand_for_underscores():
    assert key_of("top-p", "here").name == "top_p"


# --- what is written ---


def test_remembering_changes_one_line_and_makes_the_file_private(tmp_path: Path):
    save("theme", "night")
    path = config_file()
    assert read_toml(path) == {"theme": "night"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.write_text("# mine\nseed = 4  # a comment\ntheme = 'night' # old\n\n[keys]\nstop = 'escape'\n")
    save("theme", "day")
    text = "# mine\nseed = 4  # a comment\ntheme = \"day\" # old\n\n[keys]\nstop = 'escape'\n"
    assert path.read_text() == text
    assert Settings.load(cwd=tmp_path)["theme"] == "day"


@pytest.mark.parametrize("text", ['system = """\ntheme = 1\n"""\n', "[keys]\ntheme = 'x'\n"])
def test_remembering_never_changes_anything_else(text: str):
    path = write_user(text)
    try:
        save("theme", "day")
    except UsageError as error:
        assert 'write theme = "day" at its beginning' in str(error)
        assert path.read_text() == text
    else:
        assert read_toml(path)["theme"] == "day"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment",
        "[keys]\nstop = 'escape'\n",
        "keys.stop = 'escape'\nseed = 1",
        "keys = {stop = 'escape'} # inline\n\n\nseed = 1\n",
        "\r\nseed = 1\r\n",
        "stop = [\n  'a', # one\n  'b',\n]\n[keys]\n[keys.transcript]\ncopy = 'x'\n",
        'system = """\n[keys]\ntheme = 1\n"""\n',
        "theme = 'x'",
    ],
)
def test_saving_keeps_all_other_values_and_lines_of_any_file(text: str):
    path = write_user(text)
    before = read_toml(path)
    save("theme", "day")
    assert read_toml(path) == before | {"theme": "day"}
    kept = [line for line in text.splitlines() if not line.startswith("theme = 'x'")]
    assert [line for line in path.read_text().splitlines() if line in kept] == kept


def test_remembering_through_a_link_changes_what_it_leads_to(tmp_path: Path):
    """Settings are often kept elsewhere, and linked to."""
    path = write_user("")
    real = tmp_path / "dotfiles.toml"
    real.write_text("seed = 1\n")
    path.unlink()
    path.symlink_to(real)
    save("theme", "day")
    assert path.is_symlink()
    assert read_toml(real) == {"theme": "day", "seed": 1}


# --- where files are ---


def test_folders_follow_the_specification_and_are_private(hermetic: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in (data_dir(), state_dir(), cache_dir()):
        assert folder.name == "qchat"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert data_dir() == hermetic / "data" / "qchat"
    assert config_dir() == hermetic / "config" / "qchat"
    monkeypatch.setenv("XDG_DATA_HOME", "not/absolute")
    assert data_dir() == hermetic / ".local/share/qchat"
    monkeypatch.setenv("QCHAT_CONFIG_DIR", str(hermetic / "own"))
    assert config_file() == hermetic / "own" / "config.toml"


def test_folders_that_cannot_be_made_or_found_are_refused_in_a_sentence(hermetic, monkeypatch):
    (hermetic / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(hermetic / "file"))
    with pytest.raises(UsageError, match="cannot be made: Not a directory"):
        data_dir()
    monkeypatch.setenv("QCHAT_CONFIG_DIR", "~nosuchuser/config")
    with pytest.raises(UsageError, match="~nosuchuser/config is no path"):
        config_dir()
