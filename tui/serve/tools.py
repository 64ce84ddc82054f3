"""Coding agents and how each is told to use a server: environment, arguments, or a configuration in both.

Written from each tool's documentation. None of them was run against qchat: only the variables and arguments
that they receive are tested.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# what tools that insist on a key are given where the server has none
NO_KEY = "none"


@dataclass(frozen=True)
class Connection:
    """The server as a tool sees it; `url` has no path."""

    url: str
    model: str
    key: str | None = None

    @property
    def openai_url(self) -> str:
        """The address that clients of OpenAI's interface want."""
        return f"{self.url}/v1"

    @property
    def given_key(self) -> str:
        """The key, or a word in its place."""
        return self.key or NO_KEY


@dataclass(frozen=True)
class Setup:
    """What a tool is started with besides its own arguments."""

    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A program, what it is, and its setup for a connection."""

    command: str
    about: str
    setup: Callable[[Connection], Setup]


def _claude(server: Connection) -> Setup:
    """Claude Code: every class of model is the served one, and nothing else is asked of Anthropic."""
    models = ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL")
    classes = (f"ANTHROPIC_DEFAULT_{name}_MODEL" for name in ("OPUS", "SONNET", "HAIKU"))
    return Setup(
        {
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_AUTH_TOKEN": server.given_key,
            **dict.fromkeys((*models, *classes), server.model),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
    )


def _codex(server: Connection) -> Setup:
    """Codex: a provider of its own, given as overrides of the configuration."""
    provider = "model_providers.qchat"
    values = {
        "model_provider": "qchat",
        "model": server.model,
        f"{provider}.name": "qchat",
        f"{provider}.base_url": server.openai_url,
        f"{provider}.env_key": "QCHAT_API_KEY",
        f"{provider}.wire_api": "responses",
    }
    overrides = (("-c", f"{name}={json.dumps(value)}") for name, value in values.items())
    return Setup({"QCHAT_API_KEY": server.given_key}, tuple(word for pair in overrides for word in pair))


def _opencode(server: Connection) -> Setup:
    """OpenCode: a configuration in a variable, with a provider that speaks OpenAI's interface."""
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "qchat",
        "options": {"baseURL": server.openai_url, "apiKey": server.given_key},
        "models": {server.model: {"name": server.model}},
    }
    config = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"qchat/{server.model}",
        "small_model": f"qchat/{server.model}",
        "provider": {"qchat": provider},
    }
    return Setup({"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


def _aider(server: Connection) -> Setup:
    return Setup(
        {"OPENAI_API_BASE": server.openai_url, "OPENAI_API_KEY": server.given_key},
        ("--model", f"openai/{server.model}"),
    )


def _llm_environment(server: Connection) -> Setup:
    """Any program that reads the variables of the official clients."""
    return Setup(
        {
            "OPENAI_BASE_URL": server.openai_url,
            "OPENAI_API_KEY": server.given_key,
            "OPENAI_MODEL": server.model,
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_API_KEY": server.given_key,
        }
    )


TOOLS = {
    "claude": Tool("claude", "Claude Code", _claude),
    "codex": Tool("codex", "Codex CLI", _codex),
    "opencode": Tool("opencode", "OpenCode", _opencode),
    "aider": Tool("aider", "Aider", _aider),
}


def tool_named(name: str) -> Tool:
    """Return the tool of this name, or any other program with the variables of the official clients."""
    return TOOLS.get(name) or Tool(name, name, _llm_environment)
