"""`qchat completion`: what the scripts offer, asked of the real shells where they are installed."""

import os
import pty
import re
import select
import shutil
import subprocess
from pathlib import Path

import pytest

from qchat.tui.cli.arguments import parser
from qchat.tui.cli.main import main
from qchat.tui.cli.verbs import VERBS, parser_of
from qchat.tui.cli.verbs.completion import SCRIPTS

ASK_BASH = r"""
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_qchat qchat "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""
# what zsh is about to offer goes into a file, since it draws it on a screen
PREPARE_ZSH = r"""
PS1=$'\x52EADY> '; autoload -Uz compinit; compinit -u -D; source $SCRIPT
compadd() { local -a all; builtin compadd -O all "$@"; print -rl -- $all >>$FOUND; builtin compadd "$@" }
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a folder and a file in it, both with a space in their names."""
    (tmp_path / "my models").mkdir()
    (tmp_path / "my notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def script(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]):
    def of(shell: str) -> Path:
        if shutil.which(shell) is None:
            pytest.skip(f"{shell} is not installed")
        assert main(["completion", shell]) == 0
        path = tmp_path_factory.mktemp("script") / f"qchat.{shell}"
        path.write_text(capsys.readouterr().out)
        return path

    return of


def told(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""
    return done.stdout.splitlines()


def all_options(verb: str = "") -> set[str]:
    actions = (parser_of(verb) if verb else parser())._actions
    return {flag for action in actions for flag in action.option_strings}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_every_verb_and_option_is_in_every_script(shell: str, capsys: pytest.CaptureFixture[str]):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    prefix = {"fish": "-l "}.get(shell, "--")
    for name in ("", *VERBS):
        for flag in all_options(name):
            if flag.startswith("--"):
                assert f"{prefix}{flag[2:]}" in text
        assert name in text


@pytest.mark.parametrize("shell", SCRIPTS)
def test_every_shell_takes_its_script(shell: str, script):
    assert told(shell, "-n", str(script(shell))) == []


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["completion", "ash"]) == 2
    assert "bash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["se"], ["sessions"]),
        (["co"], ["compare", "completion", "config", "convert"]),
        (["my"], ["my models"]),
        (["--thin"], ["--think", "--thinking-budget"]),
        (["--effort", ""], ["none", "low", "medium", "high", "xhigh"]),
        (["--kv-bits", "1"], ["16"]),
        (["-p", ""], [""]),
        (["-f", "my"], ["my models", "my notes.txt"]),
        (["sessions", "e"], ["export"]),
        (["sessions", "--fo"], ["--force"]),
        (["config", "e"], ["edit"]),
        (["config", "--model", "my"], ["my models"]),
        (["completion", "z"], ["zsh"]),
        (["inspect", "my"], ["my models"]),
        (["sessions", "import", "my"], ["my models", "my notes.txt"]),
    ],
)
@pytest.mark.usefixtures("place")
def test_bash_completes(script, words: list[str], offered: list[str]):
    found = told("bash", "--norc", "-c", ASK_BASH, "bash", str(script("bash")), "qchat", *words)
    assert sorted(found) == sorted(offered)


def test_bash_offers_all_options(script):
    source = str(script("bash"))
    assert set(told("bash", "--norc", "-c", ASK_BASH, "bash", source, "qchat", "-")) == all_options()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("se", {"sessions"}),
        ("--effort ", {"none", "low", "medium", "high", "xhigh"}),
        ("sessions e", {"export"}),
        ("config --jso", {"--json"}),
        ("inspect my", {"my models/"}),
    ],
)
@pytest.mark.usefixtures("place")
def test_fish_completes(script, line: str, offered: set[str]):
    source = script("fish")
    found = told("fish", "--no-config", "-c", f"source {source}; complete -C 'qchat {line}'")
    assert {row.partition("\t")[0] for row in found} == offered


class Zsh:
    """zsh at a terminal, without which it completes nothing."""

    def __init__(self, source: Path, found: Path):
        self._found = found
        leader, follower = pty.openpty()
        self._leader = leader
        environment = {**os.environ, "SCRIPT": str(source), "FOUND": str(found), "TERM": "dumb"}
        self._process = subprocess.Popen(
            ["zsh", "-f", "-i"], stdin=follower, stdout=follower, stderr=follower, env=environment
        )
        os.close(follower)
        self._say(f"{PREPARE_ZSH}print DO''NE\n")

    def _say(self, text: str) -> None:
        """Return once it has printed DONE and reads keys again: before, the terminal would take ctrl+u."""
        os.write(self._leader, text.encode())
        seen = ""
        while not re.search("(?s)DONE.*READY> ", seen):
            assert select.select([self._leader], [], [], 30)[0], f"zsh does not go on: {seen}"
            seen += os.read(self._leader, 4096).decode(errors="replace")

    def offers(self, line: str) -> set[str]:
        """What tab offers at the end of `line`."""
        self._found.write_text("")
        self._say(f"{line}\t\x15print DO''NE\n")
        return set(self._found.read_text().split("\n")) - {""}

    def end(self) -> None:
        self._process.kill()
        self._process.wait(30)
        os.close(self._leader)


def test_zsh_completes(script, place: Path):
    zsh = Zsh(script("zsh"), place / "found")
    try:
        assert "completion" in zsh.offers("qchat comple")
        assert zsh.offers("qchat --effort xh") == {"xhigh"}
        assert zsh.offers("qchat sessions exp") == {"export"}
        assert "--thinking-budget" in zsh.offers("qchat --thinking-")
    finally:
        zsh.end()
