"""Folds that leave the model what it is, the search for them, and its report."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from qchat.core.checkpoint.weights import Weights
from qchat.core.conversion.awq import DEFAULT_GROUPS, GROUPS, groups, search_scales
from qchat.core.conversion.source import Source, to_dense
from qchat.core.errors import UsageError
from qchat.core.machine.backend import Policy, mx
from qchat.core.model.cache import KVCache
from qchat.core.model.network import Model
from qchat.core.quant.folds import Folds
from qchat.core.quant.imatrix import Imatrix, Statistics, read_imatrix, write_imatrix
from qchat.core.quant.recipes import Options, Recipe
from qchat.core.quant.rounding import quantize
from tests.checkpoints import quantize_checkpoint, write_checkpoint
from tests.compare import relative_rms

IDS = [5, 77, 130, 9, 201, 64, 3, 88, 250, 17]
THREE = Options(recipe="unsloth", bits=3)
FLOAT32 = Policy(mx.float32, dense=True)


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, its recipe, and an imatrix of it with a few large channels."""

    source: Source
    recipe: Recipe
    imatrix: Imatrix

    def search(self, *args, **options) -> Folds:
        return search_scales(self.source, self.source.config, self.recipe, self.imatrix, *args, **options)


def case(folder: Path, *, options: Options = THREE, known: str = "", **shape) -> Case:
    """`known` limits the imatrix to modules whose names contain it."""
    write_checkpoint(folder / "model", dtype=mx.float32, **shape)
    return opened(folder / "model", folder / "imatrix.gguf", options, known)


def opened(model: Path, file: Path, options: Options, known: str = "") -> Case:
    source = Source.open(model)
    draw = np.random.default_rng(3)
    statistics = {}
    for name, spec in source.specs.items():
        if spec.kind == "matrix" and known in name and name != "embed_tokens":
            *stack, _, columns = spec.shape
            values = draw.lognormal(0, 1.5, (*stack, columns)).astype(np.float32)
            statistics[name] = Statistics(mx.array(values), mx.ones(stack[0] if stack else 1))
    write_imatrix(file, statistics, source.config, datasets=["made up"], chunk_count=1, chunk_size=1)
    return Case(source, Recipe.build(options, source.config), read_imatrix(file, source.config))


