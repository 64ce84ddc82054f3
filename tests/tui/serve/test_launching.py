"""`qchat launch`: what each tool is told, and servers that are found or started for it."""

import argparse
import importlib
import json
import os
import socket
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from qchat.core.errors import GenerationError, UsageError
from qchat.tui.cli.main import main
from qchat.tui.serve.launching import describe, find_server, started_server
from qchat.tui.serve.server import ServeOptions
from qchat.tui.serve.tools import TOOLS, Connection, tool_named
from tests.tui.serve.running_server import RunningServer

SERVER = Connection("http://127.0.0.1:8080", "tiny", "sesame")
SHOW = "import json, os, sys; json.dump([dict(os.environ), sys.argv[1:]], open(os.environ['REPORT'], 'w'))"


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a program `agent` and one `codex` write their environment and arguments; they exit with 7."""
    for name in ("agent", "codex"):
        program = tmp_path / name
        program.write_text(f"#!{sys.executable}\n{SHOW}\nsys.exit(7)\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("REPORT", str(tmp_path / "report.json"))
    return tmp_path / "report.json"


def test_claude_asks_nobody_but_the_server():
    setup = TOOLS["claude"].setup(SERVER)
    assert setup.environment["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8080"
    assert setup.environment["ANTHROPIC_AUTH_TOKEN"] == "sesame"
    models = {value for name, value in setup.environment.items() if name.endswith("_MODEL")}
    assert models == {"tiny"}


def test_codex_gets_a_provider_as_overrides_that_are_toml():
    setup = TOOLS["codex"].setup(SERVER)
    assert setup.arguments[::2] == ("-c",) * (len(setup.arguments) // 2)
    config = tomllib.loads("\n".join(setup.arguments[1::2]))
    provider = config["model_providers"][config["model_provider"]]
    assert provider["base_url"] == "http://127.0.0.1:8080/v1"
    assert provider["wire_api"] == "responses"
    assert setup.environment[provider["env_key"]] == "sesame"


def test_opencode_gets_a_configuration_that_names_its_own_provider():
    config = json.loads(TOOLS["opencode"].setup(SERVER).environment["OPENCODE_CONFIG_CONTENT"])
    provider, model = config["model"].split("/")
    assert model in config["provider"][provider]["models"]
    assert config["provider"][provider]["options"]["baseURL"] == "http://127.0.0.1:8080/v1"


def test_other_programs_get_the_variables_of_the_official_clients():
    environment = tool_named("my-agent").setup(SERVER).environment
    assert environment["OPENAI_BASE_URL"] == "http://127.0.0.1:8080/v1"
    assert environment["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8080"


@pytest.mark.parametrize("name", [*TOOLS, "my-agent"])
def test_what_is_printed_has_no_key(name: str):
    tool = tool_named(name)
    line = describe(tool.setup(SERVER), tool.command, "sesame")
    assert "sesame" not in line
    assert "KEY" in line


def test_a_running_server_is_used(server: RunningServer, report: Path, capsys: pytest.CaptureFixture[str]):
    port = server.url.rpartition(":")[2]
    assert main(["launch", "--port", port, "codex", "exec", "--model", "x"]) == 7
    environment, arguments = json.loads(report.read_text())
    assert environment["QCHAT_API_KEY"] == "none"
    assert arguments[-3:] == ["exec", "--model", "x"]
    assert f'model_providers.qchat.base_url="{server.url}/v1"' in arguments
    assert server.url in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_is_started_for_the_tool_and_ends_with_it(report: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert main(["launch", "--port", port, "--api-key", "sesame", "-m", "built-in", "agent"]) == 7
    environment, _ = json.loads(report.read_text())
    assert environment["OPENAI_BASE_URL"] == f"http://127.0.0.1:{port}/v1"
    assert environment["OPENAI_API_KEY"] == "sesame"
    assert find_server(f"http://127.0.0.1:{port}", "sesame") is None
    assert "QCHAT_API_KEY" not in os.environ


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why():
    with (
        pytest.raises(GenerationError, match="nowhere"),
        started_server(["./nowhere"], "http://127.0.0.1:9", None),
    ):
        pass


@pytest.mark.slow
def test_a_server_with_another_key_is_a_sentence():
    with (
        RunningServer(options=ServeOptions(port=0, key="other")) as server,
        pytest.raises(UsageError, match="wants another key"),
    ):
        find_server(server.url, "sesame")


def test_a_tool_that_is_not_installed_is_a_sentence(
    server: RunningServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "--port", server.url.rpartition(":")[2], "claude"]) == 2
    assert "Claude Code is not installed" in capsys.readouterr().err


def test_printing_runs_nothing(capsys: pytest.CaptureFixture[str]):
    assert main(["launch", "--port", "9", "--print", "claude"]) == 0
    assert "ANTHROPIC_BASE_URL=http://127.0.0.1:9 " in capsys.readouterr().err


def test_another_program_is_refused_and_never_gets_the_key(capsys: pytest.CaptureFixture[str]):
    asked: list[str] = []

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(str(self.headers))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "theirs"}]}')

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with HTTPServer(("127.0.0.1", 0), Stranger) as stranger:
        thread = threading.Thread(target=stranger.serve_forever)
        thread.start()
        try:
            port = str(stranger.server_port)
            assert main(["launch", "--port", port, "--api-key", "sesame", "--print", "claude"]) == 2
        finally:
            stranger.shutdown()
            thread.join()
    assert "another program answers" in capsys.readouterr().err
    assert asked
    assert "sesame" not in "".join(asked)


def test_an_ipv6_address_gets_brackets(capsys: pytest.CaptureFixture[str]):
    assert main(["launch", "--host", "::1", "--port", "9", "--print", "claude"]) == 0
    assert "ANTHROPIC_BASE_URL=http://[::1]:9 " in capsys.readouterr().err.replace("'", "")


def test_a_host_that_is_no_address_is_a_sentence(capsys: pytest.CaptureFixture[str]):
    assert main(["launch", "--host", "a:b]c", "--print", "claude"]) == 2
    assert "is not an address" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["serve", "launch"])
def test_an_empty_key_in_the_environment_counts_as_none(verb: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QCHAT_API_KEY", "")
    parser = argparse.ArgumentParser()
    importlib.import_module(f"qchat.tui.cli.verbs.{verb}").add_arguments(parser)
    assert parser.parse_args(["claude"]).api_key is None
