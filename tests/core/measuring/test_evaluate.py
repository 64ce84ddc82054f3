"""Figures against float64 and the models' own logits, and a cache that must not change them."""

import hashlib
import json
import math
import os
import re
import shutil
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.conversion.layer_rounding import CALIBRATION_TEXT
from qchat.core.engine.engine import Engine
from qchat.core.errors import DoesNotFit, GenerationError, QchatError, TokenizerError, UsageError
from qchat.core.machine.backend import mx
from qchat.core.measuring import evaluate, hidden_cache
from qchat.core.measuring.evaluate import KINDS, evaluate_model, evaluate_models, packaged_texts
from qchat.core.measuring.hidden_cache import HiddenCache
from qchat.core.measuring.scores import Predictions, percentile
from tests.checkpoints import load_tensors, quantize_checkpoint, save_shards, write_checkpoint
from tests.compare import TEXT, needs_qtiny
from tests.paths import QTINY

CORE = Path(evaluate.__file__).parent
PASSAGE = "A quantized model says almost what the model that it was made from would have said. " * 2


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "raw"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def packed(raw: Path) -> Path:
    quantize_checkpoint(raw, raw.parent / "packed", (4, 32, "affine"))
    return raw.parent / "packed"


@pytest.fixture
def passage(tmp_path: Path) -> Path:
    path = tmp_path / "passage.txt"
    path.write_text(PASSAGE)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of this test's cache, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qchat" / "eval"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl(logits: np.ndarray, others: np.ndarray) -> np.ndarray:
    log_p, log_q = log_softmax(logits), log_softmax(others)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


# --- the arithmetic ---


@pytest.mark.parametrize("width", [8192, 8191, 248_320])
def test_losses_and_divergences_are_those_of_float64_over_a_real_vocabulary(width: int):
    draw = np.random.default_rng(width)
    logits = draw.normal(0, 4, (3, width)).astype(np.float32)
    for noise in (0.001, 0.1, 3.0):
        others = logits + draw.normal(0, noise, logits.shape).astype(np.float32)
        p, q = Predictions(mx.array(logits)), Predictions(mx.array(others))
        np.testing.assert_allclose(np.array(p.divergence(q)), kl(logits, others), rtol=1e-5, atol=1e-6)
        targets = draw.integers(0, width, 3)
        wanted = -log_softmax(others)[np.arange(3), targets]
        np.testing.assert_allclose(np.array(q.losses(mx.array(targets))), wanted, rtol=1e-6, atol=1e-5)


LOGITS = arrays.arrays(np.float32, (2, 3, 7), elements=st.floats(-60, 60, width=32))


@settings(deadline=None, max_examples=60)
@given(LOGITS)
def test_a_divergence_is_never_negative_and_nothing_from_oneself(pair: np.ndarray):
    p, q = (Predictions(mx.array(logits)) for logits in pair)
    found = np.array(p.divergence(q))
    assert (found >= 0).all()
    np.testing.assert_allclose(found, kl(pair[0], pair[1]), rtol=1e-4, atol=2e-5)
    assert np.array(p.divergence(p)).max() == 0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_a_percentile_is_the_one_of_numpy(values: list[float], share: float):
    found = percentile(array("d", values), share)
    assert math.isclose(found, float(np.quantile(values, share)), rel_tol=1e-9, abs_tol=1e-6)


# --- whole evaluations ---


