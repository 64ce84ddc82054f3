"""Pictures in prompts: ids, positions, and the network that reads them."""

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.vision import VisionConfig
from qchat.core.engine.engine import Engine
from qchat.core.errors import ConfigError, DoesNotFit, UsageError, WeightsError
from qchat.core.machine.backend import mx
from qchat.core.model.memory_plan import plan_folder
from qchat.core.prompt_cache.live_state import LiveState
from qchat.core.vision import images as module
from qchat.core.vision.memory import tower_nbytes, transient_nbytes, with_pictures
from qchat.core.vision.picture import Picture
from qchat.core.vision.pixels import Grid
from qchat.core.vision.placement import IMAGE_IDS, PlacedPicture, image_ids, is_image
from tests.checkpoints import load_tensors, save_shards, write_checkpoint
from tests.compare import relative_rms
from tests.golden.make_towers import CASES, EVERY, FILE, PICTURES, mixed_ids
from tests.vision_checkpoints import PAD, png, write_seeing

# float32 on both sides; an untrained model amplifies rounding
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_seeing(folder, {"deepstack_visual_indexes": []}, hv_ratio=3)
    return Engine.load(folder)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(FILE))


@pytest.mark.parametrize("case", CASES)
def test_tower_positions_and_logits_are_those_of_transformers(
    case: str, golden: dict[str, np.ndarray], tmp_path: Path
):
    write_seeing(tmp_path, **CASES[case])
    engine = Engine.load(tmp_path)
    placed = [engine.images.place(Picture(png(*size, seed))) for seed, size in enumerate(PICTURES)]
    for number, one in enumerate(placed):
        rows = engine.images._look(one)
        assert relative_rms(rows.embeddings, golden[f"{case} rows {number}"]) <= TOLERANCE
    ids = mixed_ids([one.ids for one in placed])
    prompt = engine.images.mixed_prompt(ids)
    assert prompt is not None
    tokens = prompt.chunk(0, len(ids))
    assert tokens is not None
    assert np.array_equal(np.array(tokens.positions), golden[f"{case} positions"])
    assert tokens.shift == golden[f"{case} delta"]
    assert relative_rms(engine.logits(ids)[::EVERY], golden[f"{case} logits"]) <= TOLERANCE


def test_a_converted_tower_sees_the_same(tmp_path: Path):
    """Its patches are stored channels last, under another prefix."""
    write_seeing(tmp_path / "raw")
    write_seeing(tmp_path / "converted")
    tensors = load_tensors(tmp_path / "converted")
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("model.visual."):
            tensor = tensor.transpose(0, 2, 3, 4, 1) if tensor.ndim == 5 else tensor
            name = name.replace("model.visual.", "vision_tower.")
        renamed[name] = tensor
    mx.eval(renamed)
    save_shards(tmp_path / "converted", renamed)
    rows = []
    for folder in ("raw", "converted"):
        images = Engine.load(tmp_path / folder).images
        rows.append(images._look(images.place(Picture(png(60, 40)))).embeddings)
    assert mx.array_equal(*rows)


@pytest.mark.slow
def test_a_prompt_read_in_any_chunks_leaves_the_same_state(engine: Engine):
    first, second = (engine.images.place(Picture(png(60, 40 + seed, seed))) for seed in (0, 1))
    ids = [1, 2, *first.ids, 3, 4, 5, *second.ids, *range(6, 26)]
    cold = engine.logits(ids)[-1]
    for ends in ([len(ids)], [1, 7, 20, 31, 70, len(ids)], [*range(1, len(ids), 3), len(ids)]):
        live = LiveState(engine)
        for end in ends:
            list(live.read(ids[:end], lambda: False))
        assert relative_rms(live.logits(), cold) <= TOLERANCE
        assert live.cache.length == len(ids)


def test_text_after_a_picture_is_read_step_by_step_with_shifted_positions(engine: Engine):
    placed = engine.images.place(Picture(png(60, 40)))
    ids = [1, 2, *placed.ids, *range(3, 15)]
    live = LiveState(engine)
    list(live.read(ids[: len(placed.ids) + 3], lambda: False))
    assert live.cache.shift == max(placed.grid) - placed.grid.tokens
    for id in ids[len(placed.ids) + 3 :]:
        engine.model.hidden([id], live.cache)
    assert relative_rms(live.logits(), engine.logits(ids)[-1]) <= TOLERANCE


def test_deepstack_rows_are_added_after_the_first_layers(tmp_path: Path):
    write_seeing(tmp_path / "deep", {"deepstack_visual_indexes": [0, 1]})
    write_seeing(tmp_path / "plain")
    deep, plain = (Engine.load(tmp_path / name) for name in ("deep", "plain"))
    placed = deep.images.place(Picture(png(60, 40)))
    rows = deep.images._look(placed)
    assert [layer.shape for layer in rows.deepstack] == [rows.embeddings.shape] * 2
    other = plain.images.place(placed.picture)
    ids = [1, *placed.ids, 2]
    assert other.ids == placed.ids
    assert relative_rms(deep.logits(ids), plain.logits(ids)) > 1e-2


# --- identity ---


def test_ids_stand_for_content_grid_and_normalisation():
    draws = [
        image_ids("a", Grid(4, 5), b"x"),
        image_ids("b", Grid(4, 5), b"x"),
        image_ids("a", Grid(5, 4), b"x"),
        image_ids("a", Grid(4, 5), b"y"),
    ]
    assert image_ids("a", Grid(4, 5), b"x") == draws[0]
    assert all(is_image(id) and id >= IMAGE_IDS for draw in draws for id in draw)
    assert len({tuple(draw[:4]) for draw in draws}) == 4


