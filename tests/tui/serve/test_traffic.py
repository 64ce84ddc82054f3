"""An agent's traffic in both protocols: what is sent at every turn is read once.

Ten turns of calls and results under one system prompt, then an earlier message that was edited, and a
sub-agent with the same system prompt. The replies are scripted.
"""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from qchat.core.hub.catalog import BUILT_IN_MODEL
from qchat.core.native.compiler import find_compiler
from qchat.tui.chat.client import EngineClient
from tests.tui.serve.running_server import CALLING, WEATHER_SCHEMA, RunningServer

SYSTEM = "You are a careful agent that reports the weather and never guesses. " * 90
TASK = "Watch the weather in Rome and Oslo and tell me when it changes."
RESULTS = [(f"sun, {20 + turn} degrees, no wind", f"snow, {-turn} degrees, a storm") for turn in range(10)]
TURNS = range(10)
# of the tokens sent, from the second turn on
CACHED_SHARE = 0.95


@pytest.fixture(scope="module")
def agents_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose model, the embedded one, has a longer context."""
    folder = tmp_path_factory.mktemp("models") / "longer"
    shutil.copytree(BUILT_IN_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1 << 15
    (folder / "config.json").write_text(json.dumps(config))
    native = {"QCHAT_NATIVE": "on" if find_compiler() else "off"}  # five times as fast
    with RunningServer(lambda: EngineClient(CALLING, native), model=folder) as server:
        yield server


class OpenAIAgent:
    """Talks as agents for chat completions do: thoughts are not sent back."""

    def __init__(self, server: RunningServer):
        self._client = server.openai()
        self.history: list[Any] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": TASK},
        ]

    def ask(self, history: list[Any] | None = None) -> tuple[int, int]:
        """Ask for the next step and add it to the history; the tokens sent, and how many were cached."""
        tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER_SCHEMA}}]
        sent: Any = self.history if history is None else history
        reply = self._client.chat.completions.create(messages=sent, tools=tools, model="any")  # pyright: ignore
        message = reply.choices[0].message.model_dump(exclude_none=True)
        message.pop("reasoning_content", None)
        sent.append(message)
        return reply.usage.prompt_tokens, reply.usage.prompt_tokens_details.cached_tokens  # pyright: ignore

    def answer(self, results: tuple[str, ...]) -> None:
        calls = self.history[-1]["tool_calls"]
        for call, text in reversed(list(zip(calls, results, strict=True))):  # out of order
            self.history.append({"role": "tool", "tool_call_id": call["id"], "content": text})

    def edited(self, text: str) -> list[Any]:
        """A history whose last question is another."""
        place = max(n for n, message in enumerate(self.history) if message["role"] == "user")
        return [*self.history[:place], {"role": "user", "content": text}]

    def question(self, text: str) -> Any:
        return {"role": "user", "content": text}

    def begin(self, text: str) -> list[Any]:
        return [self.history[0], {"role": "user", "content": text}]


class AnthropicAgent(OpenAIAgent):
    """Talks as agents for messages do: with thoughts, which are sent back."""

    def __init__(self, server: RunningServer):
        self._claude = server.anthropic()
        self.history = [{"role": "user", "content": TASK}]

    def ask(self, history: list[Any] | None = None) -> tuple[int, int]:
        tools: Any = [{"name": "weather", "input_schema": WEATHER_SCHEMA}]
        system: Any = [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]
        sent: Any = self.history if history is None else history
        with self._claude.messages.stream(
            messages=sent,
            tools=tools,
            system=system,
            model="any",
            max_tokens=2000,
            thinking={"type": "enabled", "budget_tokens": 1024},
        ) as stream:
            message = stream.get_final_message()
        sent.append({"role": "assistant", "content": [block.model_dump() for block in message.content]})
        cached = message.usage.cache_read_input_tokens or 0
        return message.usage.input_tokens + cached, cached

    def answer(self, results: tuple[str, ...]) -> None:
        calls = [block for block in self.history[-1]["content"] if block["type"] == "tool_use"]
        content = [
            {"type": "tool_result", "tool_use_id": call["id"], "content": text}
            for call, text in zip(calls, results, strict=True)
        ]
        self.history.append({"role": "user", "content": content})

    def edited(self, text: str) -> list[Any]:
        place = max(n for n, message in enumerate(self.history) if isinstance(message["content"], str))
        return [*self.history[:place], {"role": "user", "content": text}]

    def begin(self, text: str) -> list[Any]:
        return [{"role": "user", "content": text}]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OpenAIAgent, AnthropicAgent])
def test_an_agents_history_is_read_once(agents_server: RunningServer, kind: type[OpenAIAgent]):
    agent = kind(agents_server)
    shares = []
    for turn in TURNS:
        sent, cached = agent.ask()  # two calls
        shares.append(cached / sent)
        agent.answer(RESULTS[turn])
        sent, cached = agent.ask()  # the answer to their results
        shares.append(cached / sent)
        agent.history.append(agent.question(f"And now? {turn}"))
    assert min(shares[1:]) >= CACHED_SHARE, shares
    sent, cached = agent.ask(agent.edited("Stop watching Oslo."))
    assert cached / sent >= CACHED_SHARE
    sent, cached = agent.ask(agent.begin("Which of them is further north?"))
    assert cached / sent >= CACHED_SHARE
