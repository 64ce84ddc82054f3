"""`qchat help`, the help of each command, and the suggestion for a mistyped one."""

import io
from pathlib import Path

import pytest

from qchat.core.errors import UsageError
from qchat.tui.cli import choice, verbs
from qchat.tui.cli.main import main
from qchat.tui.cli.verbs import VERBS, closest_verb


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and nothing on stdin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    assert main(words) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qchat: ")
    return err.removeprefix("qchat: ").strip()


def test_help_is_what_the_option_prints(capsys: pytest.CaptureFixture[str]):
    assert printed(capsys, "help") == printed(capsys, "--help") == printed(capsys, "-h")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_command_is_what_its_option_prints(verb: str, capsys: pytest.CaptureFixture[str]):
    shown = printed(capsys, "help", verb)
    assert shown == printed(capsys, verb, "--help")
    assert shown.startswith(f"usage: qchat {verb}")


def test_commands_are_listed_one_a_line_and_fit_a_terminal(capsys: pytest.CaptureFixture[str]):
    lines = printed(capsys, "help").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("commands"))
    listed = lines[start + 1 : start + 1 + len(VERBS)]
    assert [line.split(maxsplit=1) for line in listed] == [list(verb) for verb in VERBS.items()]
    assert all(len(line) < 80 for line in listed)


@pytest.mark.parametrize(
    ("word", "verb"),
    [
        ("convertt", "convert"),
        ("Convert", "convert"),
        ("model", "models"),
        ("benhc", "bench"),
        ("hlep", "help"),
    ],
)
def test_a_mistyped_command_is_answered_with_the_nearest(
    word: str, verb: str, capsys: pytest.CaptureFixture[str]
):
    sentence = f"{word} is neither a command nor a model; did you mean `qchat {verb}`?"
    assert error(capsys, word) == sentence
    assert error(capsys, word, "-i", "MODEL", "--q-bits", "4") == sentence
    assert error(capsys, word, "-p", "hello") == sentence


def test_help_of_a_mistyped_command_names_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert error(capsys, "help", "convertt") == (
        "there is no command convertt; did you mean `qchat help convert`?"
    )
    assert error(capsys, "help", "zzz").endswith(f"the commands are {', '.join(VERBS)}")


def test_a_word_like_no_command_is_a_model(capsys: pytest.CaptureFixture[str]):
    assert closest_verb("zzz") is None
    assert "there is no model zzz" in error(capsys, "zzz", "-p", "hello", code=3)


@pytest.mark.parametrize("word", ["./convertt", "owner/convertt", "--convertt"])
def test_paths_ids_and_options_are_never_taken_for_a_command(word: str, capsys: pytest.CaptureFixture[str]):
    assert main([word, "-p", "hello"]) != 0
    assert "did you mean `qchat" not in capsys.readouterr().err


def test_a_path_or_model_named_like_a_command_is_used(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert choice.is_path_or_model("built-in")
    assert choice.is_path_or_model("Qwen3.6-27B-UD-Q2_K_XL-mlx"), "a published model"
    assert not choice.is_path_or_model("benches")
    (elsewhere / "models" / "benches").mkdir(parents=True)
    (elsewhere / "models" / "benches" / "config.json").write_text("{}")
    monkeypatch.setenv("QCHAT_MODELS_DIR", str(elsewhere / "models"))
    assert choice.is_path_or_model("benches") and choice.is_path_or_model("benche")
    (elsewhere / "convertt").mkdir()
    assert "there is no model convertt" in error(capsys, "convertt", "-p", "hello", code=3)


def test_the_parser_of_help_names_the_option_it_refuses():
    with pytest.raises(UsageError, match="qchat help --help"):
        verbs.run("help", ["convert", "eval"])
