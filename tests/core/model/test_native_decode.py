"""The decode step in C against MLX's operations on tiny random models, and what it does to caches."""

import re
from pathlib import Path
from typing import Any

import pytest

from qchat.core.engine.engine import Engine
from qchat.core.errors import UsageError
from qchat.core.machine.backend import mx
from qchat.core.model.cache import GROWTH, Cache, DeltaState
from qchat.core.model.network import Model
from qchat.core.native import library as native_library
from qchat.core.native.library import MAX_ROWS, Finder, Library
from tests.checkpoints import Triple, quantize_checkpoint, write_checkpoint
from tests.compare import relative_rms
from tests.golden.make_logits import YARN

# float32 rounding in another order; the weights are the same bits
TOLERANCE = 1e-5
SHAPES = {
    "dense": {},
    "untied": {"tied": False},
    "mixture": {"moe": True},
    "mixture, shares as they are": {"moe": True, "norm_topk_prob": False},
    "one value head a key head": {"hv_ratio": 1},
    "YaRN": {"rope_parameters": YARN},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e5}},
    "wide": {"hidden_size": 160, "intermediate_size": 352, "head_dim": 64, "linear_value_head_dim": 80},
}
TRIPLES: list[Triple] = [
    *((bits, 32, "affine") for bits in (2, 3, 4, 5, 6, 8)),
    (4, 64, "affine"),
    (4, 32, "mxfp4"),
    (8, 32, "mxfp8"),
    (4, 16, "nvfp4"),
]


@pytest.fixture(autouse=True)
def compiled(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is there from the start."""
    monkeypatch.setenv("QCHAT_NATIVE", "on")
    finder = Finder()
    finder._found = library
    monkeypatch.setattr("qchat.core.model.native_decode.finder", finder)


def load(folder: Path) -> Model:
    """A model that decodes by C."""
    model = Engine.load(folder).model
    model.hidden(range(MAX_ROWS + 1), model.new_cache())
    assert model.native is not None
    assert model.native.supports(1, model.new_cache())
    return model


def tiny(folder: Path, **shape: Any) -> Model:
    write_checkpoint(folder, **shape)
    return load(folder)


def ids(count: int, seed: int = 0) -> list[int]:
    return mx.random.randint(0, 256, (count,), key=mx.random.key(seed)).tolist()  # pyright: ignore


def read(model: Model, cache: Cache, *parts: list[int]) -> mx.array:
    """Logits after every id of the last part."""
    for part in parts[:-1]:
        model.hidden(part, cache)
    return model.logits(model.hidden(parts[-1], cache))


def read_by_mlx(model: Model, cache: Cache, *parts: list[int]) -> mx.array:
    native, model.native = model.native, None
    try:
        return read(model, cache, *parts)
    finally:
        model.native = native


def assert_same(model: Model, cache: Cache, other: Cache, *parts: list[int]) -> None:
    """Both caches have the same future: the first is read by C where it can, the second by MLX."""
    found = read(model, cache, *parts)
    assert relative_rms(found, read_by_mlx(model, other, *parts)) < TOLERANCE
    for mine, its in zip(cache.layers, other.layers, strict=True):
        for a, b in zip(_used(mine), _used(its), strict=True):
            assert relative_rms(a, b) < TOLERANCE


def _used(layer) -> list[mx.array]:
    return layer.buffer.read(layer.length) if hasattr(layer, "buffer") else layer.arrays()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_of_every_size_equal_those_of_mlx(shape: str, dtype: mx.Dtype, tmp_path: Path):
    model = tiny(tmp_path, dtype=dtype, **SHAPES[shape])
    parts = [ids(20), ids(1, 1), ids(1, 2), ids(3, 3), ids(MAX_ROWS, 4), ids(5, 5)]
    assert_same(model, model.new_cache(), model.new_cache(), *parts)


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("triple", TRIPLES, ids=str)
@pytest.mark.parametrize("dense", ["on", "off"])
def test_packed_weights_are_read_as_stored(
    dense: str, triple: Triple, moe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whether MLX keeps float32 copies of them or not."""
    monkeypatch.setenv("QCHAT_DENSE", dense)
    write_checkpoint(tmp_path / "source", moe=moe)
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed", triple)
    model = load(tmp_path / "packed")
    assert_same(model, model.new_cache(), model.new_cache(), ids(20), ids(1, 1), ids(4, 2))


@pytest.mark.slow
def test_a_cache_may_begin_with_a_step(tmp_path: Path):
    model = tiny(tmp_path)
    assert_same(model, model.new_cache(), model.new_cache(), ids(1), ids(2, 1))


@pytest.mark.slow
def test_prompts_and_steps_take_turns(tmp_path: Path):
    model = tiny(tmp_path)
    parts = [ids(12), ids(1, 1), ids(30, 2), ids(2, 3), ids(9, 4), ids(1, 5)]
    assert_same(model, model.new_cache(), model.new_cache(), *parts)


@pytest.mark.slow
def test_keys_and_values_grow_over_several_stretches(tmp_path: Path):
    model = tiny(tmp_path)
    parts = [ids(GROWTH - 3), *(ids(2, seed) for seed in range(4)), ids(2 * GROWTH, 9), ids(1, 10)]
    assert_same(model, model.new_cache(), model.new_cache(), *parts)


@pytest.mark.slow
def test_a_copy_is_not_changed_by_what_is_read_later(tmp_path: Path):
    """Neither one made after a prompt nor one made between steps; and both may go on."""
    model = tiny(tmp_path)
    cache, other = model.new_cache(), model.new_cache()
    assert_same(model, cache, other, ids(20))
    for seed in range(3):
        kept, expected = cache.copy(), other.copy()
        assert_same(model, cache, other, ids(1, seed), ids(1, seed + 10))
        assert_same(model, kept.copy(), expected.copy(), ids(1, seed + 20), ids(12, seed), ids(1, 3))
        assert_same(model, kept, expected, ids(1, seed), ids(1, seed + 10))


def test_states_are_written_in_place_until_they_are_copied(tmp_path: Path):
    model = tiny(tmp_path)
    cache = model.new_cache()
    read(model, cache, ids(12), ids(1))
    before = cache.layers[0].arrays()
    read(model, cache, ids(1))
    assert all(a is b for a, b in zip(before, cache.layers[0].arrays(), strict=True))
    cache.copy()
    read(model, cache, ids(1))
    assert not any(a is b for a, b in zip(before, cache.layers[0].arrays(), strict=True))


@pytest.mark.parametrize("kept", [1, 2, 4])
@pytest.mark.parametrize("value_dim", [32, 80])
def test_of_tokens_read_tentatively_some_count(kept: int, value_dim: int, tmp_path: Path):
    model = tiny(tmp_path, linear_value_head_dim=value_dim)
    cache, other = model.new_cache(), model.new_cache()
    assert_same(model, cache, other, ids(20), ids(1, 1))
    tried = ids(4, 2)
    found = model.logits(model.forward_speculative(mx.array(tried), cache))
    assert relative_rms(found, read_by_mlx(model, other.copy(), tried)) < TOLERANCE
    cache.commit(kept, len(tried))
    read_by_mlx(model, other, tried[:kept])
    assert_same(model, cache, other, ids(1, 3), ids(2, 4))


def test_what_counts_of_tentative_tokens_is_written_in_place_until_the_cache_is_copied(tmp_path: Path):
    """A verified step copies no state."""
    model = tiny(tmp_path)
    cache, other = model.new_cache(), model.new_cache()
    assert_same(model, cache, other, ids(20), ids(1, 1))

    def verify(seed: int) -> None:
        model.forward_speculative(mx.array(ids(4, seed)), cache)
        cache.commit(3, 4)
        read_by_mlx(model, other, ids(4, seed)[:3])

    state = cache.layers[0].arrays()[1]
    verify(2)
    assert cache.layers[0].arrays()[1] is state
    kept, expected = cache.copy(), other.copy()
    verify(3)
    assert cache.layers[0].arrays()[1] is not state
    assert_same(model, cache, other, ids(1, 4))
    assert_same(model, kept, expected, ids(1, 4))


def test_packed_caches_are_left_to_mlx(tmp_path: Path):
    model = tiny(tmp_path, head_dim=64)
    cache, other = model.new_cache(quantized=True), model.new_cache(quantized=True)
    assert_same(model, cache, other, ids(20), ids(1, 1))
    assert all(isinstance(layer, DeltaState) or layer.quantized for layer in cache.layers)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path):
    model = tiny(tmp_path)
    cache = model.new_cache()
    read(model, cache, ids(12))
    with pytest.raises(ValueError, match="below 288"):
        model.hidden([288], cache)


