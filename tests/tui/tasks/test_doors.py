"""Both doors of every task, `qchat NAME` and `/NAME`: the same options, and the same words for a result."""

import argparse
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import qchat.core as core
from qchat.core import BUILT_IN_MODEL, Store
from qchat.tui.cli.main import main
from qchat.tui.cli.verbs import VERBS, parser_of
from qchat.tui.commands import BY_NAME, completions
from qchat.tui.commands.task_command import TaskCommand
from qchat.tui.tasks import TASKS, load_task
from qchat.tui.tasks.base import EngineTask, add_json
from qchat.tui.text.report import Report, report_plain
from qchat.tui.user.paths import conversations_file
from tests.tui.chat_stage import ChatStage, at_rest
from tests.tui.conversing import talk
from tests.tui.fake_front import FakeFront
from tests.tui.task_results import results

ENGINE_TASKS = [name for name in TASKS if isinstance(load_task(name), EngineTask)]
# a line for each task, with words that both doors take, and the engine's method that it calls
LINES = {
    "bench": (f"{BUILT_IN_MODEL}", "bench"),
    "calibrate": (f"{BUILT_IN_MODEL} -o x.gguf", "calibrate"),
    "compare": (f"{BUILT_IN_MODEL} {BUILT_IN_MODEL} Where?", "compare"),
    "convert": (f"{BUILT_IN_MODEL} new -q", "convert"),
    "convert --plan": (f"{BUILT_IN_MODEL} -q --plan", "plan"),
    "eval": (f"{BUILT_IN_MODEL}", "eval"),
    "inspect": (f"{BUILT_IN_MODEL}", "inspect"),
    "plan": (f"{BUILT_IN_MODEL}", "memory_plan"),
}


def command(name: str) -> TaskCommand:
    found = BY_NAME[name]
    assert isinstance(found, TaskCommand)
    return found


def described(parser: argparse.ArgumentParser) -> list[Any]:
    """Everything that one can write there, and what is said of it, actions' own options included."""
    known = []
    for action in parser._actions:
        own = (action.option_strings, action.dest, action.nargs, action.metavar, action.type, action.help)
        if isinstance(action, argparse._SubParsersAction):
            inner = [(name, described(part)) for name, part in action.choices.items()]
            known.append((type(action), *own, inner))
        else:
            known.append((type(action), *own, action.default, action.required, action.choices))
    return known


def doors_agree(name: str) -> bool:
    line, chat = parser_of(name), command(name).parser()
    return described(line) == described(chat) and line.description == chat.description


@pytest.mark.parametrize("name", TASKS)
def test_both_doors_have_exactly_the_same_options(name: str):
    assert name in VERBS and name in BY_NAME
    assert doors_agree(name)


@pytest.mark.parametrize("name", TASKS)
def test_an_option_that_one_door_lacks_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    with_it = command(name).parser()
    with_it.add_argument("--only-here", action="store_true")
    monkeypatch.setattr(TaskCommand, "parser", lambda _: with_it)
    assert not doors_agree(name)


@pytest.mark.parametrize("name", TASKS)
def test_the_registry_has_each_task_with_the_first_line_of_its_help(name: str):
    task = load_task(name)
    page = (inspect.getdoc(task) or "").split("\n")
    assert (task.name, page[0]) == (name, TASKS[name])


