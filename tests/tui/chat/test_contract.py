"""The scripted engine of the tests held to the real one: the same methods, events, keys and types.

Both play the same calls, each in a process of its own. The real one has a tiny model.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qchat.core import Store
from qchat.core.events import EVENTS
from qchat.core.worker.protocol import CHAT_METHODS, JOB_METHODS, METHODS, URGENT_METHODS, encode
from qchat.core.worker.wire import RESULTS
from qchat.tui.chat.decoding import decode_event, decode_result
from tests.checkpoints import write_checkpoint
from tests.core.worker.driver import Driver
from tests.hub_server import Hub, Repo
from tests.paths import ROOT
from tests.tui.fake_engine import PROBABILITY, FakeEngine, completion_events
from tests.tui.fake_jobs import PROGRESS

REAL = (sys.executable, "-P", str(Path(__file__).parents[1] / "scripted_model.py"))
ID = "me/tiny"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
QUESTION = {"role": "user", "content": "And in Rome?"}
PRIMED = [
    QUESTION,
    {"role": "assistant", "content": "Wait.", "tool_calls": [{"type": "function", "function": CALL}]},
]
SETTINGS = {"temperature": 0.0, "enable_thinking": True, "max_new_tokens": 200}
BRIEF = {"temperature": 0.0, "enable_thinking": False, "max_new_tokens": 5}
QUANTIZED = {"bits": 4, "group_size": 32}
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 10
SCRIPT = (
    {"method": "load", "background": "compiling", "log": "idle work failed"},
    {
        "method": "send",
        "notice": "the context is shorter",
        "thought": "I must look.",
        "answer": "One moment.",
        "calls": [CALL],
    },
    {"method": "send"},
    {"method": "score", "events": [PROBABILITY]},
    {"method": "complete", "events": completion_events("Yes.")},
    *({"method": method, "events": [PROGRESS]} for method in JOB_METHODS),
)


class Played:
    """What an engine said: results by method, events by name, those of jobs apart."""

    def __init__(self, driver: Driver):
        self.driver = driver
        self.results: dict[str, list[Any]] = defaultdict(list)
        self.events: dict[str, list[Any]] = defaultdict(list)
        self.job_events: dict[str, list[Any]] = defaultdict(list)

    def ask(self, method: str, **params: Any) -> Any:
        """Call a method, which must end with a result."""
        number = self.driver.ask(method, **params)
        result = self.driver.end(number)
        assert "kind" not in result, f"{method}: {result}"
        self.results[method].append(result)
        kept = self.job_events if method in JOB_METHODS else self.events
        for event in self.driver.events(number):
            kept[event["event"]].append(event)
        return result

    def wait_for(self, *names: str) -> None:
        """Wait until these events, which belong to no call, have come."""
        while not self.events.keys() >= set(names):
            for _, message in self.driver.received:
                if "id" not in message and message not in self.events[message["event"]]:
                    self.events[message["event"]].append(message)
            if not self.events.keys() >= set(names):
                self.driver.read()


def play(driver: Driver, folder: Path) -> Played:
    """Call every method once or more."""
    played = Played(driver)
    ask, model = played.ask, str(folder / "tiny")
    store = {"store": str(folder / "conversations.db"), "conversation": 1}
    ask("load", model=model, **store, context_limit=1 << 20, snapshot_budget=1 << 30)
    played.wait_for("ready", "log", "background")
    ask("send", text="The weather in Rome?", settings=SETTINGS)
    ask("answer_tools", results=["sunny"], settings=BRIEF)
    state = ask("retry", settings=BRIEF)["state"]
    ask("switch", number=state["branches"][0]["number"])
    ask("fork", turn=1)
    ask("send", text="Thanks", settings=BRIEF)
    for method in ("state", "explain", "memory", "save_state", "undo"):
        ask(method)
    ask("prompt", text="hello")
    ask("replies")
    ask("score", turn=1, count=2)
    ask("count", text="hello")
    ask("complete", messages=[QUESTION], settings=BRIEF | {"top_logprobs": 2})
    ask("count_messages", messages=[QUESTION], settings=BRIEF)
    ask("rename", title="Weather")
    ask("set_system", text="Be brief.")
    ask("set_tools", tools=TOOLS)
    ask("history", mode="strip")
    ask("edit", turn=1, text="And in Paris?", settings=BRIEF)
    ask("reset")
    ask("prime", messages=PRIMED)
    ask("open", conversation=1)
    ask("cancel", id=0)
    ask("close_thought")
    ask("unload")
    play_jobs(played, folder, model)
    ask("shutdown")
    return played


def play_jobs(played: Played, folder: Path, model: str) -> None:
    ask, small, text = played.ask, str(folder / "tiny-4bit"), str(folder / "text.txt")
    ask("convert", source=model, target=small, options=QUANTIZED)
    ask("calibrate", model=model, output=str(folder / "x.gguf"), data=text, chunk_size=64, chunks=2)
    ask("eval", models=[small], reference=model, data=text, context=64)
    ask("bench", models=[model], runs=1)
    ask("compare", models=[model, small], text="hello", settings=BRIEF)
    ask("inspect", model=model)
    ask("plan", source=model, options=QUANTIZED)
    ask("memory_plan", model=model)
    ask("fetch", id=ID)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text, and a store with a conversation that has tools."""
    folder = tmp_path_factory.mktemp("contract")
    write_checkpoint(folder / "tiny")
    (folder / "text.txt").write_text(TEXT)
    with Store(folder / "conversations.db") as store:
        store.create(settings={"tools": TOOLS})
    return folder


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Played]:
    with Hub({ID: Repo.of(folder / "tiny")}) as hub:
        env = {
            "PYTHONPATH": f"{ROOT / '.dev'}:{ROOT}",
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_HUB_OFFLINE": "0",
        }
        with Driver(REAL, env=env) as driver:
            yield play(driver, folder)


