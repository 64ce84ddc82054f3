"""The step as one graph, whose kernels and driver the CPU plays, against the same kernels one by one."""

import ctypes
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qchat.core.engine.engine import Engine
from qchat.core.errors import UsageError
from qchat.core.kernels import cuda_driver, launch, recording
from qchat.core.kernels.cuda_driver import DriverError
from qchat.core.kernels.recording import Launch
from qchat.core.machine.backend import mx
from qchat.core.model import cache as caches
from qchat.core.model import step_graph
from qchat.core.model.cache import Cache, DeltaState
from qchat.core.model.network import Model
from qchat.core.native.structures import address
from qchat.core.ops import fused_matvec
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms
from tests.core.kernels import on_cpu
from tests.core.kernels.on_cpu import needs_a_compiler

SIZES: dict[str, Any] = {"head_dim": 256, "linear_key_head_dim": 32, "linear_value_head_dim": 32}


class PlayedDriver:
    """CUDA's driver over this process's memory: a graph is a list of launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Launch, Sequence[int]]] = []
        self.runs = 0

    def launch(self, function: Launch, _blocks: object, _threads: int, places: Sequence[int], _: object):
        self.launches.append((function, places))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def write(self, target: int, words: Sequence[int]) -> None:
        ctypes.memmove(target, (ctypes.c_uint32 * len(words))(*words), 4 * len(words))

    @contextmanager
    def captured(self) -> Iterator["PlayedGraph"]:
        self.launches = []
        graph = PlayedGraph(self)
        yield graph
        graph.launches = self.launches


class PlayedGraph:
    def __init__(self, driver: PlayedDriver):
        self.launches: list[tuple[Launch, Sequence[int]]] = []
        self._driver = driver

    def run(self) -> None:
        self._driver.runs += 1
        for (kernel, inputs, outputs, blocks), places in self.launches:
            on_cpu.run_at(kernel, inputs, outputs, places, blocks)


def played_read(
    number: mx.array, arrays: Sequence[mx.array], also: Sequence[mx.array] = ()
) -> tuple[int, list[int]]:
    mx.eval(number, *arrays, *also)
    return int(number.reshape(-1)[0]), [address(array) for array in arrays]


def played_copies(_done: mx.array, _ticket: int, arrays: Sequence[mx.array]) -> list[mx.array]:
    return [array * 1 for array in arrays]  # not computed, as on a GPU


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> PlayedDriver:
    played = PlayedDriver()

    def call(kernel: launch.Kernel, arrays, *, blocks, results):
        if launch._recorder is not None:
            return launch._recorder(kernel, arrays, blocks, results)
        return on_cpu.run(kernel, arrays, backend="cuda", blocks=blocks, results=results)

    monkeypatch.setattr(launch.Kernel, "__call__", call)
    monkeypatch.setattr(launch, "_device", lambda: "cuda")
    monkeypatch.setattr(recording, "_load", lambda one, _: one)
    monkeypatch.setattr(step_graph, "driver", lambda: played)
    for module in (recording, step_graph):
        monkeypatch.setattr(module, "read_with_addresses", played_read)
    monkeypatch.setattr(step_graph, "copy_after", played_copies)
    monkeypatch.setattr(caches, "GROWTH", 8)
    for name, value in (("KERNELS", "on"), ("COMPILE", "off"), ("DENSE", "off"), ("ACTIVATIONS", "bfloat16")):
        monkeypatch.setenv(f"QCHAT_{name}", value)
    monkeypatch.setenv("QCHAT_TUNE", "off")
    return played


def load(folder: Path, **sizes: Any) -> Model:
    write_checkpoint(folder, **{**SIZES, **sizes})
    return Engine.load(folder).model


class Both:
    """A cache that is read by graphs and its twin, read by the same kernels one by one."""

    def __init__(self, model: Model, ours: Cache, plain: Cache):
        self.model, self.ours, self.plain = model, ours, plain

    @classmethod
    def begin(cls, model: Model) -> "Both":
        return cls(model, model.new_cache(), model.new_cache())

    def copy(self) -> "Both":
        return Both(self.model, self.ours.copy(), self.plain.copy())

    def each(self) -> tuple[Cache, Cache]:
        return self.ours, self.plain

    def read_drafts(self, ids: list[int], kept: int) -> None:
        """Read ids of which only the first are kept."""
        graph = self.model.graph
        for cache, used in zip(self.each(), (graph, None), strict=True):
            self.model.graph = used
            self.model.forward_speculative(mx.array(ids), cache)
            cache.commit(kept, len(ids))
        self.model.graph = graph

    def read(self, ids: list[int]) -> None:
        graph = self.model.graph
        found = self.model.hidden(ids, self.ours)
        logits = self.model.logits(found) if len(ids) == 1 else None
        self.model.graph = None
        try:
            expected = self.model.hidden(ids, self.plain)
            assert mx.array_equal(found, expected)
            if logits is not None:
                assert relative_rms(logits, self.model.logits(expected)) < 2e-2  # theirs are bfloat16
        finally:
            self.model.graph = graph

    def check_states(self) -> None:
        for one, other in zip(self.ours.layers, self.plain.layers, strict=True):
            if isinstance(one, DeltaState):
                assert all(map(mx.array_equal, one.arrays(), other.arrays()))


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_steps_of_caches_that_are_copied_and_take_turns_equal_launches(
    moe: bool, driver: PlayedDriver, tmp_path: Path
):
    """Also where caches grow, are dropped, or read several tokens at once in between."""
    model, choose = load(tmp_path, moe=moe), random.Random(moe)
    alive = [Both.begin(model)]
    alive[0].read([5, 7, 11])
    for cache in alive[0].each():
        cache.shift_positions(-2)  # as after a picture
    for _ in range(24):
        one = choose.choice(alive)
        action = choose.random()
        if action < 0.7:
            one.read([choose.randrange(250)])
        elif action < 0.85:
            alive.append(one.copy())
        elif action < 0.9:
            one.read([choose.randrange(250) for _ in range(choose.randint(2, 5))])
        elif action < 0.94:
            drafts = choose.randint(2, 4)
            one.read_drafts([choose.randrange(250) for _ in range(drafts)], choose.randint(1, drafts))
        elif len(alive) > 1:
            alive.remove(one)
    for one in alive:
        one.check_states()
    assert model.graph is not None and model.graph.notice is None
    assert driver.runs > 8


@needs_a_compiler
@pytest.mark.slow
def test_an_array_that_moved_is_found_again(driver: PlayedDriver, tmp_path: Path):
    """As MLX moves those that the host reads."""
    model = load(tmp_path)
    both = Both.begin(model)
    both.read([5, 7, 11])
    for id in (1, 2, 3):
        both.read([id])
    graph = model.graph
    assert graph is not None and len(graph._steps) == 2
    graph._parameters = graph._parameters * 1
    before = driver.runs
    both.read([4])
    both.check_states()
    assert driver.runs == before + 1 and len(graph._steps) == 1


@needs_a_compiler
@pytest.mark.slow
def test_what_a_step_returned_outlives_the_next_one(driver: PlayedDriver, tmp_path: Path):  # noqa: ARG001
    model = load(tmp_path)
    cache = model.new_cache()
    model.hidden([5, 7, 11], cache)
    model.hidden([1], cache)
    plain = cache.copy()
    first = model.hidden([2], cache)
    logits = model.logits(first)
    model.hidden([3], cache)
    model.graph = None
    expected = model.hidden([2], plain)
    assert mx.array_equal(first, expected)
    assert relative_rms(logits, model.logits(expected)) < 2e-2


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["driver", "wrong", "not finite"])
def test_a_step_that_fails_its_trial_is_left_to_launches(
    fault: str, driver: PlayedDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = load(tmp_path)
    both = Both.begin(model)
    both.read([5, 7, 11])
    if fault == "driver":
        monkeypatch.setattr(step_graph, "driver", raising_driver)
    else:
        factor = 1.2 if fault == "wrong" else float("nan")
        monkeypatch.setattr(
            step_graph, "copy_after", lambda *given: [a * factor for a in played_copies(*given)]
        )
    for id in (1, 2, 3):
        both.read([id])
    both.check_states()
    off = "it would be off by"
    said = {"driver": "there is none", "wrong": f"{off} 0.2", "not finite": f"{off} nan"}
    assert model.graph is not None and model.graph.notice is not None
    assert model.graph.notice == f"a step is not a CUDA graph here, which is slower: {said[fault]}"
    assert driver.runs <= 1


@needs_a_compiler
@pytest.mark.slow
def test_a_graph_that_cannot_be_made_later_is_left_to_launches(
    driver: PlayedDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = load(tmp_path)
    both = Both.begin(model)
    both.read([5, 7, 11])
    both.read([1])
    monkeypatch.setattr(recording, "_load", raising_load)
    for id in (2, 3, 4):  # each home has a graph of its own
        both.read([id])
    both.check_states()
    assert model.graph is not None and model.graph.notice is not None
    assert "attend has no machine code" in model.graph.notice and driver.runs in (1, 2)


def raising_load(one: Launch, _: object) -> Launch:
    if one.kernel.name == "attend":
        raise DriverError("attend has no machine code")
    return one


@needs_a_compiler
@pytest.mark.slow
def test_weights_that_no_kernel_reads_together_are_no_graph(
    driver: PlayedDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else what MLX computed once would stand in every step."""
    model = load(tmp_path)
    monkeypatch.setattr(fused_matvec, "supports", lambda *weights: len(weights) == 1)
    both = Both.begin(model)
    for ids in ([5, 7, 11], [1], [2]):
        model.hidden(ids, both.ours)
    assert model.graph is not None and model.graph.notice is not None
    assert model.graph.notice.endswith("one kernel cannot read all weights of a product")
    assert driver.runs == 0


