"""A state written to disk and read back is the state, and nothing else is ever taken for it."""

import os
import time
from pathlib import Path

import pytest

from qchat.core import Session
from qchat.core.checkpoint.header import read_header
from qchat.core.conversation.saved_states import SavedStates
from qchat.core.engine.engine import Engine
from qchat.core.errors import StoreError
from qchat.core.machine.backend import mx
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, head_dim=64)
    return Engine.load(folder)


def talked(engine: Engine, *, quantized: bool = False) -> Session:
    session = Session(engine, max_new_tokens=5, seed=1, quantized_kv=quantized)
    session.send("hello " * 20)
    return session


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("quantized", [False, True])
def test_a_saved_state_goes_on_as_the_live_one(engine, tmp_path, quantized):
    session, states = talked(engine, quantized=quantized), SavedStates(tmp_path, engine)
    assert states.save("a", session.live.cache, session.ids)
    found = states.load("a", quantized=quantized)
    assert found is not None
    cache, ids = found
    assert ids == session.ids
    for state in (cache, session.live.cache):
        engine.model.hidden([7, 8], state)
    logits = [
        engine.model.logits(state.hidden)[-1]
        for state in (cache, session.live.cache)
        if state.hidden is not None
    ]
    assert relative_rms(logits[0], logits[1]) <= 2e-6
    assert states.load("b") is None


def test_every_flipped_byte_is_refused(engine, tmp_path):
    session, states = talked(engine), SavedStates(tmp_path, engine)
    states.save("a", session.live.cache, session.ids)
    path = only_file(tmp_path)
    written = path.read_bytes()
    for place in range(0, len(written), max(1, len(written) // 60)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 0x41]) + written[place + 1 :])
        with pytest.raises(StoreError) as refusal:
            states.load("a")
        assert "\n" not in str(refusal.value)
    path.write_bytes(written[:-1])
    with pytest.raises(StoreError, match="damaged"):
        states.load("a")


def test_a_state_of_another_model_is_refused(engine, tmp_path):
    session = talked(engine)
    SavedStates(tmp_path / "states", engine).save("a", session.live.cache, session.ids)
    write_checkpoint(tmp_path / "model", head_dim=64, seed=5)
    with pytest.raises(StoreError, match="another model"):
        SavedStates(tmp_path / "states", Engine.load(tmp_path / "model")).load("a")


def test_the_oldest_go_first_when_the_budget_is_spent(engine, tmp_path):
    session, states = talked(engine), SavedStates(tmp_path, engine)
    states.save("a", session.live.cache, session.ids)
    states.budget_nbytes = int(2.5 * only_file(tmp_path).stat().st_size)
    for name in ("b", "c"):
        time.sleep(0.02)
        states.save(name, session.live.cache, session.ids)
    assert states.load("a") is None
    assert states.load("b") is not None
    states.budget_nbytes = 10
    assert not states.save("d", session.live.cache, session.ids)


def test_files_of_other_processes_are_left_alone_while_they_may_be_at_work(engine, tmp_path):
    session = talked(engine)
    fresh, stale = (tmp_path / f".{name}.safetensors.999.safetensors" for name in ("b", "c"))
    for path in (fresh, stale):
        path.write_bytes(b"x" * 1000)
        os.utime(path, (1, 1) if path == stale else None)
    (tmp_path / "gone.safetensors").symlink_to("nowhere")  # as if it were deleted once it was listed
    states = SavedStates(tmp_path, engine)
    assert states.save("a", session.live.cache, session.ids)
    states.budget_nbytes = (tmp_path / "a.safetensors").stat().st_size + 100
    assert states.save("a", session.live.cache, session.ids)
    assert fresh.exists() and not stale.exists()
    assert states.load("a") is not None


def test_a_state_of_the_other_form_is_refused(engine, tmp_path):
    session, states = talked(engine, quantized=True), SavedStates(tmp_path, engine)
    states.save("a", session.live.cache, session.ids)
    with pytest.raises(StoreError, match="is 8-bit, wanted dense"):
        states.load("a")


@pytest.mark.parametrize(
    "fingerprint", ["[[0, 1.0]]", "[[999999999, 1.0]]", "[]", "{", "[[0]]", '[["a", null]]']
)
def test_a_state_that_predicts_something_else_is_refused(engine, tmp_path, fingerprint):
    """Also one whose checksums are right."""
    session, states = talked(engine), SavedStates(tmp_path, engine)
    states.save("a", session.live.cache, session.ids)
    path = only_file(tmp_path)
    marks = read_header(path).metadata | {"fingerprint": fingerprint}
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(list(tensors.values()))
    mx.save_safetensors(str(path), tensors, marks)
    with pytest.raises(StoreError, match="predicts something else"):
        states.load("a")