@pytest.mark.slow
def test_the_figures_are_those_of_the_models_own_logits(raw: Path, packed: Path, passage: Path):
    context = 50
    found = evaluate_model(packed, raw, data=passage, context=context).overall
    engines = Engine.load(raw), Engine.load(packed)
    ids = engines[0].tokenizer.encode(PASSAGE)
    rows, targets = ([], []), []
    for begin in range(0, len(ids), context):
        window = ids[begin : begin + context]
        targets += window[1:]
        for engine, into in zip(engines, rows, strict=True):
            into.append(np.array(engine.logits(window))[:-1])
    wanted, given_ = (np.concatenate(parts) for parts in rows)
    divergences = kl(wanted, given_)
    place = np.arange(len(targets)), np.array(targets)
    assert found.tokens == len(targets)
    assert found.kl_mean == pytest.approx(divergences.mean(), rel=1e-3)
    assert found.kl_p99 == pytest.approx(np.quantile(divergences, 0.99), rel=1e-3)
    assert found.top1_agreement == pytest.approx((wanted.argmax(-1) == given_.argmax(-1)).mean(), abs=0.01)
    assert found.perplexity == pytest.approx(math.exp(-log_softmax(given_)[place].mean()), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(math.exp(-log_softmax(wanted)[place].mean()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_a_model_compared_with_itself_differs_in_nothing(
    raw: Path, passage: Path, monkeypatch: pytest.MonkeyPatch, activations: str
):
    monkeypatch.setenv("QCHAT_ACTIVATIONS", activations)
    for _ in range(2):  # the second time from the cache
        overall = evaluate_model(raw, raw, data=passage, context=64).overall
        assert (overall.kl_mean, overall.kl_p99, overall.top1_agreement) == (0, 0, 1)
        assert overall.perplexity == overall.reference_perplexity


@pytest.mark.slow
def test_few_rows_at_a_time_give_the_same_figures(
    raw: Path, packed: Path, passage: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = evaluate_model(packed, raw, data=passage, context=64)
    monkeypatch.setattr(evaluate, "LOGITS_NBYTES", 4 * 288 * 7)
    monkeypatch.setattr(evaluate, "CHUNK", 20)
    parts = evaluate_model(packed, raw, data=passage, context=64)
    assert parts.overall.kl_mean == pytest.approx(whole.overall.kl_mean, rel=1e-3)
    assert parts.overall.perplexity == pytest.approx(whole.overall.perplexity, rel=1e-5)


def test_without_a_reference_there_is_a_perplexity_and_no_cache(raw: Path, passage: Path, cache: Path):
    evaluation = evaluate_model(raw, data=passage, context=64)
    assert evaluation.overall.perplexity > 1
    assert evaluation.overall.kl_mean is None
    assert not cache.exists()


@pytest.mark.slow
@needs_qtiny
def test_more_bits_are_closer_to_the_trained_model(tmp_path: Path):
    divergences = []
    (tmp_path / "part.txt").write_text(TEXT.read_text()[:500])
    for bits in (8, 4, 2):
        quantize_checkpoint(QTINY, tmp_path / f"q{bits}", (bits, 64, "affine"))
        shutil.copy(QTINY / "tokenizer.json", tmp_path / f"q{bits}")
        overall = evaluate_model(tmp_path / f"q{bits}", QTINY, data=tmp_path / "part.txt").overall
        divergences.append(overall.kl_mean)
    assert 0 < divergences[0] < divergences[1] / 10 < divergences[2] / 100


@pytest.mark.slow
def test_every_kind_of_text_has_its_own_row(raw: Path, packed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate, "packaged_texts", lambda: {"one": PASSAGE, "two": PASSAGE[:100]})
    evaluation = evaluate_model(packed, raw, context=128)
    assert [score.kind for score in evaluation.scores] == ["one", "two"]
    assert evaluation.overall.tokens == sum(score.tokens for score in evaluation.scores)
    assert json.loads(json.dumps(evaluation.as_json()))["overall"]["kl_mean"] == evaluation.overall.kl_mean


@pytest.mark.slow
def test_progress_ends_at_the_number_of_tokens(raw: Path, packed: Path, passage: Path):
    seen: list[tuple[str, int, int]] = []
    evaluate_model(packed, raw, data=passage, context=64, report=lambda *step: seen.append(step))
    for doing in dict.fromkeys(step[0] for step in seen):
        steps = [step for step in seen if step[0] == doing]
        assert [step[1] for step in steps] == sorted(step[1] for step in steps)
        assert steps[-1][1] == steps[-1][2]
    assert len({step[0] for step in seen}) == 2


# --- the cache ---


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the folders whose whole models are loaded."""
    seen: list[str] = []
    load = evaluate.load_model

    def spy(folder: Path, config: ModelConfig) -> evaluate.Model:
        seen.append(folder.name)
        return load(folder, config)

    monkeypatch.setattr(evaluate, "load_model", spy)
    return seen


@pytest.mark.slow
def test_a_reference_reads_each_text_once(raw: Path, packed: Path, passage: Path, loads: list[str]):
    first = evaluate_model(packed, raw, data=passage, context=64)
    assert evaluate_model(packed, raw, data=passage, context=64) == first
    assert loads == ["raw", "packed", "packed"]
    evaluate_model(packed, raw, data=passage, context=100)
    assert loads[3:] == ["raw", "packed"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def reshape(path: Path) -> None:
    mx.save_safetensors(str(path), {"hidden": mx.zeros((2, 2))}, {"crc32": "0"})


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, flip, empty, reshape, Path.unlink])
def test_a_damaged_file_of_the_cache_is_made_again(
    raw: Path, packed: Path, passage: Path, cache: Path, damage
):
    first = evaluate_model(packed, raw, data=passage, context=64)
    whole = [path.read_bytes() for path in files(cache)]
    damage(files(cache)[1])
    assert evaluate_model(packed, raw, data=passage, context=64) == first
    assert [path.read_bytes() for path in files(cache)] == whole


@pytest.mark.slow
def test_another_checkpoint_in_the_same_folder_is_read_afresh(
    tmp_path: Path, passage: Path, loads: list[str]
):
    model = tmp_path / "model"
    write_checkpoint(model, seed=1)
    evaluate_model(model, model, data=passage)
    write_checkpoint(model, seed=2)
    assert evaluate_model(model, model, data=passage).overall.kl_mean == 0
    assert len(loads) == 4


def test_the_least_recently_used_cache_is_deleted_first(raw: Path, cache: Path):
    config = ModelConfig.load(raw)
    kept = HiddenCache.open(raw, config)
    kept.write([1, 2], mx.ones((2, config.hidden_size)))
    for age, name in enumerate(("newer", "older"), start=1):
        HiddenCache(cache / name, 2).folder.mkdir()
        (cache / name / "x").write_bytes(bytes(1000))
        stamp = kept.folder.stat().st_mtime - age
        os.utime(cache / name, (stamp, stamp))
    size = sum(path.stat().st_size for path in kept.folder.iterdir())
    kept.delete_oldest(limit_nbytes=size + 1500)
    assert {path.name for path in cache.iterdir()} == {"newer", kept.folder.name}
    kept.delete_oldest(limit_nbytes=0)
    assert [path.name for path in cache.iterdir()] == [kept.folder.name]


def test_deletion_ignores_what_another_process_deletes_meanwhile(raw: Path, cache: Path):
    kept = HiddenCache.open(raw, ModelConfig.load(raw))
    for folder in (cache, kept.folder):
        (folder / "gone").symlink_to("nowhere")  # as if it were deleted once it was listed
    kept.delete_oldest(limit_nbytes=0)
    assert kept.folder.exists()


def test_a_disk_without_room_is_refused_before_anything_is_read(
    raw: Path, packed: Path, passage: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
):
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(hidden_cache.shutil, "disk_usage", lambda _: full)
    with pytest.raises(DoesNotFit, match="choose a shorter text"):
        evaluate_model(packed, raw, data=passage)
    assert loads == []


def test_a_cache_folder_that_cannot_be_made_is_named(raw: Path, passage: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.raises(QchatError, match=r"cache/qchat/eval/\w+ cannot be made"):
        evaluate_model(raw, raw, data=passage)


# --- what is refused ---


def test_a_text_that_is_too_short_is_refused(raw: Path, tmp_path: Path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(UsageError, match="the text short has 10 tokens: an evaluation needs at least 16"):
        evaluate_model(raw, data=tmp_path / "short.txt")


@pytest.mark.parametrize("context", [-1, 0, 7, 4097])
def test_a_context_that_the_models_do_not_have_is_refused(raw: Path, passage: Path, context: int):
    with pytest.raises(UsageError, match=f"--context is {context}, wanted 8 to 4,096 tokens"):
        evaluate_model(raw, data=passage, context=context)


def test_a_file_that_is_no_text_is_refused(raw: Path, tmp_path: Path):
    (tmp_path / "data.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        evaluate_model(raw, data=tmp_path / "data.txt")
    with pytest.raises(UsageError, match="cannot read"):
        evaluate_model(raw, data=tmp_path / "missing.txt")


def test_models_with_different_tokens_are_refused(raw: Path, tmp_path: Path, passage: Path):
    other = tmp_path / "other"
    write_checkpoint(other)
    path = other / "tokenizer.json"
    text = path.read_text()
    assert '"A"' in text and '"B"' in text
    path.write_text(text.replace('"A"', '"?A"').replace('"B"', '"A"').replace('"?A"', '"B"'))
    with pytest.raises(TokenizerError, match=r"cannot be compared: token \d+ is '[AB]' in one"):
        evaluate_model(raw, other, data=passage)


def test_models_with_vocabularies_of_different_sizes_are_refused(raw: Path, tmp_path: Path, passage: Path):
    write_checkpoint(tmp_path / "wide", vocab_size=320)
    with pytest.raises(TokenizerError, match="their vocabularies have 288 and 320 entries"):
        evaluate_model(raw, tmp_path / "wide", data=passage)


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(tmp_path: Path, passage: Path):
    write_checkpoint(tmp_path / "narrow", vocab_size=64)
    with pytest.raises(TokenizerError, match="the model's vocabulary has 64"):
        evaluate_model(tmp_path / "narrow", data=passage)


@pytest.mark.parametrize("broken", ["model", "reference"])
def test_a_model_whose_logits_are_not_finite_is_refused(
    raw: Path, tmp_path: Path, passage: Path, broken: str
):
    folder = tmp_path / "broken"
    write_checkpoint(folder)
    tensors = load_tensors(folder)
    mx.eval(tensors)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name] * float("nan")
    save_shards(folder, tensors)
    pair = (folder, raw) if broken == "model" else (raw, folder)
    with pytest.raises(GenerationError, match="logits that are not finite numbers"):
        evaluate_model(*pair, data=passage)


# --- the packaged texts ---


def test_the_package_has_forty_to_sixty_kilobytes_of_every_kind_of_text():
    texts = packaged_texts()
    assert tuple(texts) == KINDS
    sizes = [len(text.encode()) for text in texts.values()]
    assert 40_000 < sum(sizes) < 60_000
    assert min(sizes) > 4_000
    assert {path.stem for path in evaluate.TEXTS_FOLDER.iterdir()} == set(KINDS)


def sentences(text: str) -> set[str]:
    """Return the lines of `text` without the special tokens around messages."""
    return {re.sub(r"<\|\w+\|>", "", line).strip() for line in text.splitlines()}


def test_no_line_of_the_evaluation_is_in_another_text_of_the_package():
    """Evaluating a model on its calibration text would make it look better than it is."""
    others = [path for path in CORE.rglob("*.txt") if path.parent != evaluate.TEXTS_FOLDER]
    known = {line for path in others for line in sentences(path.read_text(encoding="utf-8"))}
    for kind, text in packaged_texts().items():
        assert not {line for line in sentences(text) if len(line) > 30} & known, kind


def test_no_run_of_words_of_the_evaluation_is_in_the_calibration_text():
    known = set(runs(CALIBRATION_TEXT.read_text(encoding="utf-8")))
    for kind, text in packaged_texts().items():
        assert known.isdisjoint(runs(text)), kind


def runs(text: str, length: int = 8) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[place:] for place in range(length)), strict=False))


def report_of(digest: str, field: str) -> dict:
    return {"allocation" if field == "text" else "rounding": {field: digest}}


@pytest.mark.parametrize("field", ["text", "digest"])
def test_a_text_that_a_model_was_calibrated_on_is_refused(
    field: str, packed: Path, passage: Path, tmp_path: Path
):
    model = shutil.copytree(packed, tmp_path / "model")
    report = report_of(hashlib.sha256(PASSAGE.encode()).hexdigest(), field)
    (model / "conversion.json").write_text(json.dumps(report))
    with pytest.raises(UsageError, match="passage is the text that model was calibrated on"):
        evaluate_model(model, data=passage)


def test_a_text_that_repeats_parts_of_the_packaged_calibration_is_refused(packed: Path, tmp_path: Path):
    calibration = CALIBRATION_TEXT.read_text(encoding="utf-8")
    text = tmp_path / "mine.txt"
    text.write_text(f"{PASSAGE}\n{calibration[2000:2100]}\n{PASSAGE}")
    model = shutil.copytree(packed, tmp_path / "model")
    assert evaluate_model(model, data=text).overall.tokens > 0  # nothing says that it saw the text
    report = report_of(hashlib.sha256(calibration.encode()).hexdigest(), "digest")
    (model / "conversion.json").write_text(json.dumps(report))
    with pytest.raises(UsageError, match="mine repeats parts of the text that model was calibrated on"):
        evaluate_model(model, data=text)
    text.write_text(PASSAGE)
    assert evaluate_model(model, data=text).overall.tokens > 0


@pytest.mark.parametrize("report", ["", "[]", '{"rounding": 3, "allocation": {"text": 4}}'])
def test_a_report_that_names_no_text_refuses_none(report: str, packed: Path, passage: Path, tmp_path: Path):
    model = shutil.copytree(packed, tmp_path / "model")
    (model / "conversion.json").write_text(report)
    assert evaluate_model(model, data=passage).overall.tokens > 0


# --- several models ---


@pytest.fixture(scope="module")
def coarse(raw: Path) -> Path:
    quantize_checkpoint(raw, raw.parent / "coarse", (2, 32, "affine"))
    return raw.parent / "coarse"


@pytest.mark.slow
def test_each_of_several_models_has_its_row_and_the_others_are_behind_the_closest(
    raw: Path, packed: Path, coarse: Path, passage: Path
):
    found = evaluate_models([coarse, packed], raw, data=passage, context=64)
    assert found.rows == tuple(evaluate_model(one, raw, data=passage, context=64) for one in (coarse, packed))
    behind, closest = found.behind
    assert closest is None and behind is not None
    gap = (found.rows[0].overall.kl_mean or 0) - (found.rows[1].overall.kl_mean or 0)
    assert 0 < behind[0] < gap < behind[1]
    assert found.rows[0].nbytes < found.rows[1].nbytes


def test_without_a_reference_none_is_behind(raw: Path, packed: Path, passage: Path):
    assert evaluate_models([raw, packed], data=passage, context=64).behind == (None, None)


def test_flipped_tokens_are_those_where_the_models_own_logits_differ(raw: Path, coarse: Path, passage: Path):
    found = evaluate_model(coarse, raw, data=passage, context=4096, flips=20)
    engines = Engine.load(raw), Engine.load(coarse)
    ids = engines[0].tokenizer.encode(PASSAGE)
    theirs, ours = (np.array(engine.logits(ids))[:-1] for engine in engines)
    divergences = kl(theirs, ours)
    pairs = zip(theirs.argmax(-1), ours.argmax(-1), strict=True)
    flipped = {place for place, (one, other) in enumerate(pairs) if one != other}
    worst = sorted(flipped, key=lambda place: -divergences[place])[:20]
    decode = engines[0].tokenizer.decode
    assert [(flip.reference, flip.model) for flip in found.flips] == [
        (decode([int(theirs[place].argmax())]), decode([int(ours[place].argmax())])) for place in worst
    ]
    np.testing.assert_allclose([flip.kl for flip in found.flips], divergences[worst], rtol=1e-3)
    assert all(PASSAGE.count(flip.before) for flip in found.flips)
    share = 1 - len(flipped) / len(divergences)
    assert found.overall.top1_agreement == pytest.approx(share)


@pytest.mark.parametrize("flips", [-1, 21])
def test_a_number_of_flips_out_of_range_is_refused(raw: Path, passage: Path, flips: int):
    with pytest.raises(UsageError, match=f"--flips is {flips}, wanted 0 to 20"):
        evaluate_model(raw, raw, data=passage, flips=flips)
