"""A hub on the loopback: the routes that huggingface.co documents for fetching, and faults on demand.

Large files are redirected to a second origin, as the hub does. Every byte sent is counted.
`python -m tests.hub_server FOLDER owner/name` serves a folder until it is interrupted.
"""

import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE_NBYTES = 1 << 12  # from here on a file is "LFS"
PIECE_NBYTES = 1 << 15


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer. `at` counts bytes of the body."""

    kind: str  # status, cut, slow, hang, short, long, corrupt, whole, shifted, page
    at: int = 0
    status: int = 503
    retry_after: int | None = None
    seconds: float = 0.0


@dataclass
class Repo:
    """The files of one model; `token`: what a reader must show; `listing` may lie about them."""

    files: dict[str, bytes]
    token: str | None = None
    gated: bool = False
    commit: str = "c0ffee" + 34 * "0"
    revisions: tuple[str, ...] = ("main",)
    listing: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda siblings: siblings

    @classmethod
    def of(cls, folder: Path, **fields: Any) -> "Repo":
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, **fields)

    def siblings(self) -> list[dict[str, Any]]:
        return self.listing([_sibling(name, data) for name, data in self.files.items()])


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    entry = {"rfilename": name, "size": len(data), "blobId": git}
    if len(data) < LARGE_NBYTES:
        return entry
    sha256 = hashlib.sha256(data).hexdigest()
    return {**entry, "lfs": {"sha256": sha256, "size": len(data), "pointerSize": 134}}


@dataclass
class Seen:
    """One request for a file's bytes, and how many of them were sent."""

    name: str
    begin: int
    status: int
    authorization: str | None
    sent: int = 0


@dataclass
class Hub:
    """A running server. `faults` are taken one by one by requests for files, `api_faults` for lists."""

    repos: dict[str, Repo]
    faults: deque[Fault | None] = field(default_factory=deque)
    api_faults: deque[Fault] = field(default_factory=deque)
    always: Fault | None = None  # when `faults` are used up
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._servers = [_Server(self, _Api), _Server(self, _Store)]
        self.url, self.store_url = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def __enter__(self) -> "Hub":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def sent(self) -> int:
        """Bytes of files, in all."""
        return sum(seen.sent for seen in self.seen)

    def next_fault(self) -> Fault | None:
        with self._lock:
            return self.faults.popleft() if self.faults else self.always


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def refuse(self, status: int, code: str = "", **headers: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def spoil(self, fault: Fault | None) -> bool:
        """Whether the fault was all of the answer."""
        if fault is None or fault.kind not in ("status", "hang", "page"):
            return False
        if fault.kind == "hang":
            time.sleep(fault.seconds)
            self.close_connection = True
        elif fault.kind == "page":
            self.send_bytes(b"<html>Welcome to this network! Please log in.</html>", "text/html")
        else:
            headers = {} if fault.retry_after is None else {"Retry_After": str(fault.retry_after)}
            self.refuse(fault.status, **headers)
        return True

    def send_bytes(self, data: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, name: str, data: bytes) -> None:
        """The part asked for, with the next fault."""
        fault = self.hub.next_fault()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked and not (fault and fault.kind == "whole") else 0
        seen = Seen(name, begin, 206 if begin else 200, self.headers.get("Authorization"))
        self.hub.seen.append(seen)
        if self.spoil(fault):
            return
        if begin >= len(data) and data:
            self.refuse(416)
            return
        if fault and fault.kind == "shifted":
            begin = max(begin - 1, 0)
        self._send_part(seen, data, begin, fault)

    def _send_part(self, seen: Seen, data: bytes, begin: int, fault: Fault | None) -> None:
        body = data[begin:]
        kind = fault.kind if fault else ""
        if fault and kind in ("short", "long"):
            body = body[: fault.at] if kind == "short" else body + bytes(fault.at + 1)
        if fault and kind == "corrupt" and body:
            place = fault.at % len(body)
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        self.send_response(seen.status)
        if seen.status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault and kind == "cut":
            self._write(seen, body[: fault.at % (len(body) + 1)], 0.0)
            self._hang_up()
        else:
            self._write(seen, body, fault.seconds if fault and kind == "slow" else 0.0)

    def _write(self, seen: Seen, body: bytes, seconds: float) -> None:
        pieces = range(0, len(body), PIECE_NBYTES)
        for begin in pieces:
            piece = body[begin : begin + PIECE_NBYTES]
            self.wfile.write(piece)
            seen.sent += len(piece)
            if seconds:
                self.wfile.flush()
                time.sleep(seconds / len(pieces))

    def _hang_up(self) -> None:
        """What was written still arrives; then the connection is gone."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
        self.connection.shutdown(socket.SHUT_RDWR)


class _Api(_Handler):
    """huggingface.co: listings, small files, and redirects to the store for large ones."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._list(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[3])
        else:
            self.refuse(404)

    def _list(self, id: str, revision: str) -> None:
        fault = self.hub.api_faults.popleft() if self.hub.api_faults else None
        repo = self.hub.repos.get(id)
        if self.spoil(fault):
            return
        if repo is None or (repo.token and not repo.gated and not self._may_read(repo)):
            known = self.headers.get("Authorization")
            self.refuse(404 if known else 401, "RepoNotFound", X_Error_Message="Repository not found")
        elif revision not in (*repo.revisions, repo.commit):
            self.refuse(404, "RevisionNotFound")
        else:
            listing = {"id": id, "sha": repo.commit, "siblings": repo.siblings(), "gated": repo.gated}
            self.send_bytes(json.dumps(listing).encode())

    def _resolve(self, id: str, name: str) -> None:
        repo = self.hub.repos.get(id)
        if repo is None:
            self.refuse(404, "RepoNotFound")
        elif not self._may_read(repo):
            known = self.headers.get("Authorization")
            self.refuse(403 if known else 401, "GatedRepo" if repo.gated else "RepoNotFound")
        elif name not in repo.files:
            self.refuse(404, "EntryNotFound")
        elif len(repo.files[name]) >= LARGE_NBYTES:
            self._redirect(id, name, repo)
        else:
            self.send_file(name, repo.files[name])

    def _redirect(self, id: str, name: str, repo: Repo) -> None:
        data = repo.files[name]
        self.refuse(
            302,
            Location=f"{self.hub.store_url}/{id}/{name}?signature=x",
            X_Linked_Etag=f'"{hashlib.sha256(data).hexdigest()}"',
            X_Linked_Size=str(len(data)),
            X_Repo_Commit=repo.commit,
        )

    def _may_read(self, repo: Repo) -> bool:
        return repo.token is None or self.headers.get("Authorization") == f"Bearer {repo.token}"


class _Store(_Handler):
    """The content delivery network behind the hub."""

    def do_GET(self) -> None:
        _, owner, model, name = unquote(urlsplit(self.path).path).split("/", 3)
        self.send_file(name, self.hub.repos[f"{owner}/{model}"].files[name])


def point_to(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub, which read its variables when it was imported, ask there and keep files here."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))


def main(folder: str, id: str) -> None:
    """Serve until interrupted."""
    with Hub({id: Repo.of(Path(folder))}) as hub:
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
