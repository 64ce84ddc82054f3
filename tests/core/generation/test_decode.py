"""Prefill and decoding against one token at a time."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qchat.core.engine.engine import Engine
from qchat.core.errors import UsageError
from qchat.core.generation import decode
from qchat.core.generation.decode import Decoder, TimedChunks, prefill
from qchat.core.generation.sampling import Sampling
from qchat.core.machine.backend import mx
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms
from tests.fake_clock import FakeClock

IDS = [(7 * i * i + 3 * i) % 250 for i in range(150)]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def engine(request, tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, moe=request.param, hv_ratio=3)
    return Engine.load(folder)


def last_logits(engine: Engine, chunks: Iterator[list[int]]) -> mx.array:
    cache = engine.model.new_cache()
    hidden = None
    for chunk in chunks:
        hidden = engine.model.hidden(chunk, cache)
    assert hidden is not None
    return engine.model.logits(hidden[:, -1:])[-1]


def pieces(length: int) -> Iterator[list[int]]:
    return (IDS[i : i + length] for i in range(0, len(IDS), length))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [2, 3, 31, 32, 33, 64, 149, 512])
def test_prefill_in_chunks_equals_one_token_at_a_time(engine, chunk):
    assert relative_rms(last_logits(engine, pieces(chunk)), last_logits(engine, pieces(1))) <= 2e-5


@pytest.mark.slow
def test_logits_without_a_cache_equal_those_with_one(engine):
    assert relative_rms(engine.logits(IDS)[-1], last_logits(engine, pieces(1))) <= 2e-5


@pytest.mark.parametrize(
    ("ids", "found"), [([], "no ids"), ([1, -1], "the id -1"), ([1 << 40], "the id 1099511627776")]
)
def test_logits_after_ids_of_no_token_are_refused(engine, ids, found):
    """An id beyond the end of the embedding crashed the process."""
    with pytest.raises(UsageError, match=f"after {found}, wanted ids from 0 to"):
        engine.logits(ids)


def test_prefill_reports_every_chunk(engine, monkeypatch):
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 64)
    cache = engine.model.new_cache()
    assert list(prefill(engine.model, cache, IDS)) == [64, 128, 150]
    assert cache.length == len(IDS)


def test_prefill_stops_between_chunks_when_cancelled(engine, monkeypatch):
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 64)
    cache, asked = engine.model.new_cache(), iter([False, True])
    assert list(prefill(engine.model, cache, IDS, lambda: next(asked))) == [64]
    assert cache.length == 64


@pytest.mark.slow
def test_decoding_ahead_draws_the_ids_of_a_plain_loop(engine):
    cache = engine.model.new_cache()
    list(prefill(engine.model, cache, IDS))
    decoder = Decoder(engine.model, cache, GREEDY)
    drawn = [decoder.next() for _ in range(8)]
    ids = list(IDS)
    for _ in range(8):
        ids.append(int(mx.argmax(engine.logits(ids)[-1])))
    assert drawn == ids[len(IDS) :]


def test_a_forced_id_is_read_as_if_it_had_been_drawn(engine):
    cache = engine.model.new_cache()
    list(prefill(engine.model, cache, IDS))
    decoder = Decoder(engine.model, cache, GREEDY)
    first = decoder.next()
    decoder.force(42)
    assert decoder.next() == 42
    wanted = engine.logits([*IDS, first, 42])[-1]
    assert decoder.next() == int(mx.argmax(wanted))


def test_rank_counts_the_likelier_ids(engine):
    cache = engine.model.new_cache()
    list(prefill(engine.model, cache, [5]))
    decoder = Decoder(engine.model, cache, GREEDY)
    order = mx.argsort(-engine.logits([5])[-1])
    assert [decoder.rank(int(order[i])) for i in (0, 1, 9)] == [0, 1, 9]


# --- chunks by time ---


class SlowModel:
    """A model of a fixed pace: reading moves a clock on, and nothing is computed."""

    plan = None

    def __init__(self, clock: FakeClock, seconds_per_token: float):
        self.clock, self.pace, self.chunks = clock, seconds_per_token, list[int]()
        self.seconds_per_chunk = 0.0

    def hidden(self, chunk: list[int], _cache: Any) -> mx.array:
        self.clock.now += self.seconds_per_chunk + self.pace * len(chunk)
        self.chunks.append(len(chunk))
        return mx.zeros(1)


@pytest.mark.parametrize("seconds_per_token", [0.4, 0.02, 0.001, 0.0])
def test_timed_chunks_take_as_long_as_they_may(seconds_per_token: float):
    clock = FakeClock()
    model, cache = SlowModel(clock, seconds_per_token), SimpleNamespace(hidden=None, arrays=list)
    timed = TimedChunks(0.15, clock)
    for count in (100, 3000):  # what was learnt serves the next time
        *_, read = prefill(cast(Any, model), cast(Any, cache), range(count), timed=timed)
        assert read == count
    assert sum(model.chunks) == 3100
    learnt = model.chunks[1:]
    assert all(size == 1 or size * seconds_per_token <= 0.151 for size in learnt)
    if seconds_per_token:
        assert max(learnt) == max(1, int(0.15 / seconds_per_token))
    else:
        assert max(learnt) == decode.PREFILL_CHUNK
    assert model.chunks[0] == decode.FIRST_TIMED_CHUNK


def test_a_machine_that_becomes_slower_gets_smaller_chunks():
    clock = FakeClock()
    model, cache = SlowModel(clock, 0.001), SimpleNamespace(hidden=None, arrays=list)
    timed = TimedChunks(0.15, clock)
    steps = prefill(cast(Any, model), cast(Any, cache), range(2000), timed=timed)
    while not model.chunks or model.chunks[-1] < 149:
        next(steps)
    model.pace = 0.01
    next(steps)
    next(steps)
    assert model.chunks[-2] >= 149 and model.chunks[-1] in (14, 15)


def test_chunks_of_which_most_of_the_time_is_fixed_still_grow():
    clock = FakeClock()
    model, cache = SlowModel(clock, 0.001), SimpleNamespace(hidden=None, arrays=list)
    model.seconds_per_chunk = 0.1
    timed = TimedChunks(0.15, clock)
    timed.size = 1  # after something that took very long
    list(prefill(cast(Any, model), cast(Any, cache), range(1000), timed=timed))
    assert max(model.chunks) >= 35
    assert all(0.1 + 0.001 * size <= 0.151 for size in model.chunks)


def test_timed_chunks_read_what_large_ones_do(engine: Engine):
    whole, timed = engine.model.new_cache(), engine.model.new_cache()
    list(prefill(engine.model, whole, IDS))
    list(prefill(engine.model, timed, IDS, timed=TimedChunks(0.15, FakeClock(step=0.02))))
    assert whole.hidden is not None and timed.hidden is not None
    assert relative_rms(engine.model.logits(timed.hidden)[-1], engine.model.logits(whole.hidden)[-1]) < 2e-5
