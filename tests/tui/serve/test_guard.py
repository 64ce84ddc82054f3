"""Who may ask: hosts, origins, keys; bodies that are too long; addresses that others reach."""

import httpx2
import pytest
from starlette.datastructures import Headers

from qchat.core.errors import UsageError
from qchat.tui.serve import bodies
from qchat.tui.serve.errors import RequestError
from qchat.tui.serve.guard import Guard
from qchat.tui.serve.server import ServeOptions, Server
from tests.tui.serve.running_server import RunningServer


def status(guard: Guard, path: str = "/v1/models", method: str = "GET", **headers: str) -> int:
    """What the guard answers, 200 where it lets a request through."""
    given = {"host": "localhost:8080"} | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        guard.check(path, method, Headers(given))
    except RequestError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("localhost:8080", 200),
        ("127.0.0.1:8080", 200),
        ("127.1.2.3", 200),
        ("[::1]:8080", 200),
        ("LOCALHOST", 200),
        ("evil.com", 403),
        ("localhost.evil.com:8080", 403),
        ("127.0.0.1.evil.com", 403),
        ("192.168.0.7:8080", 403),
        ("", 403),
        ("box.lan:8080", 200),
    ],
)
def test_only_names_of_this_machine_are_hosts(host: str, found: int):
    assert status(Guard(names=["box.lan"]), host=host) == found


def test_a_server_for_others_is_reached_by_any_address_but_by_no_foreign_name():
    guard = Guard("0.0.0.0", key="k")
    assert status(guard, host="192.168.0.7:8080", x_api_key="k") == 200
    assert status(guard, host="evil.com", x_api_key="k") == 403


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({}, 401),
        ({"authorization": "Bearer sesame"}, 200),
        ({"x_api_key": "sesame"}, 200),
        ({"authorization": "Bearer sesam"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"x_api_key": "sésame"}, 401),
    ],
)
def test_a_key_is_needed_where_there_is_one(headers: dict[str, str], found: int):
    assert status(Guard(key="sesame"), **headers) == found
    assert status(Guard(), **headers) == 200


def test_whether_the_server_lives_needs_no_key():
    assert status(Guard(key="sesame"), "/health") == 200
    assert status(Guard(key="sesame"), "/metrics") == 401


def test_pages_of_other_origins_may_not_ask():
    assert status(Guard(), origin="http://evil.com") == 403
    assert status(Guard(), origin="http://localhost:8080") == 200
    assert status(Guard(), origin="null") == 403
    assert status(Guard(origins=["http://evil.com"]), origin="http://evil.com") == 200


@pytest.mark.parametrize(
    "options",
    [
        {"host": "0.0.0.0"},
        {"host": "192.168.0.7"},
        {"host": "::"},
        {"host": "box.lan"},
        {"port": 70000},
        {"key": " "},
    ],
)
def test_an_address_that_others_reach_needs_a_key_or_a_flag(options: dict):
    with pytest.raises(UsageError):
        ServeOptions(**options).check()
    if "host" in options:
        ServeOptions(**options, key="k").check()
        ServeOptions(**options, insecure=True).check()


def test_the_guard_stands_before_the_server(http: httpx2.Client):
    assert http.get("/v1/models", headers={"host": "evil.com"}).status_code == 403
    assert http.get("/health").json() == {"status": "ok"}


def test_a_body_that_is_too_long_is_refused(http: httpx2.Client):
    size = bodies.MAX_BODY_NBYTES + 1

    def parts():
        for _ in range(0, size, 1 << 20):
            yield b" " * (1 << 20)
        yield b" "

    response = http.post("/v1/chat/completions", content=parts())
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_long"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/messages", "authentication_error"), ("/v1/models", "invalid_request_error")]
)
def test_a_wrong_key_is_told_in_the_dialect_of_the_path(path: str, kind: str):
    options = ServeOptions(port=0, key="other", origins=["http://page"])
    asking = {"origin": "http://page", "access-control-request-method": "POST"}
    with (
        RunningServer(options=options) as server,
        server.http(headers={"authorization": "Bearer secret"}) as http,
    ):
        response = http.request("POST" if path == "/v1/messages" else "GET", path)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == kind
        assert http.options(path, headers=asking).headers["access-control-allow-origin"] == "http://page"


def test_a_port_in_use_is_a_sentence(server: RunningServer):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1, port {port}"):
        Server(server.backend, ServeOptions(port=port))


@pytest.mark.parametrize(
    ("method", "path", "found"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/anything", 200),
        ("GET", "/../etc/passwd", 404),
    ],
)
def test_other_paths_and_methods_are_told(http: httpx2.Client, method: str, path: str, found: int):
    response = http.request(method, path)
    assert response.status_code == found
    assert found == 200 or response.json()["error"]["message"]


def test_models_name_the_loaded_one(http: httpx2.Client):
    (model,) = http.get("/v1/models").json()["data"]
    assert model["id"] == "embedded"
    assert model["context_length"] == 2048


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", " ", "x\r\ny: z", "é", "a" * 500, "type "])
def test_the_header_of_what_was_ignored_is_always_a_header(http: httpx2.Client, name: str):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, name: 1}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert 1 <= len(response.headers["x-qchat-ignored"]) <= 60


@pytest.mark.parametrize("name", ["MyBox", "mybox", "MyBox:8080"])
def test_a_further_name_is_admitted_in_any_spelling(name: str):
    Guard(names=(name,)).check("/v1/models", "GET", Headers({"host": "mybox:8080"}))
