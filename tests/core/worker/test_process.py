"""The engine process itself, with the built-in model: what it answers, what stops it, that it never stays."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.core import BUILT_IN_MODEL, load_session
from qchat.core.errors import UsageError
from qchat.core.worker.channel import LINES_PER_SECOND, Outbox
from qchat.core.worker.protocol import MAX_LINE_NBYTES, METHODS, Request, decode, encode
from tests.core.worker.driver import COMMAND, Driver
from tests.paths import ROOT

MODEL = str(BUILT_IN_MODEL)
GREEDY = {"temperature": 0.0, "enable_thinking": False, "max_new_tokens": 40}
ENDLESS = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "max_new_tokens": 1900, "seed": 1}
LONG_TEXT = "The quick brown fox jumps over the lazy dog. " * 130
QUESTION = "What is the capital of France?"
# its process is gone so many seconds after nobody is left: two of grace, one until it looks
GONE_SECONDS = 6.0


@pytest.fixture(scope="module")
def shared() -> Iterator[Driver]:
    """One engine with the model, for tests that leave it as it was."""
    with Driver() as driver:
        assert "model" in driver.do("load", model=MODEL)
        yield driver


@pytest.fixture
def engine(shared: Driver) -> Driver:
    shared.received.clear()
    shared.do("reset")
    return shared


# --- the protocol ---


def test_it_is_ready_before_mlx_is_imported(tmp_path: Path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('no library of that name')")
    with Driver(env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / '.dev'}"}) as driver:
        ready = driver.read()
        assert ready is not None
        assert ready == {"event": "ready", "protocol": 1, "pid": driver.process.pid}
        assert driver.read() is None
        assert driver.wait(5) == 1
        assert driver.last_words().splitlines()[-1] == "ImportError: no library of that name"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"\n", "not JSON"),
        (b"nonsense\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"[]\n", "not a JSON object"),
        (b'{"id": 1}\n', "not a request"),
        (b'{"id": true, "method": "state"}\n', "not a request"),
        (b'{"id": 1, "method": "fly", "params": {}}\n', "unknown method 'fly'"),
        (b'{"id": 1, "method": "send", "params": {}}\n', "text is missing"),
        (b'{"id": 1, "method": "send", "params": {"text": 5}}\n', "text is 5, wanted str"),
        (b'{"id": 1, "method": "fork", "params": {"turn": true}}\n', "turn is True, wanted int"),
        (b'{"id": 1, "method": "state", "params": {"x": 1}}\n', "no parameter 'x'"),
    ],
)
def test_a_bad_line_is_refused_and_the_next_one_served(engine: Driver, line: bytes, told: str):
    engine.write(line)
    message = engine.read()
    assert message is not None
    assert told in message["error"]["message"]
    assert engine.do("count", text="a")["tokens"] == 1


def test_a_line_over_the_limit_is_passed_over(engine: Driver):
    for _ in range(65):
        engine.write(b"x" * (MAX_LINE_NBYTES >> 6))
    engine.write(b"\n")
    message = engine.read()
    assert message is not None
    assert "64 MiB" in message["error"]["message"]
    assert engine.do("count", text="a")["tokens"] == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_an_object_or_refused(line: bytes):
    try:
        assert isinstance(decode(line), dict)
    except UsageError as error:
        assert str(error)


@given(
    st.sampled_from(sorted(METHODS)), st.dictionaries(st.text() | st.sampled_from(["text", "model"]), VALUES)
)
def test_any_parameters_are_a_request_or_refused(method: str, params: dict[str, Any]):
    try:
        assert (
            Request.parse({"id": 1, "method": method, "params": params}).params.keys()
            == METHODS[method].keys()
        )
    except UsageError as error:
        assert method in str(error)


@given(VALUES)
def test_what_is_encoded_is_one_line_and_decodes_to_what_json_can_say(value: Any):
    line = encode({"value": value})
    assert line.count(b"\n") == 1
    assert encode(decode(line)) == line


def test_events_come_at_a_bounded_pace_and_lose_no_text():
    source, output = os.pipe()
    box, lines = Outbox(output, lambda: None), []
    box.begin_call(7)

    def read() -> None:
        with os.fdopen(source, "rb") as file:
            lines.extend(file)

    reader = threading.Thread(target=read)
    reader.start()
    begin = time.monotonic()
    words = [f"{n} " for n in range(1500)]
    for word in words:
        box.send_event({"event": "text", "text": word, "tokens": 1})
        time.sleep(0.0002)
    box.end_call(7, {"state": {}})
    seconds = time.monotonic() - begin
    box.close()
    os.close(output)
    reader.join()
    messages = [json.loads(line) for line in lines]
    events = [event for message in messages[:-1] for event in message["events"]]
    assert "".join(event["text"] for event in events) == "".join(words)
    assert sum(event["tokens"] for event in events) == len(words)
    assert messages[-1] == {"id": 7, "result": {"state": {}}}
    assert 3 < len(messages) <= LINES_PER_SECOND * seconds + 3


def test_joined_pieces_of_two_compared_models_stay_apart_and_known():
    source, output = os.pipe()
    box = Outbox(output, lambda: None)
    box.begin_call(1)
    for side in (0, 0, 1, 1):
        box.send_event({"event": "text", "text": f"{side}", "tokens": 1, "side": side})
    box.end_call(1, {})
    box.close()
    os.close(output)
    with os.fdopen(source, "rb") as file:
        events = [event for line in file for event in json.loads(line).get("events", ())]
    said = {side: "".join(e["text"] for e in events if e["side"] == side) for side in (0, 1)}
    assert said == {0: "00", 1: "11"}


def test_a_reader_that_is_slow_does_not_hold_up_the_model():
    source, output = os.pipe()
    box = Outbox(output, lambda: None)
    box.begin_call(1)
    begin = time.monotonic()
    for _ in range(2000):
        box.send_event({"event": "text", "text": "x" * 1000, "tokens": 1})
    assert time.monotonic() - begin < 60  # it would wait for ever
    os.close(source)
    box.close()  # its thread would write to whichever pipe gets the number of `output` next
    os.close(output)


# --- the model ---


@pytest.mark.slow
def test_loading_tells_its_progress_and_what_the_model_is():
    with Driver() as driver:
        number = driver.ask("load", model=MODEL, system="Be brief.", history="strip")
        result = driver.end(number)
        assert "model" in result, result
        done = [e["done_nbytes"] for e in driver.events(number) if e["event"] == "load"]
        assert done == sorted(done)
        assert done[-1] == result["model"]["nbytes"]
        assert result["model"]["max_position_embeddings"] == 2048
        assert (result["state"]["system"], result["state"]["history"]) == ("Be brief.", "strip")
        assert result["state"]["turns"] == []


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"model": "/nowhere"}, "ModelError"),
        ({"model": MODEL, "defaults": {"temprature": 1}}, "UsageError"),
        ({"model": MODEL, "defaults": {"model": "x"}}, "UsageError"),
        ({"model": MODEL, "history": "all"}, "UsageError"),
        ({"model": MODEL, "conversation": 3}, "UsageError"),
        ({"model": MODEL, "store": "/proc/nothing/here"}, "StoreError"),
    ],
)
def test_what_cannot_be_loaded_is_refused_and_the_model_before_it_stays(
    engine: Driver, params: dict[str, Any], kind: str
):
    assert engine.do("load", **params)["kind"] == kind
    assert engine.do("count", text="a")["tokens"] == 1


def test_without_a_model_there_is_nothing_to_ask():
    with Driver() as driver:
        for method in ("state", "undo", "retry", "explain"):
            assert driver.do(method)["message"] == "no model is loaded"


@pytest.mark.slow
def test_a_reply_says_what_the_session_itself_would_say(engine: Driver):
    number = engine.ask("send", text=QUESTION, settings=GREEDY)
    result = engine.end(number)
    events = engine.events(number)
    done = load_session(MODEL).send(QUESTION, **GREEDY)
    assert "".join(event["text"] for event in events if event["event"] == "text") == done.text
    assert events[-1]["event"] == "done"
    assert events[-1]["generated_tokens"] == done.generated_tokens
    assert [event["event"] for event in events[:2]] == ["sync", "prefill"]
    assert result["state"]["turns"][0]["answer"] == done.text


def test_the_memory_is_told_while_something_runs(engine: Driver):
    number = engine.ask("send", text=QUESTION, settings=ENDLESS)
    for _ in range(2):
        memory = engine.until(number, "memory")
        assert 0 < memory["active_nbytes"] <= memory["peak_nbytes"] < memory["limit_nbytes"]
    engine.ask("cancel", id=number)
    engine.end(number)


@pytest.mark.slow
def test_the_conversation_is_moved_in_and_asked_about(engine: Driver):
    for text in ("one", "two"):
        assert "state" in engine.do("send", text=text, settings=GREEDY)
    assert engine.do("undo")["question"] == "two"
    assert len(engine.do("retry", settings=GREEDY)["state"]["branches"]) == 2
    assert engine.do("edit", turn=1, text="uno", settings=GREEDY)["state"]["turns"][0]["question"] == "uno"
    number = engine.do("state")["state"]["branches"][0]["number"]
    assert len(engine.do("switch", number=number)["state"]["turns"]) == 2
    assert len(engine.do("fork", turn=1)["state"]["turns"]) == 1
    assert engine.do("set_system", text="Sing.")["state"]["system"] == "Sing."
    assert engine.do("history", mode="strip")["state"]["history"] == "strip"
    assert engine.do("rename", title="Numbers")["state"]["title"] == "Numbers"
    assert engine.do("explain")["turns"][0]["how"] == "rebuild"
    assert engine.do("memory")["weights_nbytes"] > 0
    prompt = engine.do("prompt", text="three", settings=GREEDY)
    assert "Sing." in prompt["text"]
    assert "<|im_start|>user\nthree<|im_end|>" in prompt["text"]
    assert engine.do("save_state") == {"saved": False}
    primed = engine.do(
        "prime", messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    )
    assert primed["state"]["turns"][-1]["answer"] == "a"


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("send", {"text": "x", "settings": {"temperature": "hot"}}),
        ("send", {"text": "x", "settings": {"text": "y"}}),
        ("send", {"text": "x", "settings": {"self": 1}}),
        ("send", {"text": "word " * 5000}),
        ("edit", {"turn": 9, "text": "x"}),
        ("switch", {"number": 99999}),
        ("fork", {"turn": 0}),
        ("answer_tools", {"results": [1]}),
        ("history", {"mode": "all"}),
        ("open", {"conversation": 1}),
        ("prime", {"messages": [{"role": "user"}]}),
        ("prime", {"messages": [1]}),
        ("inspect", {"model": "/nowhere"}),
        ("plan", {"source": "/nowhere"}),
        ("convert", {"source": MODEL, "target": "/nowhere/x", "options": {"bits": "two"}}),
        ("convert", {"source": MODEL, "target": "/nowhere/x", "options": {"speed": 2}}),
        ("convert", {"source": MODEL, "target": "/nowhere/x", "awq": "maybe"}),
        ("calibrate", {"model": "/nowhere", "output": "/nowhere/x"}),
        ("eval", {"models": ["/nowhere"]}),
        ("eval", {"models": []}),
        ("compare", {"models": ["/nowhere"], "text": "x"}),
        ("bench", {"models": []}),
        ("bench", {"models": [5]}),
    ],
)
def test_what_cannot_be_done_is_an_error_in_one_sentence(engine: Driver, method: str, params: dict[str, Any]):
    error = engine.do(method, **params)
    assert error["exit_code"] in (1, 2, 3, 4)
    assert "internal" not in error["message"], error
    assert "\n" not in error["message"]
    assert engine.do("count", text="a")["tokens"] == 1


# --- stopping ---


@pytest.mark.slow
def test_a_reply_is_cancelled_at_its_next_token(engine: Driver):
    number = engine.ask("send", text=QUESTION, settings=ENDLESS)
    engine.until(number, "thought")
    engine.ask("cancel", id=number)
    turn = engine.end(number)["state"]["turns"][0]
    assert turn["stats"]["generated_tokens"] < ENDLESS["max_new_tokens"] / 2
    assert turn["finish_reason"] == "cancelled"
    assert engine.events(number)[-1]["finish_reason"] == "cancelled"


@pytest.mark.slow
def test_a_reply_is_cancelled_while_its_prompt_is_read(engine: Driver):
    number = engine.ask("send", text=LONG_TEXT, settings=GREEDY)
    engine.until(number, "prefill")
    engine.ask("cancel", id=number)
    assert engine.end(number)["state"]["turns"] == []
    assert engine.events(number)[-1]["generated_tokens"] == 0


def test_a_request_that_still_waits_is_cancelled_before_it_begins(engine: Driver):
    first = engine.ask("send", text=QUESTION, settings=ENDLESS)
    second = engine.ask("count", text="a")
    engine.ask("cancel", id=second)
    engine.ask("cancel", id=first)
    engine.end(first)
    assert engine.end(second)["kind"] == "Cancelled"


@pytest.mark.slow
def test_cancelling_what_is_over_stops_nothing(engine: Driver):
    number = engine.ask("count", text="a")
    engine.end(number)
    engine.do("cancel", id=number)
    engine.do("cancel", id=number + 999)
    assert (
        engine.do("send", text=QUESTION, settings=GREEDY)["state"]["turns"][0]["finish_reason"] != "cancelled"
    )


@pytest.mark.slow
def test_a_thought_is_closed_on_request_and_the_answer_begins(engine: Driver):
    settings = {**ENDLESS, "temperature": 0.6, "top_k": 20, "max_new_tokens": 400}
    number = engine.ask("send", text=QUESTION, settings=settings)
    engine.until(number, "thought")
    engine.ask("close_thought")
    turn = engine.end(number)["state"]["turns"][0]
    assert turn["answer"]
    assert not engine.events(number)[-1]["thinking_cut"]


@pytest.mark.slow
def test_loading_is_cancelled_between_two_tensors():
    with Driver() as driver:
        number = driver.ask("load", model=MODEL)
        driver.ask("cancel", id=number)
        assert driver.end(number)["kind"] == "Cancelled"
        assert "model" in driver.do("load", model=MODEL)


@pytest.mark.slow
def test_ctrl_c_is_for_the_front_end(engine: Driver):
    number = engine.ask("send", text=QUESTION, settings=GREEDY)
    engine.process.send_signal(signal.SIGINT)
    assert "state" in engine.end(number)


# --- ending ---

BUSY = {
    "idle": ("count", {"text": "a"}, None),
    "reading": ("send", {"text": LONG_TEXT}, "prefill"),
    "answering": ("send", {"text": QUESTION, "settings": ENDLESS}, "thought"),
    "converting": ("convert", {"source": MODEL, "options": {"bits": 4}}, "progress"),
}


def busy(driver: Driver, doing: str, folder: Path) -> None:
    """Bring an engine to where it is in the middle of something."""
    driver.do("load", model=MODEL)
    method, params, event = BUSY[doing]
    if method == "convert":
        params = params | {"target": str(folder / "variant")}
    number = driver.ask(method, **params)
    if event is None:
        driver.end(number)
    else:
        driver.until(number, event)


@pytest.mark.slow
@pytest.mark.parametrize("doing", BUSY)
@pytest.mark.parametrize("how", ["closed", "SIGTERM"])
def test_it_ends_when_its_input_does_whatever_it_is_doing(tmp_path: Path, doing: str, how: str):
    with Driver() as driver:
        busy(driver, doing, tmp_path)
        if how == "closed":
            assert driver.process.stdin is not None
            driver.process.stdin.close()
        else:
            driver.process.terminate()
        assert driver.wait(GONE_SECONDS) == 0
    assert not (tmp_path / "variant").exists()


PARENT = """
import os, subprocess, sys
held = os.dup(int(sys.argv[1]))  # the pipe stays open when this process is gone
os.set_inheritable(held, True)
worker = subprocess.Popen([*sys.argv[3:]], stdin=int(sys.argv[2]), pass_fds=[])
print(worker.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_it_ends_when_its_parent_is_killed_though_somebody_keeps_the_pipe_open():
    read_end, write_end = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(write_end), str(read_end), *COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(read_end, write_end),
        env={**os.environ, "PYTHONPATH": str(ROOT / ".dev")},
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.write(write_end, encode({"id": 1, "method": "load", "params": {"model": MODEL}}))
        while b'"result"' not in parent.stdout.readline():
            pass
        parent.kill()
        os.close(read_end)
        end = time.monotonic() + GONE_SECONDS
        while is_running(pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not is_running(pid)
    os.close(write_end)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_shutdown_ends_it_after_what_was_asked_before():
    with Driver() as driver:
        first = driver.ask("inspect", model=MODEL)
        second = driver.ask("shutdown")
        assert "classes" in driver.end(first)
        assert driver.end(second) == {}
        assert driver.wait(5) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="macOS continues no stopped process")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
def test_a_stopped_engine_ends_when_its_front_end_is_killed():
    front = (
        "import subprocess, sys, time\n"
        "engine = subprocess.Popen([sys.executable, '-P', '-m', 'qchat.core.worker'], stdin=subprocess.PIPE,"
        " stdout=subprocess.PIPE, start_new_session=True)\n"
        "engine.stdout.readline()\n"
        "print(engine.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev")}
    process = subprocess.Popen([sys.executable, "-c", front], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    engine = int(process.stdout.readline())

    def wait_until(done: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not done():
            assert time.monotonic() < end, state()
            time.sleep(0.02)

    def state() -> str:
        try:
            return Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"

    try:
        os.kill(engine, signal.SIGSTOP)
        wait_until(lambda: state() == "T")
        process.kill()
        process.wait()
        wait_until(lambda: state() in ("gone", "Z", "X"))
    finally:
        process.kill()
        process.stdout.close()
        if state() not in ("gone", "Z", "X"):
            os.kill(engine, signal.SIGKILL)


@pytest.mark.slow
def test_a_front_end_that_stops_reading_does_not_keep_it_alive():
    with Driver() as driver:
        driver.do("load", model=MODEL)
        assert driver.process.stdout is not None
        assert driver.process.stdin is not None
        driver.process.stdout.close()
        driver.ask("send", text=QUESTION, settings=ENDLESS)
        driver.process.stdin.close()
        assert driver.wait(GONE_SECONDS) == 0
