"""A hub's listing that never ends, unpacks to gigabytes, nests deeply, or comes a byte at a time."""

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qchat.core.errors import ModelError
from qchat.core.hub import listing, tasks
from qchat.core.hub.listing import plan_download
from tests.hub_stage import point_to

Send = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Send], list[int]]]:
    """Start a hub that answers every request with a function; returns a list of the bytes that were sent."""
    servers: list[ThreadingHTTPServer] = []

    def start(send: Send) -> list[int]:
        sent = [0]

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                """Silent."""

            def do_GET(self) -> None:
                write = self.wfile.write

                def counted(data: bytes) -> int:
                    write(data)
                    sent[0] += len(data)
                    return len(data)

                self.wfile.write = counted  # pyright: ignore[reportAttributeAccessIssue]
                with suppress(OSError):  # once the client has gone
                    send(self)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        point_to(f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "hub", monkeypatch)
        return sent

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"siblings": [')
    while True:
        handler.wfile.write(b'{"rfilename": "x"},' * 10_000)


def packed(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    handler.wfile.write(gzip.compress(b" " * (1 << 28)))


def nested(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"siblings":' + b"[" * 100_000)


def no_text(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"\xff\xfe{}")


def slow(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("send", [endless, packed])
def test_a_listing_of_any_length_is_cut_off(serve: Callable[[Send], list[int]], send: Send):
    sent = serve(send)
    with pytest.raises(ModelError, match="a file listing of more than 16,777,216 bytes"):
        plan_download("owner/name")
    assert sent[0] < 64 << 20


def crowded(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"siblings": [' + b'{"rfilename":"x"},' * 400_000 + b'{"rfilename":"x"}]}')


def test_a_listing_of_very_many_files_is_refused(serve: Callable[[Send], list[int]]):
    serve(crowded)
    with pytest.raises(ModelError, match="a file listing of more than 100,000 files"):
        plan_download("owner/name")


@pytest.mark.parametrize("send", [nested, no_text])
def test_a_listing_that_is_no_listing_is_refused(serve: Callable[[Send], list[int]], send: Send):
    serve(send)
    with pytest.raises(ModelError, match="not a file listing"):
        plan_download("owner/name")


def test_a_listing_that_trickles_is_given_up(
    serve: Callable[[Send], list[int]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(listing, "FIRST_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(tasks, "GRACE_SECONDS", 4.0)
    serve(slow)
    with pytest.raises(ModelError, match="does not answer"):
        plan_download("owner/name")
    assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "Task"]
