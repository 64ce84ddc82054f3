"""Which snapshots are kept, what they share, and which go first."""

import pytest

from qchat.core.engine.engine import Engine
from qchat.core.model.cache import Cache, KVCache
from qchat.core.prompt_cache.snapshots import Snapshots
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return Engine.load(folder)


def grown(engine: Engine, cache: Cache, ids: list[int]) -> Cache:
    engine.model.hidden(ids, cache)
    return cache


def read(engine: Engine, ids: list[int]) -> Cache:
    return grown(engine, engine.model.new_cache(), ids)


def keys_nbytes(cache: Cache) -> int:
    """The bytes of keys and values that the cache itself holds."""
    return sum(layer.nbytes for layer in cache.layers if isinstance(layer, KVCache))


def is_exact(engine: Engine, cache: Cache, ids: list[int]) -> bool:
    probe = cache.copy()
    probe.own()
    engine.model.hidden([5], probe)
    assert probe.hidden is not None
    found, cold = engine.model.logits(probe.hidden)[-1], engine.logits([*ids, 5])[-1]
    return relative_rms(found, cold) <= 4e-5


COMMON, LEFT, RIGHT = list(range(5, 65)), list(range(20, 50)), list(range(30, 60))


def two_branches(engine: Engine) -> tuple[Snapshots, Cache]:
    """Two continuations of COMMON; the live cache has read the second one."""
    kept, live = Snapshots(1 << 30), read(engine, COMMON)
    kept.keep(live, COMMON, 1, "A", "a")
    kept.keep(grown(engine, live, LEFT), COMMON + LEFT, 1, "B", "a")
    common = kept.find(COMMON)
    assert common is not None
    live = kept.follow(common, live)
    kept.keep(grown(engine, live, RIGHT), COMMON + RIGHT, 1, "B", "b")
    return kept, live


def test_branches_share_what_they_have_in_common(engine):
    kept, live = two_branches(engine)
    left, right, common = (kept.find(ids) for ids in (COMMON + LEFT, COMMON + RIGHT, COMMON))
    assert left and right and common
    whole = keys_nbytes(read(engine, COMMON + LEFT))
    assert keys_nbytes(left.cache) <= 0.5 * whole
    assert common.reads is right.reads is live
    assert left.reads is None
    for one, ids in ((left, COMMON + LEFT), (right, COMMON + RIGHT), (common, COMMON)):
        assert is_exact(engine, one.cache, ids)


def test_what_is_read_later_changes_no_snapshot(engine):
    kept, live = two_branches(engine)
    left = kept.find(COMMON + LEFT)
    assert left is not None
    live = kept.follow(left, live)
    grown(engine, live, RIGHT)
    for ids in (COMMON, COMMON + LEFT, COMMON + RIGHT):
        found = kept.find(ids)
        assert found is not None and found.length == len(ids)
        assert is_exact(engine, found.cache, ids)


@pytest.mark.slow
def test_a_snapshot_that_must_go_leaves_its_keys_to_those_that_share_them(engine):
    kept, live = two_branches(engine)
    common, left = kept.find(COMMON), kept.find(COMMON + LEFT)
    assert common and left
    kept.part_from(live)
    common.priority = -1.0
    kept.shrink(kept.nbytes - 1)
    assert kept.find(COMMON) is None
    assert is_exact(engine, left.cache, COMMON + LEFT)
    assert left.saved_tokens == left.length
    kept.keep(read(engine, COMMON), COMMON, 2, "A", "c")
    again = kept.find(COMMON)
    assert again is not None
    assert is_exact(engine, again.cache, COMMON)
    assert is_exact(engine, left.cache, COMMON + LEFT)
    kept.shrink(0)
    assert (list(kept), kept.nbytes) == ([], 0)


def test_the_one_that_saves_least_for_its_bytes_goes_first(engine):
    kept = Snapshots(1 << 30)
    for conversation, ids in (("short", COMMON[:10]), ("long", RIGHT + COMMON), ("used", LEFT[:12])):
        kept.keep(read(engine, ids), ids, 1, "A", conversation)
    live = engine.model.new_cache()
    for _ in range(20):
        used = kept.find(LEFT[:12])
        assert used is not None
        live = kept.follow(used, live)
    order = []
    while names := [one.conversation for one in kept]:
        order.append(set(names))
        kept.shrink(kept.nbytes - 1)
    assert [len(names) for names in order] == [3, 2, 1]
    assert "short" not in order[1]
    assert order[2] == {"used"}


def test_one_unused_for_long_goes_before_newer_ones(engine):
    kept = Snapshots(1 << 30)
    ids = [[n] * 20 for n in range(1, 40)]
    kept.keep(read(engine, ids[0]), ids[0], 1, "A", 0)
    kept.budget_nbytes = 5 * kept.nbytes
    for conversation, one in enumerate(ids[1:], 1):
        kept.keep(read(engine, one), one, 1, "A", conversation)
    assert kept.nbytes <= kept.budget_nbytes
    assert kept.find(ids[0]) is None
    assert kept.find(ids[-1]) is not None


@pytest.mark.slow
def test_thinning_one_conversation_leaves_what_another_continues_from(engine):
    kept = Snapshots(1 << 30)
    kept.keep(read(engine, COMMON), COMMON, 1, "prompt", "a")
    kept.keep(read(engine, COMMON + LEFT), COMMON + LEFT, 1, "A", "b")
    live = read(engine, RIGHT)
    kept.keep(live, RIGHT, 3, "A", "a")
    assert kept.find(COMMON) is not None
    kept.keep(read(engine, RIGHT + LEFT), RIGHT + LEFT, 1, "prompt", "a")
    kept.keep(grown(engine, live, COMMON), RIGHT + COMMON, 2, "A", "a")
    assert kept.find(RIGHT + LEFT) is kept.find(RIGHT)