def outputs(case: Case, folds: Folds) -> tuple[mx.array, mx.array]:
    """Logits of the model and of its MTP head with folded float32 weights, nothing rounded."""
    source = case.source
    tensors = {name: folds.apply(name, to_dense(source.read(name), mx.float32)) for name in source.specs}
    model = Model(source.config, Weights(tensors, (), True), FLOAT32)
    hidden = model.hidden(IDS, model.new_cache())
    assert model.mtp is not None
    ahead = model.mtp(model.embed(mx.array(IDS[1:])[None]), hidden[:, :-1], KVCache())
    return model.logits(hidden), model.logits(ahead)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [{}, {"hv_ratio": 1}, {"moe": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["fixed", "search"])
def test_folding_alone_does_not_change_what_the_model_says(tmp_path: Path, mode, shape: dict):
    made = case(tmp_path, **shape)
    folds = made.search(mode, letters=GROUPS)
    changed = {(group.letter, group.layer) for group in folds.report if group.changed}
    assert mode == "search" or {letter for letter, _ in changed} == set(GROUPS)
    assert mode == "search" or {letter for letter, layer in changed if "mtp" in layer} == set("ABCE")
    for folded, plain in zip(outputs(made, folds), outputs(made, Folds()), strict=True):
        assert relative_rms(folded, plain) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_a_reader_or_feeder_that_is_left_out_changes_the_model(tmp_path: Path, moe: bool):
    """So the test above would notice it: each of them in turn."""
    made = case(tmp_path, moe=moe)
    folds, plain = made.search("fixed", letters=GROUPS), outputs(made, Folds())
    last = [g for g in groups(made.source.config, mtp=True) if g.layer in ("layers.2", "layers.3")]
    for name in {name for group in last for name in group.readers}:
        fewer = replace(folds, columns=without(folds.columns, name))
        assert relative_rms(outputs(made, fewer)[0], plain[0]) > 1e-4, name
    for name in {group.feeder for group in last}:
        fewer = replace(folds, rows=without(folds.rows, name))
        assert relative_rms(outputs(made, fewer)[0], plain[0]) > 1e-4, name


def without(scales: Mapping[str, mx.array], name: str) -> dict[str, mx.array]:
    return {key: value for key, value in scales.items() if key != name}


def test_every_matrix_that_reads_a_norm_is_in_its_group(tmp_path: Path):
    source = case(tmp_path, moe=True).source
    width, found = source.config.hidden_size, set()
    for group in groups(source.config, mtp=True):
        found |= set(group.readers)
    layered = {
        name
        for name, spec in source.specs.items()
        if spec.kind == "matrix" and "layers." in name and spec.shape[-1] == width
    }
    assert layered <= found


@pytest.mark.slow
def test_the_error_that_is_reported_never_grows_in_a_search(tmp_path: Path):
    folds = case(tmp_path, moe=True).search(letters=GROUPS)
    assert all(0 < group.after < group.before for group in folds.report if group.changed)
    assert all(group.reason and group.after == group.before for group in folds.report if not group.changed)


@pytest.mark.slow
@pytest.mark.parametrize("letter", GROUPS)
def test_the_reported_errors_are_those_of_the_whole_matrices(tmp_path: Path, letter: str):
    made = case(tmp_path)
    folds = made.search(letters=letter)
    outcome = next(group for group in folds.report if group.changed)
    group = next(
        g for g in groups(made.source.config, mtp=True) if (g.letter, g.layer) == (letter, outcome.layer)
    )
    for sides, reported in ((Folds(made.imatrix), outcome.before), (folds, outcome.after)):
        assert sum(rounding(made, sides, name) for name in group.readers) == pytest.approx(reported, rel=1e-3)


def rounding(made: Case, folds: Folds, name: str) -> float:
    """Importance times squared error of one folded matrix, packed as a converter packs it."""
    # of B and E the feeders' own rows are scaled as well, but no matrix here is both
    weight = Folds(columns=folds.columns).apply(name, to_dense(made.source.read(name), mx.float32))
    geometry, importance = made.recipe.decide(name, weight.shape), folds.importance(name)
    assert geometry is not None
    assert importance is not None
    back = quantize(weight, geometry, importance).dequantize(mx.float32)
    return float((importance * mx.square(weight - back)).sum())


def test_importances_of_folded_columns_are_divided_by_the_square_of_the_scale(tmp_path: Path):
    made = case(tmp_path, moe=True)
    folds = made.search("fixed", letters="B")
    for name in ("layers.0.mlp.switch_mlp.down_proj", "layers.0.mlp.shared_expert.down_proj"):
        known, now = made.imatrix.importance(name), folds.importance(name)
        assert known is not None
        assert now is not None
        assert np.allclose(np.array(now) * np.square(np.array(folds.columns[name])), known, rtol=1e-5)
        # alpha 1 gives every channel the same importance
        assert np.allclose(np.array(now), np.array(now)[..., :1], rtol=1e-4)


def test_norms_divided_by_their_scales_are_bfloat16_numbers(tmp_path: Path):
    made = case(tmp_path)
    folds = made.search("fixed", letters="ACDF")
    for name in folds.rows:
        folded = folds.apply(name, to_dense(made.source.read(name), mx.float32))
        assert np.allclose(np.array(folded.astype(mx.bfloat16).astype(mx.float32)), folded, rtol=1e-6)


def test_groups_whose_matrices_stay_dense_are_skipped_and_say_so(tmp_path: Path):
    folds = case(tmp_path, options=replace(THREE, keep_bf16=True)).search(letters=GROUPS)
    skipped = [group for group in folds.report if group.letter in "EF" and "mtp" not in group.layer]
    assert skipped
    assert all("stay dense" in group.reason for group in skipped)
    assert all("skipped" in str(group) for group in skipped)


def test_groups_that_the_imatrix_does_not_know_are_skipped_and_say_so(tmp_path: Path):
    folds = case(tmp_path, known="layers.0.mlp").search("fixed", letters="AC")
    assert {group.layer for group in folds.report if group.changed} == {"layers.0"}
    assert all("does not know" in group.reason for group in folds.report if not group.changed)


def test_a_search_that_changes_nothing_is_an_error(tmp_path: Path):
    made = case(tmp_path, options=replace(THREE, keep_bf16=True, mtp="drop"))
    with pytest.raises(UsageError, match=r"changed nothing with .*imatrix\.gguf: its matrices stay dense"):
        made.search(letters="EF")


def test_scaling_without_an_imatrix_is_an_error(tmp_path: Path):
    made = case(tmp_path)
    with pytest.raises(UsageError, match="--awq fixed needs an imatrix"):
        search_scales(made.source, made.source.config, made.recipe, None, "fixed")


def test_off_folds_nothing_and_still_knows_the_importances(tmp_path: Path):
    made = case(tmp_path)
    folds = made.search("off")
    name = "layers.0.mlp.up_proj"
    weight = to_dense(made.source.read(name), mx.float32)
    known, now = made.imatrix.importance(name), folds.importance(name)
    assert folds.apply(name, weight) is weight
    assert known is not None
    assert now is not None
    assert mx.array_equal(now, known)
    assert folds.report == ()


def test_by_default_only_the_groups_that_help_are_looked_at(tmp_path: Path):
    assert {group.letter for group in case(tmp_path).search().report} == set(DEFAULT_GROUPS)


@pytest.mark.slow
def test_a_converted_source_is_searched_by_what_its_codes_mean(tmp_path: Path):
    write_checkpoint(tmp_path / "raw")
    quantize_checkpoint(tmp_path / "raw", tmp_path / "packed", (8, 64, "affine"))
    folds = opened(tmp_path / "packed", tmp_path / "imatrix.gguf", THREE).search(letters=GROUPS)
    assert {group.letter for group in folds.report if group.changed} >= set("BCD")


def test_a_head_that_is_dropped_is_left_alone(tmp_path: Path):
    folds = case(tmp_path, options=replace(THREE, mtp="drop")).search("fixed", letters=GROUPS)
    assert not any(group.layer.startswith("mtp") for group in folds.report)