def test_equal_pictures_are_one_and_another_budget_is_another(engine: Engine):
    one, same, fewer = (engine.images.place(Picture(png(100, 80)), tokens) for tokens in (None, None, 12))
    assert one is same
    assert fewer.grid.tokens <= 12 < one.grid.tokens
    assert fewer.ids[:4] != one.ids[:4]


def test_a_picture_that_nobody_holds_is_missed_in_a_sentence(engine: Engine):
    ids = list(engine.images.place(Picture(png(30, 30, seed=99))).ids)
    gc.collect()
    with pytest.raises(UsageError, match="a picture of this conversation is missing"):
        engine.images.mixed_prompt([1, *ids, 2])


def test_a_picture_cut_by_the_end_is_still_known(engine: Engine):
    placed = engine.images.place(Picture(png(60, 40)))
    for count in (1, 3, 4, 9):
        prompt = engine.images.mixed_prompt([1, *placed.ids[:count]])
        assert prompt is not None
        tokens = prompt.chunk(0, count + 1)
        assert tokens is not None
        assert tokens.ids.tolist() == [1] + [PAD] * count


# --- refusals ---


def test_a_model_without_a_tower_sees_nothing(tmp_path: Path):
    write_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="this model sees no pictures"):
        Engine.load(tmp_path).images.place(Picture(png(30, 30)))


def test_a_model_of_several_ranks_sees_nothing(engine: Engine):
    images = module.Images(engine.folder, engine.config, engine.model.policy, shared=True)
    with pytest.raises(UsageError, match="pictures do not work with several ranks"):
        images.place(Picture(png(30, 30)))


@pytest.mark.parametrize("change", ["missing", "misshapen", "nan"])
def test_a_damaged_tower_is_named_with_the_first_picture_and_not_before(tmp_path: Path, change: str):
    write_seeing(tmp_path)
    tensors = load_tensors(tmp_path)
    name = "model.visual.blocks.1.attn.qkv.bias"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = mx.zeros(7) if change == "misshapen" else mx.full(tensors[name].shape, float("nan"))
    mx.eval(tensors)
    save_shards(tmp_path, tensors)
    engine = Engine.load(tmp_path)
    engine.logits([1, 2, 3])
    placed = engine.images.place(Picture(png(60, 40)))
    words = {"missing": "lacks blocks.1.attn.qkv.bias", "misshapen": "has the shape", "nan": "not finite"}
    with pytest.raises(WeightsError, match=words[change]):
        engine.logits([1, *placed.ids, 2])


def test_a_tower_of_another_model_is_refused(tmp_path: Path):
    write_seeing(tmp_path, {"out_hidden_size": 128})
    engine = Engine.load(tmp_path)
    placed = engine.images.place(Picture(png(60, 40)))
    with pytest.raises(ConfigError, match="out_hidden_size is 128, wanted the model's hidden_size, 64"):
        engine.logits([*placed.ids, 1])


def test_too_little_memory_is_told_with_numbers(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "device_free_nbytes", lambda: 100_000)
    with pytest.raises(DoesNotFit, match=r"photo.png has \d+ tokens, for which .* GB are needed and 0.0 GB"):
        engine.images.place(Picture(png(60, 40, seed=5), "photo.png"))


def test_a_chat_without_pictures_never_reads_the_tower(engine: Engine, tmp_path: Path):
    write_seeing(tmp_path)
    fresh = Engine.load(tmp_path)
    fresh.logits([1, 2, 3])
    assert "_tower" not in vars(fresh.images)
    assert isinstance(engine.images.place(Picture(png(9, 9))), PlacedPicture)


def test_the_plan_tells_what_the_first_picture_takes(tmp_path: Path):
    write_seeing(tmp_path / "seeing")
    write_checkpoint(tmp_path / "blind")
    blind, seeing = (plan_folder(tmp_path / name) for name in ("blind", "seeing"))
    assert with_pictures(blind, tmp_path / "blind") == blind
    whole = with_pictures(seeing, tmp_path / "seeing")
    small = with_pictures(seeing, tmp_path / "seeing", 4)
    assert (whole.picture_tokens, small.picture_tokens) == (60, 4)
    sizes = VisionConfig.of(ModelConfig.load(tmp_path / "seeing"))
    assert sizes is not None
    assert whole.picture_nbytes == tower_nbytes(sizes) + transient_nbytes(sizes, 60, 2)
    assert tower_nbytes(sizes) < small.picture_nbytes < whole.picture_nbytes
    tight = replace(seeing, free_nbytes=seeing.total_nbytes - seeing.snapshot_nbytes + small.picture_nbytes)
    assert with_pictures(tight, tmp_path / "seeing", 4).picture_tokens == 4
    with pytest.raises(
        DoesNotFit, match=r"a picture of 60 tokens needs [\d.]+ GB and .* with --image-tokens"
    ):
        with_pictures(tight, tmp_path / "seeing", 60)
    with pytest.raises(UsageError, match="this model sees no pictures"):
        with_pictures(blind, tmp_path / "blind", 60)
    with pytest.raises(UsageError, match="a picture can have 4 to 65,536 tokens, and 1 were asked for"):
        with_pictures(seeing, tmp_path / "seeing", 1)
