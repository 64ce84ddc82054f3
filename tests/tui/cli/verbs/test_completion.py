"""`qchat completion`: what is offered, asked of the real shells where they are installed."""

import os
import pty
import re
import resource
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qchat.core import Store
from qchat.core.hub.catalog import PUBLISHED
from qchat.tui.cli.arguments import parser
from qchat.tui.cli.main import main
from qchat.tui.cli.verbs import VERBS, parser_of
from qchat.tui.cli.verbs.completion import SHELLS
from qchat.tui.user.paths import conversations_file
from qchat.tui.user.settings import KEYS
from tests.paths import ROOT

MAX_CPU_SECONDS = 0.3
ASK_BASH = r"""
source "$1"; COMP_LINE="$2"; COMP_POINT=${#2}; COMP_TYPE=9
_python_argcomplete qchat
printf '%s\n' "${COMPREPLY[@]}"
"""
# what zsh is about to offer goes into a file, since it draws it on a screen
PREPARE_ZSH = r"""
PS1=$'\x52EADY> '; autoload -Uz compinit; compinit -u -D; source $SCRIPT
compadd() { local -a all; builtin compadd -O all "$@"; print -rl -- $all >>$FOUND; builtin compadd "$@" }
"""


@pytest.fixture
def place(tmp_path: Path, hermetic: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a folder and a file, both with a space in their names; two models; qchat."""
    for name in ("Qwen3.6-27B-4bit", "owner/Qwen3.6-35B"):
        folder = hermetic / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    work = tmp_path / "work"
    (work / "my models").mkdir(parents=True)
    (work / "my notes.txt").touch()
    monkeypatch.chdir(work)
    program = tmp_path / "bin" / "qchat"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT}/.dev exec {sys.executable} -m qchat.tui "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return work


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout.splitlines()


def offered(line: str, folder: Path) -> set[str]:
    """Return what qchat offers a shell for the last word of `line`, without a shell."""
    output = folder / "offered"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(output),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    done = subprocess.run(["qchat"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(output.read_text().split("\n")) - {""}


def all_options(verb: str = "") -> set[str]:
    actions = (parser_of(verb) if verb else parser())._actions
    return {flag for action in actions for flag in action.option_strings}


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_option_of_every_verb_is_offered(verb: str, place: Path):
    assert offered(f"qchat {verb} -" if verb else "qchat -", place) == all_options(verb)


def test_the_first_word_is_a_verb_or_a_model_and_the_second_never_a_verb(place: Path):
    first = offered("qchat ", place)
    assert first == {*VERBS, "Qwen3.6-27B-4bit", "owner/Qwen3.6-35B", "embedded", "my\\ models/"}
    assert not offered("qchat Qwen3.6-27B-4bit ", place)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_takes_its_script(shell: str, script):
    assert told(shell, "-n", str(script(shell))) == []


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["completion", "ash"]) == 2
    assert "bash" in capsys.readouterr().err


WORDS = [
    ("se", ["serve", "sessions"]),
    ("co", ["compare", "completion", "config", "convert"]),
    ("my", ["my\\ models/"]),
    ("--thin", ["--think", "--thinking-budget"]),
    ("--effort ", ["none", "low", "medium", "high", "xhigh"]),
    ("--kv-bits 1", ["16"]),
    ("-p ", []),
    ("-f my", ["my\\ models/", "my\\ notes.txt"]),
    ("sessions e", ["export"]),
    ("sessions export 1 --fo", ["--force"]),
    ("config e", ["edit"]),
    ("config --model my", ["my\\ models/"]),
    ("completion z", ["zsh"]),
    ("inspect my", ["my\\ models/"]),
    ("sessions import my", ["my\\ models/", "my\\ notes.txt"]),
    # values that are known here
    ("Qwen", ["Qwen3.6-27B-4bit"]),
    ("owner", ["owner/Qwen3.6-35B"]),
    ("bench Qwen3.6-27B-4bit ow", ["owner/Qwen3.6-35B"]),
    ("convert -i Qw", ["Qwen3.6-27B-4bit"]),
    ("eval --reference Qw", ["Qwen3.6-27B-4bit"]),
    ("models rm Qw", ["Qwen3.6-27B-4bit"]),
    ("pull ", [model.id for model in PUBLISHED]),
    ("--theme ni", ["night"]),
    ("-o the", ["theme="]),
    ("-o theme=da", ["day"]),
    ("-o think=", ["on", "off", "auto"]),
    ("convert -q --q-recipe mixed_3", ["mixed_3_4", "mixed_3_6"]),
    ("config get ", list(KEYS)),
    ("config set thin", ["think", "thinking_budget"]),
    ("config set theme ni", ["night"]),
    ("config set theme night ", []),
    ("config set effort x", ["xhigh"]),
    ("config set model Qw", ["Qwen3.6-27B-4bit"]),
    ("config show top_p top", ["top_p", "top_k"]),
]


@pytest.mark.parametrize(("words", "expected"), WORDS)
@pytest.mark.usefixtures("place")
def test_bash_completes(script, words: str, expected: list[str]):
    found = told("bash", "--norc", "-c", ASK_BASH, "bash", str(script("bash")), f"qchat {words}")
    assert sorted(word.rstrip(" ") for word in found if word) == sorted(expected)


def test_conversations_are_offered_by_number_and_title(place: Path):
    with Store(conversations_file()) as store:
        for title in ("Merge sort", "Cats\x1b[31m"):
            store.create(title=title)
    assert offered("qchat --session ", place) == {"1", "2", "latest"}
    assert offered("qchat sessions show me", place) == set()
    assert offered("qchat sessions export Me", place) == {"Merge\\ sort"}
    assert offered("qchat sessions rm 1 ", place) == {"1", "2", "latest"}


def test_your_personas_are_offered(place: Path, hermetic: Path):
    folder = hermetic / "config" / "qchat" / "personas"
    folder.mkdir(parents=True)
    (folder / "poet.toml").write_text("seed = 1")
    assert offered("qchat --persona p", place) == {"poet"}


def test_your_own_themes_are_offered(place: Path, hermetic: Path):
    folder = hermetic / "config" / "qchat" / "themes"
    folder.mkdir(parents=True)
    (folder / "nimbus.toml").touch()
    assert offered("qchat --theme ni", place) == {"night", "nimbus"}


@pytest.mark.usefixtures("place")
def test_a_damaged_settings_file_offers_nothing_and_prints_nothing(script, hermetic: Path):
    path = hermetic / "config" / "qchat" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text("theme = ")
    assert told("bash", "--norc", "-c", ASK_BASH, "bash", str(script("bash")), "qchat Qw") == [""]


@pytest.mark.parametrize(
    "line", ["qchat Qw", "qchat convert -q --q-recipe ", "qchat sessions show ", "qchat --th"]
)
def test_completing_takes_little_time(line: str, place: Path):
    """Processor seconds of a whole process, the best of three: other processes disturb the others."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert offered(line, place) is not None
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < MAX_CPU_SECONDS


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("config", "get", "theme")])
def test_nothing_else_imports_what_completes_or_edits(words: tuple[str, ...]):
    code = f"""
import sys
from qchat.tui.cli.main import main
code = main({list(words)!r})
assert not {{"argcomplete", "tomlkit", "qchat.tui.cli.completers"}} & sys.modules.keys()
sys.exit(code)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("se", {"serve", "sessions"}),
        ("--effort ", {"none", "low", "medium", "high", "xhigh"}),
        ("sessions e", {"export"}),
        ("config --jso", {"--json"}),
        ("inspect my", {"my models/"}),
        ("inspect Qw", {"Qwen3.6-27B-4bit"}),
        ("--theme ni", {"night"}),
    ],
)
@pytest.mark.usefixtures("place")
def test_fish_completes(script, line: str, expected: set[str]):
    source = script("fish")
    found = told("fish", "--no-config", "-c", f"source {source}; complete -C 'qchat {line}'")
    assert {row.partition("\t")[0].replace("\\ ", " ") for row in found} == expected


class Shell:
    """A shell at a terminal, which shows "READY> " when it reads keys."""

    def __init__(self, *command: str, prepare: str, **environment: str):
        leader, follower = pty.openpty()
        self._leader = leader
        self._process = subprocess.Popen(
            command,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "200", **environment},
            start_new_session=True,
        )
        os.close(follower)
        self.say(f"{prepare}printf 'DO''NE\\n'\n")

    def say(self, text: str, pattern: str = "(?s)DONE.*READY> ") -> str:
        """Type `text` and return what the terminal shows up to `pattern`, by default a new prompt."""
        os.write(self._leader, text.encode())
        seen = ""
        while not re.search(pattern, seen):
            assert select.select([self._leader], [], [], 60)[0], f"in vain: {seen}"
            seen += os.read(self._leader, 4096).decode(errors="replace")
        return seen

    def end(self) -> None:
        self._process.kill()
        self._process.wait(30)
        os.close(self._leader)


@pytest.mark.usefixtures("place")
def test_bash_completes_at_a_terminal(script):
    """Tab completes the name of a model, in the line that is being typed."""
    prepare = "PS1='REA''DY> '; source $SCRIPT; "
    shell = Shell("bash", "--norc", "--noprofile", "-i", prepare=prepare, SCRIPT=str(script("bash")))
    try:
        shell.say("qchat inspect Qwe\t", "qchat inspect Qwen3.6-27B-4bit ")
        shell.say("--ten\t", "--tensors ")
    finally:
        shell.end()


def test_zsh_completes(script, place: Path):
    found = place / "found"
    zsh = Shell("zsh", "-f", "-i", prepare=PREPARE_ZSH, SCRIPT=str(script("zsh")), FOUND=str(found))

    def offers(line: str) -> set[str]:
        """What tab offers at the end of `line`."""
        found.write_text("")
        # once DONE is printed keys are read again: before, the terminal itself would take ctrl+u
        zsh.say(f"{line}\t\x15printf 'DO''NE\\n'\n")
        return set(found.read_text().split("\n")) - {""}

    try:
        assert "completion" in offers("qchat comple")
        assert offers("qchat --effort xh") == {"xhigh"}
        assert offers("qchat sessions exp") == {"export"}
        assert "--thinking-budget" in offers("qchat --thinking-")
        assert offers("qchat inspect Qw") == {"Qwen3.6-27B-4bit"}
    finally:
        zsh.end()
