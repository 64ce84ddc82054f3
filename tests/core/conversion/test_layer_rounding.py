"""Conversions that round with compensation: better outputs, and the same bytes after a kill."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qchat.core.checkpoint.packed import Packed
from qchat.core.conversion import layer_rounding
from qchat.core.conversion.convert import Conversion, Progress, convert
from qchat.core.conversion.layer_inputs import ChosenInputs
from qchat.core.conversion.report import Report
from qchat.core.conversion.source import Source, to_dense
from qchat.core.conversion.verify import relative_error, stream_logits
from qchat.core.errors import UsageError
from qchat.core.machine.backend import mx
from qchat.core.ops import tiled
from qchat.core.ops.linear import ExpertsLinear, Weight
from qchat.core.quant.recipes import Options
from qchat.core.quant.rounding import quantize
from tests.checkpoints import write_checkpoint

THREE = Options("none", bits=3)
EXACT_EMBEDDING = """[[rule]]
match = "embed_tokens"
dense = true
[[rule]]
match = "*"
bits = 4
"""


class Killed(Exception):
    """Raised by a listener in the place of a kill."""


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_rounding, "WINDOW", 64)
    monkeypatch.setattr(layer_rounding, "MAX_WINDOWS", 6)


def run(
    folder: Path, name: str, options: Options = THREE, listener: Callable = lambda _: None, **more
) -> Report:
    chosen = {"rounding": "gptq", **more}
    return convert(Conversion(folder / "raw", folder / name, options, **chosen), listener)


def digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def logits(folder: Path, *names: str) -> list[mx.array]:
    """Logits of each folder over a window of the text that calibration reads."""
    sources = [Source.open(folder / name) for name in names]
    text = layer_rounding.CalibrationText.read(layer_rounding.CALIBRATION_TEXT, sources[0])
    return stream_logits(sources, text.windows[0], lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_the_outputs_are_closer_to_the_source_than_with_weighted_rounding(tmp_path: Path, moe: bool):
    write_checkpoint(tmp_path / "raw", moe=moe, mtp=False, hidden_size=128)
    (tmp_path / "own.toml").write_text(EXACT_EMBEDDING)
    report = run(tmp_path, "gptq", Options(str(tmp_path / "own.toml")))
    run(tmp_path, "weighted", Options(str(tmp_path / "own.toml")), rounding="weighted")
    wanted, ours, weighted = logits(tmp_path, "raw", "gptq", "weighted")
    assert relative_error(ours, wanted) < relative_error(weighted, wanted)
    assert report.rounding is not None
    packed = [name for name in Source.open(tmp_path / "gptq").packed if name.startswith("layers.")]
    assert report.rounding.compensated == len(packed)
    assert report.rounding.tokens == 6 * 64
    assert report.rounding.digest in (tmp_path / "gptq/README.md").read_text()
    assert not (tmp_path / "gptq/rounded").exists()


@pytest.mark.slow
def test_a_head_of_its_own_is_rounded_too(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", tied=False, mtp=False)
    run(tmp_path, "gptq")
    run(tmp_path, "weighted", rounding="weighted")
    heads = [Source.open(tmp_path / name).read("lm_head") for name in ("gptq", "weighted")]
    ours, weighted = (head.weight for head in heads if isinstance(head, Packed))
    assert not mx.array_equal(ours, weighted)


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_a_run_killed_anywhere_continues_and_gives_the_same_bytes(tmp_path: Path, moe: bool):
    write_checkpoint(tmp_path / "raw", moe=moe, tied=False, mtp=False)
    events: list[object] = []
    run(tmp_path, "straight", listener=events.append)
    rounding = [event for event in events if isinstance(event, Progress) and event.stage == "rounding"]
    assert rounding[-1].done > 0.8 * rounding[-1].total

    def kill_after(count: int) -> Callable:
        left = [count]

        def listener(event: object) -> None:
            left[0] -= isinstance(event, Progress) and event.stage == "rounding"
            if left[0] < 0:
                raise Killed

        return listener

    # a third of it is more than one layer, which is what a run may have to do again
    kills, again = 0, None
    while again is None:
        assert kills < 20
        try:
            again = run(tmp_path, "new", listener=kill_after(len(rounding) // 3 + kills % 3))
        except Killed:
            kills += 1
            assert not (tmp_path / "new").exists()
            assert (tmp_path / ".new.partial/rounded").is_dir()
    assert kills > 2
    assert digest(tmp_path / "new") == digest(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "raw", "straight"]


@pytest.mark.slow
def test_another_text_does_not_continue_what_was_begun(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", mtp=False)
    (tmp_path / "a.txt").write_text("One, two, three. " * 40)
    (tmp_path / "b.txt").write_text("Six times nine is fifty-four. " * 40)
    made = [run(tmp_path, name, calibration=tmp_path / f"{name}.txt") for name in "ab"]
    shutil.copytree(tmp_path / "b", tmp_path / "straight")

    def stop(event: object) -> None:
        if isinstance(event, Progress) and event.module.startswith("layers.2"):
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, "b", calibration=tmp_path / "a.txt", listener=stop, force=True)
    run(tmp_path, "b", calibration=tmp_path / "b.txt", force=True)
    assert digest(tmp_path / "b") == digest(tmp_path / "straight") != digest(tmp_path / "a")
    assert made[0].rounding is not None
    assert made[0].rounding.text == "a.txt"


@pytest.mark.slow
def test_experts_that_the_text_does_not_reach_are_rounded_as_weighted_and_counted(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=True, num_experts=32, mtp=False)
    (tmp_path / "short.txt").write_text("a" * 64)
    report = run(tmp_path, "new", calibration=tmp_path / "short.txt")
    assert report.rounding is not None
    assert report.rounding.unreached > 0
    assert "never reached" in (tmp_path / "new/README.md").read_text()


def test_experts_of_a_large_layer_are_cast_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []

    class Watched(ExpertsLinear):
        def __init__(self, weight: Weight):
            super().__init__(weight)
            sizes.extend([len(weight)] if isinstance(weight, mx.array) else [])

    write_checkpoint(tmp_path / "raw", moe=True, num_experts=8, hidden_size=64)
    monkeypatch.setattr(layer_rounding, "DENSE_NBYTES", 0)
    monkeypatch.setattr(tiled, "TILE_NBYTES", 1)
    monkeypatch.setattr(tiled, "ExpertsLinear", Watched)
    run(tmp_path, "new")
    assert set(sizes) == {1}


def test_an_expert_without_rows_has_the_mean_squares_of_all_rows():
    rows, choices = mx.random.normal((20, 64)), mx.zeros((20, 1), mx.int32)
    inputs = ChosenInputs(lambda x, _choices: x, 2)
    inputs(rows, choices)
    assert inputs.unreached() == 1
    factor = inputs.factor(0, 2)
    assert mx.allclose(factor.diagonal[1], mx.square(rows).mean(axis=0), rtol=1e-4)
    assert mx.allclose(factor.diagonal[0], mx.square(rows).sum(axis=0), rtol=1e-4)


@pytest.mark.slow
def test_a_recipe_file_chooses_the_rounding_and_the_command_line_overrules_it(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", mtp=False)
    recipe = tmp_path / "own.toml"
    recipe.write_text('rounding = "gptq"\n[[rule]]\nmatch = "*"\nbits = 3\n')
    options = Options(str(recipe))
    chosen = run(tmp_path, "recipe", options, rounding=None).rounding
    overruled = run(tmp_path, "flag", options, rounding="nearest").rounding
    assert chosen is not None and overruled is not None
    assert (chosen.method, overruled.method) == ("gptq", "nearest")
    run(tmp_path, "plain", rounding=None)
    assert digest(tmp_path / "flag") == digest(tmp_path / "plain")


def test_searched_scales_are_written_for_float_codes(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", mtp=False)
    run(tmp_path, "new", Options("none", bits=4, mode="mxfp4"), rounding="weighted")
    source, result = Source.open(tmp_path / "raw"), Source.open(tmp_path / "new")
    name = "layers.0.mlp.down_proj"
    wanted = quantize(to_dense(source.read(name), mx.bfloat16), result.packed[name], method="weighted")
    found = result.read(name)
    assert isinstance(found, Packed)
    assert all(mx.array_equal(a, b) for a, b in zip(found.arrays, wanted.arrays, strict=True))


def test_a_text_without_effect_or_too_short_is_refused(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", mtp=False)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UsageError, match=r"short\.txt has \d+ tokens, and calibration needs at least 64"):
        run(tmp_path, "new", calibration=tmp_path / "short.txt")
    with pytest.raises(UsageError, match="--calibration would change nothing without --rounding gptq"):
        run(tmp_path, "new", rounding="weighted", calibration=tmp_path / "short.txt")
    recipe = tmp_path / "own.toml"
    recipe.write_text('rounding = "best"\n[[rule]]\nmatch = "*"\nbits = 3\n')
    with pytest.raises(UsageError, match=r"has the rounding .*best.*, wanted nearest, weighted, gptq"):
        run(tmp_path, "new", replace(THREE, recipe=str(recipe)), rounding=None)
    assert not (tmp_path / "new").exists()
