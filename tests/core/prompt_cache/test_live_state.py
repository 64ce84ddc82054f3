"""Conversations that share what was read: nothing is read twice, and nothing is ever taken for another."""

import gc
import os
import random
from pathlib import Path

import pytest

from qchat.core.engine.engine import Engine
from qchat.core.machine.backend import mx
from qchat.core.prompt_cache import live_state
from qchat.core.prompt_cache.live_state import LiveState
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms

# `make fuzz` asks for many more
SCRIPTS = int(os.environ.get("TESTS_SCRIPTS", "3"))
LIMIT = 4e-5  # an untrained model amplifies rounding


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, hv_ratio=3)
    return Engine.load(folder)


def read(live: LiveState, ids: list[int], conversation: object = None) -> int:
    """Read `ids` as a reply does; returns how many were not read again."""
    cached = live.sync(ids).cached
    for _ in live.read(ids, lambda: False, conversation):
        pass
    live.keep_snapshot("A", 1, conversation)
    return cached


def words(seed: int, count: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(5, 90) for _ in range(count)]


def system_block(engine: Engine, count: int) -> list[int]:
    text = f"<|im_start|>system\n{'rule ' * count}<|im_end|>\n"
    return engine.tokenizer.encode(text)


def question(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.encode(f"<|im_start|>user\n{text * 70}<|im_end|>\n")


def is_exact(live: LiveState) -> bool:
    return relative_rms(live.logits(), live.engine.logits(live.ids)[-1]) <= LIMIT


@pytest.mark.slow
def test_the_second_conversation_reads_the_same_system_block_from_the_cache(engine):
    live, system = LiveState(engine), system_block(engine, 80)
    assert read(live, [*system, *question(engine, "one ")], "a") == 0
    assert read(live, [*system, *question(engine, "other ")], "b") == len(system)
    assert is_exact(live)


@pytest.mark.slow
def test_the_third_conversation_reads_from_where_the_first_two_part(engine):
    live, common = LiveState(engine), words(1, 150)
    assert read(live, [*common, *words(2, 90)], "a") == 0
    assert read(live, [*common, *words(3, 90)], "b") == 0
    assert read(live, [*common, *words(4, 90)], "c") == len(common)
    assert is_exact(live)


@pytest.mark.slow
def test_a_long_prompt_is_cut_every_so_many_tokens(engine, monkeypatch):
    monkeypatch.setattr(live_state, "CUT_PERIOD", 200)
    live, ids = LiveState(engine), words(1, 700)
    read(live, ids, "a")
    assert [s.length for s in live.snapshots if s.kind == "cut"] == [200, 400, 600]
    live.forget()
    assert read(live, [*ids[:450], *words(2, 50)], "b") == 400
    assert is_exact(live)


def test_short_beginnings_are_not_worth_a_snapshot(engine):
    live = LiveState(engine)
    read(live, [*words(1, 20), *words(2, 90)], "a")
    read(live, [*words(1, 20), *words(3, 90)], "b")
    assert not [s for s in live.snapshots if s.kind == "cut"]


def test_after_a_restart_the_disk_has_it(engine, tmp_path):
    ids = words(1, 150)
    first = LiveState(engine)
    first.keep_on_disk(tmp_path / "states")
    read(first, ids)
    assert first.save([*ids, 7], "1")
    second = LiveState(engine)
    second.keep_on_disk(tmp_path / "states")
    assert second.sync([*ids, 7, 8]).cached == len(ids)
    assert is_exact(second)


def test_the_longest_state_is_saved_be_it_live_or_kept(engine, tmp_path):
    live, ids = LiveState(engine), words(1, 90)
    live.keep_on_disk(tmp_path / "states")
    read(live, ids)
    read(live, [*ids, *words(2, 90)])
    live.sync(ids)
    assert len(live.ids) == len(ids)
    assert live.save([*ids, *words(2, 90), 7], "1")
    assert live.disk is not None
    assert live.disk.find([*ids, *words(2, 90)]) == 180


class Readings:
    """Conversations with common beginnings, read in turn under budgets that force evictions."""

    def __init__(self, engine: Engine, seed: int, folder: Path):
        self.engine, self.folder, self.random = engine, folder, random.Random(seed)
        self.conversations = [words(n // 3, 80) + words(100 + n, 30) for n in range(6)]
        self.budget = self.random.choice([150_000, 400_000, 4_000_000])
        self.live = self.start()

    def start(self) -> LiveState:
        live = LiveState(self.engine, self.budget)
        live.keep_on_disk(self.folder, 2_000_000)
        return live

    def run(self, steps: int) -> None:
        for _ in range(steps):
            chosen = self.random.randrange(len(self.conversations))
            ids, before = self.conversations[chosen], self.live
            action = self.random.choice(["go on", "go on", "edit", "cancel", "save", "restart", "fail"])
            if action == "go on":
                ids += words(self.random.randrange(1000), self.random.randrange(1, 90))
            elif action == "edit":
                del ids[self.random.randrange(40, len(ids)) :]
                ids += words(self.random.randrange(1000), 10)
            elif action == "save":
                self.live.save(ids, str(chosen))
            elif action == "restart":
                self.live = self.start()
            elif action == "fail":
                self.live.forget()
            if action == "cancel":
                self.live.sync(ids)
                next(self.live.read(ids, lambda: False, chosen), None)
            else:
                read(self.live, ids, chosen)
            assert is_exact(self.live), (action, before is self.live)
            assert self.live.snapshots.nbytes <= self.budget
            assert sum(path.stat().st_size for path in self.folder.glob("*.safetensors")) <= 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SCRIPTS))
def test_whatever_was_read_before_the_logits_are_those_of_a_cold_run(engine, seed, tmp_path, monkeypatch):
    monkeypatch.setattr(live_state, "CUT_PERIOD", 100)
    monkeypatch.setattr(live_state, "MIN_CUT", 16)
    Readings(engine, seed, tmp_path / "states").run(15)


@pytest.mark.slow
def test_conversations_take_the_memory_that_is_counted_and_no_more(engine):
    """By MLX's own counter: an array that is a slice of a larger one would keep all of that alive."""

    def talk() -> LiveState:
        live = LiveState(engine, 3_000_000)
        for turn in range(3):
            for conversation in range(3):
                ids = [*words(1, 150), *words(2 + conversation, 50 * (turn + 1))]
                read(live, ids, conversation)
        return live

    talk()  # whatever is kept for good, kernels and constants
    before = active_nbytes()
    live = talk()
    held = active_nbytes() - before
    assert live.snapshots.nbytes <= 3_000_000
    counted = live.snapshots.nbytes + live.cache.nbytes
    assert counted * 0.98 <= held <= counted * 1.02 + 100_000


def active_nbytes() -> int:
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()
