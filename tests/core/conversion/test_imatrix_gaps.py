"""An imatrix that lacks matrices, or experts that its text never reached: said, and on the card."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.conversion.awq import ScalingMode, search_scales
from qchat.core.conversion.convert import Conversion, convert
from qchat.core.conversion.source import Source
from qchat.core.errors import UsageError
from qchat.core.events import Notice
from qchat.core.machine.backend import mx
from qchat.core.quant.imatrix import Statistics, read_imatrix, write_imatrix
from qchat.core.quant.recipe_file import RoundingMethod
from qchat.core.quant.recipes import Options, Recipe
from tests.checkpoints import write_checkpoint

SAYS = "has no importances for"


def write(folder: Path, path: Path, keeps: Callable[[str], bool], unreached: int = 0) -> None:
    statistics: dict[str, Statistics] = {}
    for name, spec in Source.open(folder).specs.items():
        if spec.kind == "matrix" and not name.startswith("mtp.") and keeps(name):
            *stack, _, columns = spec.shape
            counts = mx.ones(stack or (1,))
            counts[:unreached] = 0 if stack else 1
            statistics[name] = Statistics(mx.abs(mx.random.normal((*stack, columns))), counts)
    config = ModelConfig.load(folder)
    write_imatrix(path, statistics, config, datasets=["x"], chunk_count=1, chunk_size=1)


def notices(folder: Path, imatrix: Path) -> list[str]:
    said: list[str] = []
    conversion = Conversion(
        folder, folder.parent / "new", Options("none", bits=4), imatrix=imatrix, awq="off"
    )
    convert(conversion, lambda event: said.append(event.text) if isinstance(event, Notice) else None)
    return said


@pytest.mark.parametrize("layers", [1, 3])
def test_missing_layers_are_said(tmp_path: Path, layers: int):
    write_checkpoint(tmp_path / "raw", mtp=False)
    known = tuple(f"layers.{i}." for i in range(layers))
    write(tmp_path / "raw", tmp_path / "i.gguf", lambda name: name.startswith(known))
    said = [text for text in notices(tmp_path / "raw", tmp_path / "i.gguf") if SAYS in text]
    assert len(said) == 1 and "i.gguf" in said[0]
    assert SAYS in (tmp_path / "new/README.md").read_text()


def test_a_whole_imatrix_is_no_reason_for_a_notice(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", mtp=False)
    write(tmp_path / "raw", tmp_path / "i.gguf", lambda _: True)
    assert not [text for text in notices(tmp_path / "raw", tmp_path / "i.gguf") if "imatrix" in text]


def test_experts_that_were_never_reached_are_said(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=True, mtp=False)
    write(tmp_path / "raw", tmp_path / "i.gguf", lambda _: True, unreached=1)
    said = [text for text in notices(tmp_path / "raw", tmp_path / "i.gguf") if "never reached" in text]
    assert len(said) == 1


def test_a_matrix_takes_the_importances_of_another_reader_of_its_input(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=True, mtp=False)
    lacking = ("in_proj_z", "in_proj_a", "k_proj", "mlp.shared_expert_gate", "switch_mlp.up_proj")
    write(tmp_path / "raw", tmp_path / "i.gguf", lambda name: not name.endswith(lacking))
    imatrix = read_imatrix(tmp_path / "i.gguf", ModelConfig.load(tmp_path / "raw"))
    assert imatrix.missing == ()
    for name, lender in imatrix.borrowed.items():
        ours, theirs = imatrix.importance(name), imatrix.importance(lender)
        assert ours is not None and theirs is not None
        assert mx.array_equal(ours, theirs), name
    assert {name.rpartition(".")[2] for name in imatrix.borrowed} == {
        name.rpartition(".")[2] for name in lacking
    }
    recipe = Recipe.build(Options("none", bits=3), ModelConfig.load(tmp_path / "raw"))
    source = Source.open(tmp_path / "raw")
    folds = search_scales(source, source.config, recipe, imatrix, "fixed", letters="ACD")
    assert all(group.changed for group in folds.report)


def test_one_matrix_takes_the_importances_of_all_experts_together(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=True, mtp=False)
    experts = ("switch_mlp.gate_proj", "switch_mlp.up_proj")
    write(tmp_path / "raw", tmp_path / "i.gguf", lambda name: name.endswith(experts) or ".mlp." not in name)
    imatrix = read_imatrix(tmp_path / "i.gguf", ModelConfig.load(tmp_path / "raw"))
    whole, parts = (
        imatrix.statistics(f"layers.0.mlp.{name}") for name in ("shared_expert_gate", "switch_mlp.gate_proj")
    )
    assert whole is not None and parts is not None
    assert mx.allclose(whole.sums, parts.sums.sum(axis=0))
    assert float(whole.counts.sum()) == float(parts.counts.sum())


@pytest.mark.slow
def test_what_of_an_imatrix_is_used_is_on_the_card(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", mtp=False)
    write(tmp_path / "raw", tmp_path / "i.gguf", lambda name: not name.endswith(("up_proj", "embed_tokens")))
    options = Options("none", bits=4, mode="mxfp4")
    cases: tuple[tuple[RoundingMethod | None, str], ...] = (
        (None, "because MLX rounds float codes"),
        ("weighted", "as layers.0.mlp.gate_proj"),
    )
    for rounding, says in cases:
        target = tmp_path / str(rounding)
        conversion = Conversion(
            tmp_path / "raw", target, options, imatrix=tmp_path / "i.gguf", rounding=rounding
        )
        convert(conversion, lambda _: None)
        card = (target / "README.md").read_text()
        assert says in card
        assert "not in the file: embed_tokens" in card
        assert "qchat calibrate" in card
        weighted = "as the published variants: affine groups by their importances" in card
        assert weighted == (rounding is None)


@pytest.mark.slow
def test_scaling_float_codes_never_raises_their_measured_error(tmp_path: Path):
    """Rows that a group's scales divide count, too: their float codes have coarse scales."""
    write_checkpoint(tmp_path / "raw", moe=True, mtp=False, hidden_size=128)
    write(tmp_path / "raw", tmp_path / "i.gguf", lambda _: True)
    source = Source.open(tmp_path / "raw")
    imatrix = read_imatrix(tmp_path / "i.gguf", source.config)
    for options in (Options("none", bits=4, mode="mxfp4"), Options("none", bits=4, mode="nvfp4")):
        recipe = Recipe.build(options, source.config)
        for mode in get_args(ScalingMode)[1:]:
            try:
                report = search_scales(source, source.config, recipe, imatrix, mode).report
            except UsageError as error:
                assert "no scaling reduced its error" in str(error)
                continue
            assert all(0 < group.after < group.before for group in report if group.changed)
            assert all(group.after == group.before for group in report if not group.changed)
