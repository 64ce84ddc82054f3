"""The controller with the real engine, the embedded model and a store: whatever dies, nothing is lost."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from qchat.core import BUILT_IN_MODEL, Store
from qchat.tui.chat.client import EngineDied
from qchat.tui.chat.controller import Chat
from tests.tui.chat_stage import ChatStage, render

MODEL = str(BUILT_IN_MODEL)
BRIEF = {"temperature": 0.0, "enable_thinking": False, "max_new_tokens": 30}
ENDLESS = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "max_new_tokens": 1500, "seed": 1}
LONG_TEXT = "The quick brown fox jumps over the lazy dog. " * 55


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "conversations.db") as store:
        yield store


def be_brief(chat: Chat) -> None:
    """Have every reply begin with BRIEF."""
    for name, value in (("temperature", 0.0), ("think", False), ("max_tokens", 30)):
        chat.settings.change(name, value, "test")
    assert chat.settings.reply() == BRIEF


def killed_while(stage: ChatStage, phase: str) -> asyncio.Task[None]:
    """Kills the engine as soon as the chat is in `phase`, with some progress in it."""

    async def kill() -> None:
        await stage.until(lambda: stage.chat.status.phase == phase and progressed(stage, phase))
        assert stage.chat.client is not None
        stage.chat.client.kill()

    return asyncio.create_task(kill())


def progressed(stage: ChatStage, phase: str) -> bool:
    status = stage.chat.status
    return status.thought_tokens > 3 if phase == "thinking" else status.total > 0


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["reading", "thinking"])
def test_an_engine_killed_in_a_reply_costs_nothing_that_was_said(tmp_path: Path, store: Store, phase: str):
    stage = ChatStage(tmp_path, store=store, real=True)

    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        be_brief(chat)
        await chat.send("What is the capital of France?")
        first = chat.state.turns[0].answer
        killing = killed_while(stage, phase)
        question = LONG_TEXT if phase == "reading" else "Write a long story about a cat."
        with pytest.raises(EngineDied, match="SIGKILL"):
            await chat.send(question, **(ENDLESS | {"enable_thinking": True} if phase == "thinking" else {}))
        await killing
        shown = chat.state.turns[-1].thinking
        await chat.restart()
        await chat.send("And of Germany?")
        await stage.until(lambda: len(chat.state.turns) == 3)
        turns = chat.state.turns
        assert [turn.question for turn in turns][:2] == ["What is the capital of France?", question]
        assert turns[0].answer == first
        assert turns[1].thinking.startswith(shown) if phase == "thinking" else turns[1].answer
        assert turns[2].answer

    stage.play(scene, load=MODEL)
    assert [conversation.title for conversation in store.conversations()] == [
        "What is the capital of France?"
    ]


@pytest.mark.slow
def test_an_engine_killed_while_it_loads_is_started_again(tmp_path: Path, store: Store):
    stage = ChatStage(tmp_path, store=store, real=True)

    async def scene(stage: ChatStage) -> None:
        killing = killed_while(stage, "loading")
        waiting = asyncio.create_task(stage.chat.load(MODEL))
        await stage.until(lambda: stage.chat.busy)
        await stage.chat.send("What is the capital of France?", **BRIEF)
        with pytest.raises(EngineDied, match="SIGKILL"):
            await waiting
        await killing
        assert stage.chat.queue == ["What is the capital of France?"]
        be_brief(stage.chat)
        await stage.chat.restart()
        await stage.until(lambda: stage.front.all("finished"))

    stage.play(scene, load="")


@pytest.mark.slow
def test_a_conversion_whose_engine_is_killed_leaves_the_chat_and_can_be_done_again(
    tmp_path: Path, store: Store
):
    stage = ChatStage(tmp_path, store=store, real=True)
    params = {"source": MODEL, "target": str(tmp_path / "variant"), "options": {"bits": 4}}

    async def scene(stage: ChatStage) -> None:
        chat = stage.chat
        job = chat.start_job("convert", "convert", params, render)
        await stage.until(lambda: any(event["event"] == "progress" for event in job.events))
        assert job.client is not None
        job.client.kill()
        await job.ended()
        assert (job.state, "SIGKILL" in job.error) == ("failed", True)
        assert not (tmp_path / "variant").exists()
        again = chat.start_job("convert", "convert", params, render)
        await again.ended()
        assert again.state == "done", again.error
        await chat.load(params["target"])
        await chat.send("What is the capital of France?", **BRIEF)
        assert chat.model is not None
        assert chat.model.name == "variant"

    stage.play(scene, load=MODEL)
    assert stage.front.all("finished")


def test_a_conversion_that_is_cancelled_leaves_nothing(tmp_path: Path):
    stage = ChatStage(tmp_path, real=True)
    folder = tmp_path / "place"
    folder.mkdir()

    async def scene(stage: ChatStage) -> None:
        params = {"source": MODEL, "target": str(folder / "variant"), "options": {"bits": 4}}
        job = stage.chat.start_job("convert", "convert", params, render)
        await stage.until(lambda: any(event["event"] == "progress" for event in job.events))
        stage.chat.stop()
        await job.ended()
        assert job.state == "cancelled"

    stage.play(scene, load="")
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_conversation_is_left_and_opened_again_without_being_read_again(tmp_path: Path, store: Store):
    async def begin(stage: ChatStage) -> None:
        await stage.chat.send("What is the capital of France?", **BRIEF)

    async def go_on(stage: ChatStage) -> None:
        latest = store.latest()
        assert latest is not None
        await stage.chat.load(MODEL, conversation=latest.id)
        assert len(stage.chat.state.turns) == 1
        await stage.chat.send("And of Germany?", **BRIEF)
        told = await stage.chat.request("explain")
        assert told.turns[0].cached_tokens > 20

    ChatStage(tmp_path, store=store, real=True).play(begin, load=MODEL)
    ChatStage(tmp_path, store=store, real=True).play(go_on, load="")