def test_a_task_of_the_engine_has_a_line_here():
    assert {line.split()[0] for line in LINES} == set(ENGINE_TASKS)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line's jobs give what the chat's scripted engine gives."""
    monkeypatch.chdir(tmp_path)

    def run_job(method: str, _params: Mapping[str, Any], _send: Any) -> Mapping[str, Any]:
        return results()[method]

    monkeypatch.setitem(vars(core), "run_job", run_job)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def drawn(reports: list[Report]) -> str:
    return "".join(map(report_plain, reports))


@pytest.mark.parametrize("asked", LINES)
@pytest.mark.parametrize("flag", ["", " --json"])
@pytest.mark.usefixtures("scripted")
def test_both_doors_say_a_result_in_the_same_words(
    asked: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    name, (words, method) = asked.split()[0], LINES[asked]
    stage = ChatStage(tmp_path, {"method": method, "result": results()[method]})
    line = f"{flag} {words}" if name == "compare" else f"{words}{flag}"
    stage.play(f"/{name} {line}", at_rest)
    assert not stage.front.all("error")
    (job,) = stage.chat.jobs
    said = printed(capsys, name, *line.split())
    assert said == drawn([job.report()])
    assert json.loads(said) if flag else len(said.splitlines()) > 2


@pytest.fixture
def store() -> Iterator[Store]:
    with Store(conversations_file()) as opened:
        talk(opened, "Which planets are there?", "Eight of them.", thinking="Let me count.")
        talk(opened, "Name a cheese.", "Brie.", title="On cheese")
        yield opened


@pytest.mark.parametrize(
    "line",
    [
        "models --json",
        "sessions list",
        "sessions --json",
        "sessions list -n 1",
        "sessions search which",
        "sessions search which --json",
        "sessions show 1",
        "sessions show latest --json",
    ],
)
def test_both_doors_list_in_the_same_words(
    line: str,
    tmp_path: Path,
    store: Store,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("QCHAT_MODELS_DIR", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    front = ChatStage(tmp_path, store=store).play(f"/{line}", load="")
    assert not front.all("error")
    assert printed(capsys, *line.split()) == drawn(front.all("report"))


def test_without_words_models_are_a_list_in_both_doors(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("QCHAT_MODELS_DIR", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    front = ChatStage(tmp_path).play("/models", load="")
    assert printed(capsys, "models") == drawn(front.all("report"))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_same_page_in_both_doors(name: str, flag: str, tmp_path: Path, capsys):
    page = printed(capsys, name, flag).rstrip()
    asked = [f"/{name} {flag}", f"/help {name}"]
    reports = ChatStage(tmp_path).play(*asked, load="").all("report")
    for report in reports:
        said = drawn([report]).rstrip()
        assert said.split() == page.replace(f"qchat {name}", f"/{name}").split()
    assert len(reports) == 2


def test_help_of_an_action_is_its_page(tmp_path: Path):
    said = ChatStage(tmp_path).play("/models rm --help").said
    assert "usage: /models rm [-h] [--yes] NAME" in said


@pytest.mark.parametrize("name", ENGINE_TASKS)
def test_the_loaded_model_is_a_chats_default_and_the_command_line_has_none(name: str, tmp_path: Path, capsys):
    assert main([name]) == 2
    _, err = capsys.readouterr()
    assert err.startswith("qchat: say which") and f"qchat {name} --help" in err
    stage = ChatStage(tmp_path)
    stage.play("Where?", f"/{name}", at_rest)
    if name in ("convert", "compare"):
        assert stage.front.all("error")[0].startswith("say which")
    else:
        (job,) = stage.chat.jobs
        assert "fake-4bit" in job.title


def test_a_result_that_cannot_be_read_is_a_sentence(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "eval", "result": {"model": 5}})
    stage.play(f"/eval {BUILT_IN_MODEL}")
    said = report_plain(stage.chat.jobs[0].report())
    assert said.startswith("the engine's result cannot be read: ") and said.count("\n") == 1


def test_options_actions_and_choices_are_completed(tmp_path: Path):
    chat = ChatStage(tmp_path).chat

    def lines(begun: str) -> list[str]:
        return [one.line for one in completions(begun, chat)]

    assert lines("/bench --ag") == ["/bench --against"]
    assert lines("/bench --against m") == ["/bench --against mlx-lm"]
    assert lines("/sessions exp") == ["/sessions export"]
    assert lines("/sessions export --fo") == ["/sessions export --force"]
    assert lines("/eval x --reference embe") == ["/eval x --reference embedded"]
    assert lines("/inspect x buil") == []
    assert lines("/models rm embe") == ["/models rm embedded"]


def test_a_picker_opens_where_there_is_one_and_no_word(tmp_path: Path, store: Store):
    front = FakeFront(screens=True)
    ChatStage(tmp_path, store=store, front=front).play("/models", "/sessions", "/models --json", load="")
    assert front.all("screen") == ["models", "sessions"]
    assert len(front.all("report")) == 1


def test_new_options_of_a_task_reach_both_doors(monkeypatch: pytest.MonkeyPatch):
    def arguments(_: Any, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--new")
        add_json(parser)

    task = command("inspect").task
    monkeypatch.setattr(type(task), "arguments", arguments)
    for parser in (parser_of("inspect"), command("inspect").parser()):
        assert "--new" in parser.format_help()
