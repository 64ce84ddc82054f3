"""The server as a whole: engines that die, many clients at once, metrics, malformed requests."""

import os
import random
import re
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from tests.fuzz import mutate_json
from tests.tui.serve.running_server import WEATHER_SCHEMA, RunningServer

REQUESTS = int(os.environ.get("TESTS_REQUESTS", "150"))
ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = "/v1/chat/completions"


def metric(http: httpx2.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return sum(map(float, lines))


@pytest.mark.slow
def test_an_engine_that_dies_ends_the_stream_with_an_error_and_the_next_request_works():
    with RunningServer() as server, server.openai() as client:
        stream = client.chat.completions.create(messages=ASKED, model="any", stream=True)
        next(iter(stream))
        first = server.source.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(openai.APIError, match=r"killed \(SIGKILL\)"):
            for _ in stream:
                pass
        reply = client.chat.completions.create(messages=ASKED, model="any", temperature=0)
        assert "Paris" in (reply.choices[0].message.content or "")
        assert server.source.pid != first


@pytest.mark.slow
@pytest.mark.parametrize("path", ["messages", "responses"])
def test_a_dying_engine_is_an_error_event_in_every_dialect(path: str):
    with RunningServer() as server, server.openai() as client, server.anthropic() as claude:
        if path == "messages":
            stream = claude.messages.create(messages=ASKED, model="any", max_tokens=900, stream=True)
        else:
            stream = client.responses.create(input="Count to a thousand.", model="any", stream=True)
        next(iter(stream))
        os.kill(server.source.pid, signal.SIGKILL)
        if path == "messages":
            with pytest.raises(anthropic.APIStatusError, match="SIGKILL"):
                list(stream)
        else:
            assert list(stream)[-1].type == "response.failed"


@pytest.mark.slow
def test_fifty_clients_at_once_are_served_or_told_to_come_back():
    body = {"messages": ASKED, "max_tokens": 2, "temperature": 0, "reasoning_effort": "none"}
    with RunningServer(max_waiting=20) as server, server.http() as http:

        def ask(number: int) -> httpx2.Response:
            return http.post(CHAT, json={**body, "user": str(number)})

        with ThreadPoolExecutor(50) as pool:
            responses = list(pool.map(ask, range(50)))
        found = Counter(response.status_code for response in responses)
        assert found.keys() <= {200, 429}
        assert found[200] >= 21
        for response in responses:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["code"] == "rate_limit_exceeded"
            else:
                assert response.json()["usage"]["completion_tokens"] == 2
        assert metric(http, "qchat_requests_total") == 50
        assert metric(http, "qchat_requests_waiting") == 0


@pytest.mark.slow
def test_a_client_that_leaves_the_queue_is_forgotten(server: RunningServer):
    long: Any = [{"role": "user", "content": "Count from one to a thousand."}]
    with server.openai() as client, server.openai(timeout=0.3) as impatient:
        stream = client.chat.completions.create(messages=long, model="any", stream=True)
        next(iter(stream))
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(messages=long, model="any")
        server.wait_until(lambda: len(server.backend.activities) == 1)
        stream.close()
        server.wait_until(lambda: not server.backend.activities)
        assert server.backend.queue.waiting == 0


def test_metrics_count_tokens_and_say_nothing_of_what_was_asked(server: RunningServer, http: httpx2.Client):
    names = ("cached", "read", "answer")
    before = {name: metric(http, f'qchat_tokens_total{{kind="{name}"}}') for name in names}
    usage = http.post(CHAT, json={"messages": ASKED, "max_tokens": 3, "reasoning_effort": "none"}).json()[
        "usage"
    ]
    after = {name: metric(http, f'qchat_tokens_total{{kind="{name}"}}') for name in names}
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert after["cached"] - before["cached"] == cached
    assert after["read"] - before["read"] == usage["prompt_tokens"] - cached
    assert after["answer"] - before["answer"] == 3
    assert "capital" not in http.get("/metrics").text
    assert server.backend.memory is None or metric(http, "qchat_memory_active_bytes") > 0


# --- malformed requests ---

TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER_SCHEMA}}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
BODIES: dict[str, Any] = {
    CHAT: {
        "model": "any",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "a", "content": "sun"},
        ],
        "tools": [TOOL],
        "tool_choice": "auto",
        "max_tokens": 2,
        "stop": ["x"],
        "temperature": 0.5,
        "stream": False,
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "text"},
    },
    "/v1/completions": {"prompt": "Once", "max_tokens": 2, "logprobs": 1, "stop": "x", "stream": True},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "sun"},
        ],
        "tools": [{"type": "function", "name": "weather", "parameters": WEATHER_SCHEMA}],
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}},
        "max_output_tokens": 2,
    },
    "/v1/messages": {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "a", "name": "weather", "input": {}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "sun"}]},
        ],
        "tools": [{"name": "weather", "input_schema": WEATHER_SCHEMA}],
        "thinking": {"type": "enabled", "budget_tokens": 1},
        "tool_choice": {"type": "auto"},
        "max_tokens": 2,
        "stream": True,
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}], "system": "x"},
}


@pytest.fixture(scope="module")
def small_server() -> Iterator[RunningServer]:
    """A server whose replies are short, whatever they are asked for, and whose prompt cache is soon full."""
    with RunningServer(context_limit=320, snapshot_budget=40 << 20) as server:
        yield server


def raw_request(draw: random.Random, path: str, body: bytes) -> bytes:
    """A request with a few bytes changed, cut out or doubled anywhere."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data = bytearray(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data))
        match draw.randrange(3):
            case 0:
                data[place] = draw.randrange(256)
            case 1:
                del data[place : place + draw.randint(1, 20)]
            case _:
                data[place:place] = data[place : place + 40]
    return bytes(data)


def send_raw(server: RunningServer, request: bytes) -> bytes:
    """What the server answers to bytes after which nothing more comes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        parts = []
        while data := connection.recv(1 << 16):
            parts.append(data)
    return b"".join(parts)


def resident_nbytes(pid: int) -> int:
    """The memory of a process; 0 where the system does not tell."""
    path = Path(f"/proc/{pid}/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


@pytest.mark.slow
def test_malformed_requests_are_refused_or_served_and_leave_the_server_as_it_was(small_server: RunningServer):
    draw, pid = random.Random(0), small_server.source.pid
    before = 0
    with small_server.http() as http:
        for number in range(REQUESTS):
            path, body = draw.choice(list(BODIES.items()))
            text = mutate_json(draw, body).encode("utf-8", "surrogatepass")
            if number % 3:
                response = http.post(path, content=text, headers={"content-type": "application/json"})
                assert response.status_code < 500, (path, text[:500], response.text)
            else:
                answer = send_raw(small_server, raw_request(draw, path, text[:5000]))
                assert not answer.startswith(b"HTTP/1.1 5"), (path, text[:500], answer)
            before = before or (resident_nbytes(pid) if number > REQUESTS // 2 else 0)
        assert small_server.source.pid == pid
        assert http.post(CHAT, json={"messages": ASKED, "max_tokens": 1}).status_code == 200
    assert resident_nbytes(pid) - before < 200 << 20
    small_server.wait_until(lambda: not small_server.backend.activities)
