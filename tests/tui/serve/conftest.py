"""One server with the embedded model for all tests that only ask it something."""

from collections.abc import Iterator

import anthropic
import httpx2
import openai
import pytest

from qchat.tui.chat.client import EngineClient
from tests.tui.serve.running_server import CALLING, RunningServer


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running


@pytest.fixture(scope="session")
def calling_server() -> Iterator[RunningServer]:
    """A server whose model calls the tool `weather`."""
    with RunningServer(lambda: EngineClient(CALLING)) as running:
        yield running


@pytest.fixture(scope="session")
def calling(calling_server: RunningServer) -> Iterator[openai.OpenAI]:
    with calling_server.openai() as client:
        yield client


@pytest.fixture(scope="session")
def calling_claude(calling_server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with calling_server.anthropic() as client:
        yield client


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture(scope="session")
def claude(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with server.anthropic() as client:
        yield client


@pytest.fixture(scope="session")
def http(server: RunningServer) -> Iterator[httpx2.Client]:
    with server.http() as client:
        yield client