@needs_a_compiler
@pytest.mark.slow
def test_what_was_not_computed_yet_does_not_see_the_next_caches_states(
    driver: PlayedDriver,  # noqa: ARG001
    tmp_path: Path,
):
    model = load(tmp_path)
    one, other = Both.begin(model), Both.begin(model)
    for both in (one, other):
        both.read([5, 7, 11])
    for id in (1, 2, 3):
        one.read([id])
    late = model.hidden([4, 6], one.ours)
    other.read([9])
    model.graph = None
    assert mx.array_equal(late, model.hidden([4, 6], one.plain))
    one.check_states()


def raising_driver() -> cuda_driver.Driver:
    raise DriverError("there is none")


def test_a_copy_of_lent_states_is_its_own_and_so_is_the_original():
    home = mx.arange(8, dtype=mx.float32)
    mx.eval(home)
    conv, state = home[:4], home[4:]
    mx.eval(conv, state)
    lent = DeltaState(conv, state, lent=state)
    lent.detach()
    assert lent.state is state  # whose memory a slice of it would share
    copy = lent.copy()
    ctypes.memset(address(home), 0, home.nbytes)
    for one in (lent, copy):
        assert one.conv.tolist() == [0, 1, 2, 3] and one.state.tolist() == [4, 5, 6, 7]


def test_a_bad_word_for_graphs_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QCHAT_GRAPHS", "on")
    with pytest.raises(UsageError, match="QCHAT_GRAPHS is 'on', wanted auto, off"):
        step_graph.wanted()


def test_without_a_driver_there_is_a_driver_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_driver, "DRIVER", "libno-such-driver.so")
    with pytest.raises(DriverError, match="libno-such-driver"):
        cuda_driver.Driver()
