"""Tools in the line-based chat: the question, its answers, the results in a line, ctrl+c."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from qchat.tui.tools.rounds import CANCELLED
from tests.tui.plain.test_reader import ReplScene
from tests.tui.tools.mcp_stage import needs_mcp, stdio_command
from tests.tui.tools.scene import ANSWER, call, work_in


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, monkeypatch, notes="eggs\nmilk")


def results(scene: ReplScene) -> list[list[str]]:
    return [one["results"] for one in scene.fake.asked("answer_tools")]


READ = call("read_file", path="notes.txt")
REFUSED = "Error: the user refused this call"


def test_each_answer_means_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scene = ReplScene(tmp_path, READ, ANSWER, tools=["read_file"])
    scene.play("1", "2", "3", "4", "5", answers=("y", "n", "that is private", "c"))
    eggs = "eggs\nmilk"
    assert results(scene) == [[eggs], [REFUSED], [f"{REFUSED}: that is private"], [eggs], [eggs]]
    out, err = capsys.readouterr()
    assert out.count("The model wants to call read_file") == 4
    assert "  path: notes.txt" in out
    assert "read_file · 0.0 s · 9 B: eggs milk" in err
    assert out.count("There.") == 5


def test_a_command_cannot_be_allowed_for_longer(tmp_path: Path):
    scene = ReplScene(tmp_path, call("shell", command="echo hi"), ANSWER, tools=["shell"])
    scene.play("1", "2", answers=("a", "y"))
    assert results(scene) == [[f"{REFUSED}: a"], ["hi"]]


def test_leaving_the_question_is_a_refusal(tmp_path: Path):
    scene = ReplScene(tmp_path, READ, ANSWER, tools=["read_file"])
    scene.play("1")
    assert results(scene) == [[REFUSED]]


def test_without_a_terminal_a_call_that_asks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = {
        "method": "send",
        "answer": "",
        "calls": [*READ["calls"], *call("calculate", expression="2+3")["calls"]],
    }
    scene = ReplScene(tmp_path, steps, ANSWER, attended=False, tools=["read_file", "calculate"])
    scene.play("1")
    assert results(scene) == [[f"{REFUSED}: nobody can be asked here", "5"]]
    assert "the model wants to call read_file, which was refused" in capsys.readouterr().err


def test_ctrl_c_cancels_a_call_and_the_reply_goes_on(tmp_path: Path, here: Path):
    scene = ReplScene(tmp_path, call("shell", command="touch begun; sleep 600"), ANSWER, tools=["shell"])

    async def interrupt() -> None:
        while not (here / "begun").exists():
            await asyncio.sleep(0.01)
        scene.repl.interrupt()

    answer = scene.repl.ask_tool

    async def answer_and_wait(question: Any) -> Any:
        decision = await answer(question)
        waiting.append(asyncio.create_task(interrupt()))
        return decision

    waiting: list[asyncio.Task[None]] = []
    scene.repl.ask_tool = answer_and_wait
    scene.repl.chat.tools._rounds._ask = answer_and_wait
    scene.play("1", answers=("y",))
    assert results(scene) == [[CANCELLED]]


@needs_mcp
def test_escape_sequences_of_a_server_reach_neither_the_screen_nor_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    program, *arguments = stdio_command()
    servers = {"fake": {"command": program, "args": arguments}}
    scene = ReplScene(tmp_path, call("odd"), ANSWER, servers=servers)
    scene.play("1", "/tools", answers=("y",))
    ((odd,),) = results(scene)
    out, err = capsys.readouterr()
    assert "\x1b" not in odd + out + err and "\u202e" not in odd + out + err
    assert "<|im_start|>system" in odd
    assert "server fake, on, offers 7 tools, from settings" in out


@needs_mcp
def test_the_user_is_asked_about_a_project_and_nobody_else_is(tmp_path: Path, here: Path):
    mark = tmp_path / "started"
    program, *arguments = stdio_command(f"touch={mark}")
    project = {"mcpServers": {"fake": {"command": program, "args": arguments}}}
    (here / ".mcp.json").write_text(json.dumps(project))
    ReplScene(tmp_path, attended=False).play("hello")
    assert not mark.exists()
    ReplScene(tmp_path).play("hello", answers=("y",))
    assert mark.exists()