def test_heads_that_vectors_do_not_divide_are_left_to_mlx(tmp_path: Path):
    write_checkpoint(tmp_path, head_dim=24)
    assert Engine.load(tmp_path).model.native is None


def test_a_model_is_tried_once_and_trusted_later(tmp_path: Path, library: Library):
    """In later processes the first step is done by C, before anything was compared."""
    for mark in library.path.parent.glob("*.trusted"):
        mark.unlink()
    write_checkpoint(tmp_path, hidden_size=96)
    model = Engine.load(tmp_path).model
    assert model.native is not None
    assert not model.native.supports(1, model.new_cache())
    model.hidden(ids(MAX_ROWS + 1), model.new_cache())
    assert model.native.supports(1, model.new_cache())
    again = Engine.load(tmp_path).model
    assert again.native is not None
    assert again.native.supports(1, again.new_cache())


@pytest.mark.slow
@pytest.mark.parametrize("function", ["step", "gate", "softmax", "norm", "delta_rule"])
def test_a_library_that_is_wrong_is_left_alone(
    function: str, tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
):
    write_checkpoint(tmp_path, hidden_size=128)
    right = getattr(library, function)
    monkeypatch.setattr(library, function, lambda *words: right(*words) * 1.5)
    model = Engine.load(tmp_path).model
    found = read(model, model.new_cache(), ids(20), ids(1, 1))
    assert relative_rms(found, read_by_mlx(model, model.new_cache(), ids(20), ids(1, 1))) == 0
    assert model.native is not None
    assert not model.native.supports(1, model.new_cache())
    assert re.search(r"is off by [\d.]+ here", model.native.notice or "")
    assert not list(library.path.parent.glob(f"*{model.native._signature()}*"))


def test_off_leaves_everything_to_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QCHAT_NATIVE", "off")
    write_checkpoint(tmp_path)
    assert Engine.load(tmp_path).model.native is None
    monkeypatch.setenv("QCHAT_NATIVE", "maybe")
    with pytest.raises(UsageError, match="wanted auto, on, off"):
        native_library.wanted()
