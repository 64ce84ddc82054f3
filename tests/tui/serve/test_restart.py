"""What a server read is there when it is started again."""

from pathlib import Path
from typing import Any

import pytest

from qchat.tui.chat.client import EngineClient
from tests.tui.serve.running_server import RunningServer

SYSTEM: Any = {"role": "system", "content": "You answer questions about capitals in one word. " * 20}


def ask(server: RunningServer, *messages: Any) -> tuple[int, int, Any]:
    """The tokens of the prompt, how many of them were cached, and the answer as a message."""
    with server.openai() as client:
        reply = client.chat.completions.create(
            model="any", messages=[SYSTEM, *messages], max_tokens=8, reasoning_effort="none", seed=1
        )
    usage = reply.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    answer = {"role": "assistant", "content": reply.choices[0].message.content}
    return usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0, answer


def question(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.slow
def test_the_first_request_after_a_restart_finds_what_was_read_on_disk(tmp_path: Path):
    store = tmp_path / "conversations.db"
    with RunningServer(EngineClient, store=store) as server:
        first, cached, answer = ask(server, question("What is the capital of France?"))
        assert cached == 0
    with RunningServer(EngineClient, store=store) as server:
        sent, cached, _ = ask(
            server, question("What is the capital of France?"), answer, question("And Germany?")
        )
        assert first - 20 <= cached < sent
        _, cached, _ = ask(server, question("Name a river."))
        assert cached >= first - 40
    kept = list(store.with_suffix(".states").glob("*.safetensors"))
    assert kept


@pytest.mark.slow
def test_without_a_store_nothing_is_kept(tmp_path: Path):
    with RunningServer(EngineClient) as server:
        ask(server, question("What is the capital of France?"))
    assert list(tmp_path.iterdir()) == []