@pytest.fixture(scope="module")
def fake(folder: Path) -> Iterator[Played]:
    with Driver(tuple(FakeEngine(folder, *SCRIPT).command)) as driver:
        yield play(driver, folder)


@pytest.fixture(params=["real", "fake"])
def either(request: pytest.FixtureRequest) -> Played:
    return request.getfixturevalue(request.param)


def as_sent(value: Any) -> Any:
    """What a decoded value becomes on its way through the pipe."""
    return json.loads(encode({"value": value}))["value"]


def test_every_method_ends_with_exactly_its_type(either: Played):
    assert either.results.keys() == METHODS.keys() == RESULTS.keys()
    assert METHODS.keys() == CHAT_METHODS.keys() | URGENT_METHODS.keys() | JOB_METHODS.keys()
    for method, results in either.results.items():
        for result in results:
            assert as_sent(decode_result(method, result)) == result, method


def test_every_event_is_exactly_of_its_type(either: Played):
    assert either.events.keys() == EVENTS.keys()
    for name, events in either.events.items():
        for event in events:
            assert {"event": name, **as_sent(decode_event(event))} == event


def test_the_progress_of_jobs_has_the_same_keys(either: Played):
    sent = either.job_events["progress"]
    assert sent
    for event in sent:
        assert PROGRESS.keys() - {"seconds_left"} <= event.keys() <= PROGRESS.keys()


# --- both compared ---

Shape = Mapping[str, "Shape"] | frozenset[str]
OPEN = ("load.model.forms",)  # its keys are data: the operations whose forms were raced here


def shape_of(values: Iterable[Any]) -> Shape:
    """The keys of all these objects with the shapes under them; of other values the kinds."""
    given = [item for value in values for item in (value if isinstance(value, list) else [value])]
    objects = [value for value in given if isinstance(value, dict)]
    if objects:
        keys = {key for value in objects for key in value}
        return {key: shape_of(value[key] for value in objects if key in value) for key in keys}
    return frozenset(kind_of(value) for value in given if value is not None)


def kind_of(value: Any) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def differences(real: Shape, fake: Shape, where: str) -> list[str]:
    """Where the shapes differ; an empty list, or None, has any shape."""
    if where in OPEN:
        real, fake = merged(real), merged(fake)
    if not real or not fake:
        return []
    if isinstance(real, frozenset) or isinstance(fake, frozenset):
        return [] if real == fake else [f"{where} is {real} there and {fake} here"]
    lacking = [f"{where} has {key} only on one side" for key in real.keys() ^ fake.keys()]
    shared = real.keys() & fake.keys()
    return lacking + [line for key in shared for line in differences(real[key], fake[key], f"{where}.{key}")]


def merged(shape: Shape) -> Shape:
    """The shapes under all keys of an object, as one."""
    return frozenset().union(*shape.values()) if isinstance(shape, Mapping) else shape


def test_an_object_with_open_keys_is_held_to_the_kinds_of_its_values():
    sent = shape_of([{"a": "x"}])
    assert differences(sent, shape_of([{"b": "y"}]), *OPEN) == []
    assert differences(sent, shape_of([{"a": 1}]), *OPEN) != []
    assert differences(sent, shape_of([{"b": "y"}]), "load.model.name") != []


def test_the_scripted_engine_has_the_keys_of_the_real_one(real: Played, fake: Played):
    found = [
        line
        for kind in ("results", "events")
        for name, sent in getattr(real, kind).items()
        for line in differences(shape_of(sent), shape_of(getattr(fake, kind)[name]), name)
    ]
    assert found == []


def rename(value: Any, old: str, new: str) -> Any:
    """The value with a key renamed wherever it stands."""
    if isinstance(value, dict):
        return {new if key == old else key: rename(item, old, new) for key, item in value.items()}
    return [rename(item, old, new) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("key", ["turns", "siblings", "performance", "drafts_accepted", "arguments", "seed"])
def test_a_key_renamed_on_one_side_is_found(real: Played, fake: Played, key: str):
    def found(real: Callable[[Any], Any], fake: Callable[[Any], Any], sides: tuple[Played, Played]) -> bool:
        methods = ("load", "send")
        return any(
            differences(shape_of(map(real, sides[0].results[m])), shape_of(map(fake, sides[1].results[m])), m)
            for m in methods
        )

    def renamed(value: Any) -> Any:
        return rename(value, key, f"{key}_")

    assert found(renamed, lambda value: value, (real, fake))
    assert found(lambda value: value, renamed, (real, fake))
