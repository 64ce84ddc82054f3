"""A state written to disk and read back is the state, and nothing else is ever taken for it."""

import os
from pathlib import Path

import pytest

from qchat.core import Session
from qchat.core.checkpoint.header import read_header
from qchat.core.engine.engine import Engine
from qchat.core.errors import StoreError
from qchat.core.machine.backend import mx
from qchat.core.prompt_cache import disk_tier
from qchat.core.prompt_cache.disk_tier import DiskTier
from qchat.core.storage.state_files import claimed, release
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, head_dim=64)
    return Engine.load(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "states"


def talked(engine: Engine, *, quantized: bool = False, question: str = "hello " * 20) -> Session:
    session = Session(engine, history="preserve", max_new_tokens=5, seed=1, quantized_kv=quantized)
    session.send(question)
    return session


def save(tier: DiskTier, session: Session, owner: str = "1") -> bool:
    return tier.save(session.live.cache, session.ids, owner)


def states(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def only_state(folder: Path) -> Path:
    (path,) = states(folder)
    return path


def next_logits(engine: Engine, cache) -> mx.array:
    probe = cache.copy()
    engine.model.hidden([7, 8], probe)
    return engine.model.logits(probe.hidden)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_a_saved_state_goes_on_as_the_live_one(engine, folder, quantized):
    session, tier = talked(engine, quantized=quantized), DiskTier(folder, engine, quantized=quantized)
    assert save(tier, session)
    again = DiskTier(folder, engine, quantized=quantized)
    assert again.find(session.ids) == len(session.ids)
    assert again.find(session.ids[:-1]) == 0
    cache = again.load([*session.ids, 3, 4])
    assert cache is not None
    assert cache.length == len(session.ids)
    assert relative_rms(next_logits(engine, cache), next_logits(engine, session.live.cache)) <= 2e-6
    assert again.load([5, 6]) is None


def test_a_longer_state_stores_only_what_it_adds(engine, folder):
    session, tier = talked(engine), DiskTier(folder, engine)
    save(tier, session)
    before = len(session.ids)
    session.send("more")
    assert save(tier, session)
    stored = [mx.load(str(path))["ids"].size for path in states(folder)]  # pyright: ignore
    assert sorted(stored) == sorted([before, len(session.ids) - before])
    cache = DiskTier(folder, engine).load(session.ids)
    assert cache is not None
    assert cache.length == len(session.ids)
    assert relative_rms(next_logits(engine, cache), next_logits(engine, session.live.cache)) <= 2e-6


def test_what_is_saved_twice_is_written_once(engine, folder):
    session, tier = talked(engine), DiskTier(folder, engine)
    save(tier, session)
    written = only_state(folder).stat().st_mtime_ns
    assert save(DiskTier(folder, engine), session, owner="2")
    assert only_state(folder).stat().st_mtime_ns == written
    assert claimed(folder, "1") == claimed(folder, "2") == [only_state(folder).stem]


def test_a_state_goes_with_the_last_conversation_that_it_serves(engine, folder):
    session, tier = talked(engine), DiskTier(folder, engine)
    save(tier, session, "1")
    save(tier, session, "2")
    save(tier, talked(engine, question="something else"), "2")
    release(folder, "1")
    assert len(states(folder)) == 2
    assert tier.find(session.ids) == len(session.ids)
    release(folder, "2")
    assert list(folder.iterdir()) == []
    assert tier.find(session.ids) == 0


def test_every_flipped_byte_is_refused(engine, folder):
    session = talked(engine)
    save(DiskTier(folder, engine), session)
    path = only_state(folder)
    written = path.read_bytes()
    for place in range(0, len(written), max(1, len(written) // 60)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 0x41]) + written[place + 1 :])
        try:
            assert DiskTier(folder, engine).load(session.ids) is None  # not known by its header any more
        except StoreError as refusal:
            assert "\n" not in str(refusal)
            assert not path.exists()
    path.write_bytes(written[:-1])
    assert DiskTier(folder, engine).load(session.ids) is None


def test_a_flipped_number_is_refused_and_the_file_deleted(engine, folder):
    session = talked(engine)
    save(DiskTier(folder, engine), session)
    path = only_state(folder)
    written = path.read_bytes()
    path.write_bytes(written[:-9] + bytes([written[-9] ^ 1]) + written[-8:])
    tier = DiskTier(folder, engine)
    with pytest.raises(StoreError, match="checksum"):
        tier.load(session.ids)
    assert not path.exists()
    assert tier.load(session.ids) is None


def test_a_state_of_another_model_is_not_seen(engine, folder, tmp_path):
    session = talked(engine)
    save(DiskTier(folder, engine), session)
    write_checkpoint(tmp_path / "model", head_dim=64, seed=5)
    assert DiskTier(folder, Engine.load(tmp_path / "model")).find(session.ids) == 0


def test_a_state_of_the_other_form_is_not_seen(engine, folder):
    session = talked(engine, quantized=True)
    save(DiskTier(folder, engine, quantized=True), session)
    assert DiskTier(folder, engine).find(session.ids) == 0


def test_the_oldest_go_first_when_the_budget_is_spent(engine, folder):
    tier = DiskTier(folder, engine)
    sessions = [talked(engine, question=f"{name} " * 20) for name in ("a", "b", "c")]
    save(tier, sessions[0])
    os.utime(only_state(folder), (1, 1))
    tier.budget_nbytes = int(2.5 * only_state(folder).stat().st_size)
    for session in sessions[1:]:
        assert save(tier, session)
    assert [tier.find(session.ids) > 0 for session in sessions] == [False, True, True]
    tier.budget_nbytes = 10
    assert not save(tier, talked(engine, question="another"))


def test_no_state_goes_before_those_that_follow_it(engine, folder):
    tier, session = DiskTier(folder, engine), talked(engine)
    save(tier, session)
    first = only_state(folder)
    session.send("more")
    save(tier, session)
    os.utime(first, (1, 1))
    tier.budget_nbytes = 1 + sum(path.stat().st_size for path in states(folder))
    assert save(tier, talked(engine, question="hi"), "2")
    assert first.exists()
    assert len(states(folder)) == 2


@pytest.mark.slow
def test_what_nobody_asked_for_is_written_within_the_budget_of_the_day(engine, folder, monkeypatch):
    tier, session = DiskTier(folder, engine), talked(engine)
    assert tier.save(session.live.cache, session.ids, "1", unasked=True)
    written = only_state(folder).stat().st_size
    other = talked(engine, question="something else")
    tier.daily_nbytes = written + 100
    assert not tier.save(other.live.cache, other.ids, "1", unasked=True)
    assert tier.save(other.live.cache, other.ids, "1")
    monkeypatch.setattr(disk_tier, "_today", lambda: 99_999_999)
    third = talked(engine, question="the next day")
    assert DiskTier(folder, engine, daily_nbytes=written + 9000).save(
        third.live.cache, third.ids, "1", unasked=True
    )


@pytest.mark.slow
def test_states_of_both_forms_stand_side_by_side(tmp_path):
    """A name for the ids alone would let one replace the other, and orphan what follows it."""
    write_checkpoint(tmp_path / "model", head_dim=64)
    engine, folder = Engine.load(tmp_path / "model"), tmp_path / "states"
    sessions = [talked(engine), talked(engine, quantized=True)]
    tiers = [DiskTier(folder, engine, quantized=form) for form in (False, True)]
    for tier, session in zip(tiers, sessions, strict=True):
        assert save(tier, session)
    sessions[0].send("more")
    assert save(tiers[0], sessions[0])
    assert save(tiers[1], talked(engine, quantized=True))
    assert tiers[0].find(sessions[0].ids) == len(sessions[0].ids)
    assert DiskTier(folder, engine).load(sessions[0].ids) is not None


def test_no_state_of_another_model_goes_before_those_that_follow_it(engine, folder, tmp_path):
    session, tier = talked(engine), DiskTier(folder, engine)
    save(tier, session)
    os.utime(only_state(folder), (1, 1))
    session.send("more")
    save(tier, session)
    write_checkpoint(tmp_path / "model", head_dim=64, seed=5)
    other = Engine.load(tmp_path / "model")
    held = sum(path.stat().st_size for path in states(folder))
    assert save(DiskTier(folder, other, held + 1000), talked(other, question="hi"), "2")
    left = DiskTier(folder, engine)
    assert left.find(session.ids) > 0
    assert sum(path.stat().st_size for path in states(folder)) <= held + 1000


def test_a_state_counts_with_those_before_it(engine, folder):
    session, tier = talked(engine), DiskTier(folder, engine)
    save(tier, session)
    tier.budget_nbytes = only_state(folder).stat().st_size + 1000
    session.send("more")
    assert not save(tier, session)
    assert sum(path.stat().st_size for path in states(folder)) <= tier.budget_nbytes


def test_files_of_other_processes_are_left_alone_while_they_may_be_at_work(engine, folder):
    session = talked(engine)
    folder.mkdir()
    fresh, stale = (folder / f".{name}.safetensors.999.safetensors" for name in ("b", "c"))
    for path in (fresh, stale):
        path.write_bytes(b"x" * 1000)
        os.utime(path, (1, 1) if path == stale else None)
    (folder / f"{'0' * 32}.safetensors").symlink_to("nowhere")  # as if deleted once it was listed
    tier = DiskTier(folder, engine)
    assert save(tier, session)
    assert fresh.exists() and not stale.exists()
    assert tier.load(session.ids) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "fingerprint", ["[[0, 1.0]]", "[[999999999, 1.0]]", "[]", "{", "[[0]]", '[["a", null]]']
)
def test_a_state_that_predicts_something_else_is_refused(engine, folder, fingerprint):
    """Also one whose checksums are right."""
    session = talked(engine)
    save(DiskTier(folder, engine), session)
    path = only_state(folder)
    marks = read_header(path).metadata | {"fingerprint": fingerprint}
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(list(tensors.values()))
    mx.save_safetensors(str(path), tensors, marks)
    with pytest.raises(StoreError, match="predicts something else"):
        DiskTier(folder, engine).load(session.ids)
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value"), [("length", "x"), ("before", "0" * 32), ("length", "10000")])
def test_a_header_that_lies_is_not_believed(engine, folder, field, value):
    session = talked(engine)
    save(DiskTier(folder, engine), session)
    path = only_state(folder)
    marks = read_header(path).metadata | {field: value}
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(list(tensors.values()))
    mx.save_safetensors(str(path), tensors, marks)
    assert DiskTier(folder, engine).load(session.ids) is None
