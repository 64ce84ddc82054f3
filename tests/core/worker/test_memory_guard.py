"""Memory pressure in an engine process: scripted readings, real models, and a real limit of 1 GB."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qchat.core.conversation.session import Session
from qchat.core.errors import DoesNotFit, UsageError
from qchat.core.machine.backend import mx
from qchat.core.machine.pressure import CALM_SECONDS, SETTLE_SECONDS, Reading
from qchat.core.worker import jobs
from qchat.core.worker.memory_guard import CACHE_NBYTES, REPLY_STOPPED, MemoryGuard
from qchat.core.worker.methods import EngineMethods
from qchat.core.worker.protocol import METHODS
from tests.checkpoints import BYTE_TOKENS, VOCAB_SIZE, load_tensors, save_shards, write_checkpoint
from tests.core.worker.driver import COMMAND, Driver
from tests.fake_clock import FakeClock
from tests.paths import ROOT

GIB = 1 << 30
CALM = Reading(free_nbytes=8 * GIB, total_nbytes=16 * GIB)
LOW = Reading(free_nbytes=GIB // 2, total_nbytes=16 * GIB)
BRIEF = {"temperature": 0.0, "max_new_tokens": 4}
LONG = {"temperature": 0.0, "max_new_tokens": 400, "stop_loops": False}
GROUPS = Path("/sys/fs/cgroup")
# what a machine with other work on it takes minutes for
in_a_group = pytest.mark.skipif(not os.environ.get("TESTS_PRESSURE"), reason="TESTS_PRESSURE is not set")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(folder)
    return str(folder)


class Stage:
    """An engine's methods whose guard reads what the script says."""

    def __init__(self) -> None:
        self.reading, self.clock = CALM, FakeClock()
        self.events: list[dict[str, Any]] = []
        self.at_event: Callable[[dict[str, Any]], None] = lambda _: None
        self.methods = EngineMethods(self._add, lambda: False)
        self.methods.guard = self.guard = MemoryGuard(
            lambda: self.methods._session, self.methods._tell, lambda: None, lambda: self.reading, self.clock
        )

    def _add(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self.at_event(event)

    def do(self, method: str, **params: Any) -> Any:
        return self.methods.call(method, dict.fromkeys(METHODS[method]) | params)

    def check(self, reading: Reading, seconds: float) -> None:
        self.reading = reading
        for _ in range(int(2 * seconds)):
            self.guard.watch.check()
            self.clock.now += 0.5

    @property
    def session(self) -> Session:
        session = self.methods._session
        assert session is not None
        return session

    @property
    def notices(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "notice"]


@pytest.fixture
def stage() -> Iterator[Stage]:
    limit = mx.set_cache_limit(GIB)
    stage = Stage()
    yield stage
    stage.methods.close()
    mx.set_cache_limit(limit)


def cache_limit() -> int:
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def test_every_step_comes_in_order_during_a_reply_and_the_chat_goes_on(stage: Stage, model: str):
    stage.do("load", model=model)
    stage.do("send", text="hello", settings=BRIEF)
    seen: list[tuple[int, int, bool]] = []

    def press(event: dict[str, Any]) -> None:
        if event["event"] in ("text", "thought"):
            stage.check(LOW, SETTLE_SECONDS)
            snapshots = len(list(stage.session.live.snapshots))
            seen.append((cache_limit(), snapshots, stage.guard._refuses_jobs))

    stage.at_event = press
    stage.do("send", text="and again", settings=LONG)
    stage.at_event = lambda _: None
    done = next(event for event in reversed(stage.events) if event["event"] == "done")
    assert (done["finish_reason"], done["detail"]) == ("cancelled", REPLY_STOPPED)
    assert done["generated_tokens"] < LONG["max_new_tokens"] and done["raw_text"]
    assert [limit == CACHE_NBYTES for limit, *_ in seen[:5]] == [True] * 5
    assert seen[1][1] > 0 and seen[2][1] == 0  # dropped before the event after the second step
    assert [refuses for *_, refuses in seen[:3]] == [False, False, True]
    freed, refused = stage.notices
    assert "MB of snapshots were freed" in freed and "no new job" in refused
    stage.check(LOW, 60)  # nothing is done twice
    stage.do("send", text="go on", settings=BRIEF)
    stage.check(CALM, CALM_SECONDS + 1)
    assert cache_limit() == GIB
    stage.do("send", text="and on", settings=BRIEF)
    assert [event["finish_reason"] for event in stage.events if event["event"] == "done"][2:] == [
        "length"
    ] * 2
    assert stage.notices == [freed, refused, "enough memory is free again"]


def test_a_reply_stopped_while_it_reads_says_why(stage: Stage, model: str):
    stage.do("load", model=model)
    stage.at_event = lambda event: stage.check(LOW, 60) if event["event"] == "prefill" else None
    stage.do("send", text="hello", settings=BRIEF)
    done = stage.events[-1]
    assert (done["finish_reason"], done["detail"], done["generated_tokens"]) == (
        "cancelled",
        REPLY_STOPPED,
        0,
    )


def test_a_users_cancel_gives_no_reason(stage: Stage, model: str):
    stage.do("load", model=model)
    stage.check(LOW, 60)  # no reply is under way
    stage.at_event = lambda event: stage.methods.cancel() if event["event"] == "text" else None
    stage.do("send", text="hello", settings=LONG | {"enable_thinking": False})
    assert (stage.events[-1]["finish_reason"], stage.events[-1]["detail"]) == ("cancelled", "")


def test_between_replies_snapshots_go_to_the_disk(stage: Stage, model: str, tmp_path: Path):
    stage.do("load", model=model, store=str(tmp_path / "c.db"))
    stage.do("send", text="hello", settings=BRIEF)
    assert not list(tmp_path.rglob("*.safetensors"))
    stage.check(LOW, 2 * SETTLE_SECONDS)
    next(stage.methods.idle_work())
    assert not list(stage.session.live.snapshots)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    stage.do("send", text="again", settings=BRIEF)
    assert [text for text in stage.notices if "snapshots were freed" in text]


def test_jobs_are_refused_while_memory_is_low_and_allowed_again(
    stage: Stage, model: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(jobs._JOBS, "bench", lambda *_: {"rows": ["fast"]})  # pyright: ignore[reportArgumentType]
    stage.check(LOW, 3 * SETTLE_SECONDS)
    with pytest.raises(DoesNotFit, match="bench was not started, because memory is low"):
        stage.do("bench", models=[model], runs=1)
    assert stage.do("inspect", model=model)  # which loads no model
    stage.check(CALM, CALM_SECONDS + 1)
    assert stage.do("bench", models=[model], runs=1)["rows"]


def test_a_running_job_is_ended_with_a_sentence(stage: Stage, model: str, monkeypatch: pytest.MonkeyPatch):
    def endless(_: object, send_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        for done in range(1000):
            stage.check(LOW, SETTLE_SECONDS)
            send_event({"event": "progress", "done": done, "total": 1000, "unit": "", "detail": ""})
        raise AssertionError("the job was not ended")

    monkeypatch.setitem(jobs._JOBS, "eval", endless)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DoesNotFit, match="eval was ended before the system had to swap"):
        stage.do("eval", models=[model])
    assert len([event for event in stage.events if event["event"] == "progress"]) == 3
    stage.do("load", model=model)
    stage.do("send", text="hello", settings=BRIEF)
    assert stage.events[-1]["finish_reason"] == "length"


def test_a_wrong_choice_is_refused_and_off_starts_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QCHAT_PRESSURE", "on")
    with pytest.raises(UsageError, match="QCHAT_PRESSURE is 'on', wanted auto, off"):
        stage.guard.start()
    monkeypatch.setenv("QCHAT_PRESSURE", "off")
    stage.guard.start()
    stage.reading = LOW
    stage.guard.begin_job("bench")


def test_no_code_raises_the_limit_on_wired_memory():
    texts = [path.read_text() for path in (*ROOT.glob("core/**/*.py"), *ROOT.glob("tui/**/*.py"))]
    assert len(texts) > 100 and not [text for text in texts if "set_wired_limit" in text]


# --- a real limit ---


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of 1 GB, where this process may make one."""
    first = GROUPS / "memory"
    folder = (first if first.exists() else GROUPS) / f"qchat-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if first.exists() else "memory.max")).write_text(str(10**9))
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no control group can be made here: {error.strerror}")
    yield folder
    for process in (folder / "cgroup.procs").read_text().split():
        os.kill(int(process), signal.SIGKILL)
    while (folder / "cgroup.procs").read_text().strip():
        pass
    folder.rmdir()


def occupy(group: Path, nbytes: int) -> subprocess.Popen[bytes]:
    """A process in the group that takes `nbytes` and keeps them until it is killed."""
    script = (
        f"import sys; open({str(group / 'cgroup.procs')!r}, 'w').write('0'); "
        "x = b'x' * int(sys.argv[1]); print(flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script, str(nbytes)], stdin=pipe, stdout=pipe)
    assert process.stdout and process.stdout.readline()
    return process


def endless(folder: Path) -> None:
    """Let the model never draw a token that ends a reply, at temperature 0."""
    tensors = load_tensors(folder)
    name = "model.language_model.embed_tokens.weight"
    tensors[name] = mx.where(mx.arange(VOCAB_SIZE)[:, None] < BYTE_TOKENS, tensors[name], 0)
    save_shards(folder, tensors)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def engine(group: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Driver]:
    """An engine process in that group, of which another takes a part; keys and values are 32 KB a token."""
    sizes: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    write_checkpoint(
        tmp_path / "m", layer_types=["full_attention"] * 4, max_position_embeddings=262144, mtp=False, **sizes
    )
    endless(tmp_path / "m")
    script = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
    script += f"os.execv({sys.executable!r}, {list(COMMAND)!r})"
    neighbour = occupy(group, request.param)
    quick = {
        "QCHAT_TUNE": "off",
        "QCHAT_COMPILE": "off",
        "QCHAT_NATIVE": "off",
    }  # no other process takes time
    with Driver((sys.executable, "-c", script), quick) as engine:
        assert engine.do("load", model=str(tmp_path / "m"))["model"]["context_limit"] < 20_000
        yield engine
    end(neighbour)


@pytest.mark.slow
@in_a_group
@pytest.mark.parametrize("engine", [570_000_000], indirect=True)
def test_within_a_gigabyte_a_growing_context_kills_nothing(engine: Driver):
    kinds: list[str | None] = []
    while len(kinds) < 100 and (not kinds or kinds[-1] is None):
        done = engine.do("send", text="The quick brown fox jumps. " * 10, settings=BRIEF)
        kinds.append(done.get("kind"))
    assert kinds[-1] in ("ContextLengthExceeded", "DoesNotFit") and len(kinds) > 2
    assert engine.process.poll() is None
    assert engine.do("send", text="no", settings=BRIEF).get("kind") in (None, "ContextLengthExceeded")


@pytest.mark.slow
@in_a_group
@pytest.mark.parametrize("engine", [250_000_000], indirect=True)  # for a reply of more than ten seconds
def test_a_neighbour_that_takes_the_memory_stops_the_reply_and_not_the_process(engine: Driver, group: Path):
    engine.do("send", text="hello", settings=BRIEF)
    number = engine.ask("send", text="and then?", settings=LONG | {"max_new_tokens": 100_000})
    engine.until(number, "prefill")
    first, second = group / "memory.usage_in_bytes", group / "memory.current"
    used = int((first if first.exists() else second).read_text())
    neighbour = occupy(group, 10**9 - used - (100 << 20))
    done = engine.until(number, "done")
    end(neighbour)
    assert (done["finish_reason"], done["detail"]) == ("cancelled", REPLY_STOPPED)
    assert "kind" not in engine.end(number)
    assert "kind" not in engine.do("send", text="hello again", settings=BRIEF)
    assert engine.process.poll() is None
