"""Measured sensitivities: right, resumed after a kill, shared between sizes, refused where misplaced."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qchat.core.allocation import measure
from qchat.core.allocation.allocate import Budget, allocate
from qchat.core.allocation.measure import measure_sensitivity
from qchat.core.allocation.places import default_place
from qchat.core.allocation.sensitivity import Sensitivity, read_sensitivity
from qchat.core.checkpoint.packed import Geometry
from qchat.core.conversion.source import Source
from qchat.core.engine.engine import Engine
from qchat.core.errors import UsageError
from qchat.core.machine.backend import mx
from qchat.core.quant.recipes import Options
from qchat.core.quant.rounding import quantize
from tests.checkpoints import load_tensors, save_shards, write_checkpoint
from tests.killed_process import kill_at, start

TEXT = "<|im_start|>user\nHow deep is the well?<|im_end|>\n" * 3
BEST = Options(recipe="best")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def make(folder: Path, **shape) -> Path:
    write_checkpoint(folder, dtype=mx.float32, **shape)
    return folder


def measured(folder: Path, text: Path, output: Path | None = None) -> Sensitivity:
    output = output or folder.with_name(f"{folder.name}.json")
    return measure_sensitivity(Source.open(folder), output, text=text)


def divergence(exact: mx.array, other: mx.array) -> float:
    p, q = (np.array(x, np.float64) for x in (exact, other))
    p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def rounded_copy(folder: Path, stored: str, code: Geometry) -> Path:
    """Return a copy of the model in which one stored tensor is rounded."""
    copy = folder.with_name("copy")
    copy.mkdir()
    tensors = load_tensors(folder)
    (name,) = [name for name in tensors if name.endswith(stored) and not name.startswith("mtp.")]
    tensors[name] = quantize(tensors[name], code).dequantize(mx.float32)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    save_shards(copy, tensors)
    return copy


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        ("layers.1.linear_attn.out_proj.weight", {}),
        pytest.param("layers.3.self_attn.v_proj.weight", {}, marks=pytest.mark.slow),
        pytest.param("layers.0.mlp.up_proj.weight", {}, marks=pytest.mark.slow),
        pytest.param("embed_tokens.weight", {}, marks=pytest.mark.slow),
        pytest.param("lm_head.weight", {"tied": False}, marks=pytest.mark.slow),
        pytest.param("layers.2.mlp.experts.down_proj", {"moe": True}, marks=pytest.mark.slow),
        pytest.param(
            "layers.3.mlp.shared_expert.gate_proj.weight",
            {"moe": True, "tied": False},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_figure_is_the_divergence_of_the_model_with_that_matrix_rounded(
    stored: str, shape: dict, tmp_path: Path, text: Path
):
    folder, code = make(tmp_path / "model", **shape), Geometry(3, 64, "affine")
    found = measured(folder, text)
    name = stored.removesuffix(".weight").replace("mlp.experts", "mlp.switch_mlp")
    (group,) = [group for group in found.groups if group.tensors == (name,)]
    exact, other = (Engine.load(path) for path in (folder, rounded_copy(folder, stored, code)))
    ids = exact.tokenizer.encode(TEXT)
    assert found.tokens == len(ids)
    assert group.kl[code] == pytest.approx(divergence(exact.logits(ids), other.logits(ids)), rel=2e-3)


def test_matrices_of_a_class_are_rounded_together_in_blocks_of_layers(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    coarse = measure.Detail(1, 256, 2, ((3, 64),))
    monkeypatch.setattr(measure, "choose_detail", lambda _: coarse)
    folder = make(tmp_path / "model")
    found = measured(folder, text)
    pair = ("layers.0.mlp.up_proj", "layers.1.mlp.up_proj")
    (group,) = [group for group in found.groups if group.tensors == pair]
    code = Geometry(3, 64, "affine")
    tensors = load_tensors(folder)
    for name in tensors:
        if name.endswith(tuple(f"{one}.weight" for one in pair)) and not name.startswith("mtp."):
            tensors[name] = quantize(tensors[name], code).dequantize(mx.float32)
    exact = Engine.load(folder)
    ids = exact.tokenizer.encode(TEXT)
    logits = exact.logits(ids)
    mx.eval(logits)
    save_shards(folder, tensors)
    assert group.kl[code] == pytest.approx(divergence(logits, Engine.load(folder).logits(ids)), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, {"moe": True, "tied": False}])
def test_every_matrix_is_in_one_group_but_those_that_every_recipe_pins(
    shape: dict, tmp_path: Path, text: Path
):
    folder = make(tmp_path / "model", **shape)
    found = measured(folder, text)
    names = [name for group in found.groups for name in group.tensors]
    pinned = ("mlp.gate", "mlp.shared_expert_gate", "in_proj_a", "in_proj_b")
    specs = Source.open(folder).specs.items()
    body = [n for n, spec in specs if spec.kind == "matrix" and not n.startswith("mtp.")]
    assert sorted(names) == sorted(name for name in body if not name.endswith(pinned))
    assert read_sensitivity(tmp_path / "model.json") == found


SCRIPT = """
import sys
from pathlib import Path
from qchat.core.allocation.measure import measure_sensitivity
from qchat.core.conversion.source import Source

source, text, output = map(Path, sys.argv[1:])
measure_sensitivity(Source.open(source), output, text=text, report=lambda *step: print(*step, flush=True))
"""


@pytest.mark.slow
def test_a_measurement_killed_at_random_moments_gives_the_same_file(tmp_path: Path, text: Path):
    folder, output, straight = make(tmp_path / "model"), tmp_path / "killed.json", tmp_path / "straight.json"
    lines = len(start(SCRIPT, folder, text, straight).communicate()[0].splitlines())
    choose = random.Random(0)
    for _ in range(4):
        kill_at(start(SCRIPT, folder, text, output), choose.randrange(lines // 2))
        assert not output.exists()
    resumed = start(SCRIPT, folder, text, output).communicate()[0].splitlines()
    assert len(resumed) < lines
    assert output.read_bytes() == straight.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "killed.json",
        "model",
        "straight.json",
        "text.txt",
    ]


@pytest.mark.slow
def test_damaged_states_of_an_earlier_run_are_computed_again(tmp_path: Path, text: Path):
    folder = make(tmp_path / "model")
    expected = measured(folder, text)

    def stop(done: int, total: int, _: str) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(Source.open(folder), tmp_path / "again.json", text=text, report=stop)
    states = list(tmp_path.glob(".again.json.partial/*/*.safetensors"))
    assert states
    for path in states:
        path.write_bytes(path.read_bytes()[:100])
    assert measured(folder, text, tmp_path / "again.json") == expected


@pytest.mark.slow
def test_a_file_serves_every_budget_without_measuring(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make(tmp_path / "model")
    first = allocate(folder, BEST, Budget(nbytes=300_000), text=text)
    assert default_place(folder) == tmp_path / "model-sensitivity.json"
    monkeypatch.setattr(measure, "_Run", None)
    second = allocate(folder, BEST, Budget(bits_per_weight=4.5))
    assert first.summary is not None and second.summary is not None
    assert first.summary.digest == second.summary.digest


def damage_figure(fields: dict) -> None:
    fields["groups"][0]["kl"]["3/64"] *= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_figure, "is damaged"),
        (lambda fields: fields.pop("groups"), "is damaged"),
        (lambda fields: fields.update(kind="other"), "is not a file of sensitivities"),
        (lambda fields: fields.update(format=99), "this version of qchat cannot read"),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(
    damage: Callable[[dict], object], sentence: str, tmp_path: Path, text: Path
):
    folder = make(tmp_path / "model")
    measured(folder, text)
    path = tmp_path / "model.json"
    fields = json.loads(path.read_text())
    damage(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=sentence):
        allocate(folder, BEST, Budget(nbytes=300_000), sensitivity=path)
    path.write_text("{")
    with pytest.raises(UsageError, match="is not valid JSON"):
        allocate(folder, BEST, Budget(nbytes=300_000), sensitivity=path)


@pytest.mark.slow
def test_a_file_of_another_model_or_text_is_refused_in_a_sentence(tmp_path: Path, text: Path):
    folder, other = make(tmp_path / "model"), make(tmp_path / "other", seed=1)
    measured(folder, text)
    path = tmp_path / "model.json"
    with pytest.raises(UsageError, match="of another model than"):
        allocate(other, BEST, Budget(nbytes=300_000), sensitivity=path)
    another = tmp_path / "another.txt"
    another.write_text(TEXT + "x")
    with pytest.raises(UsageError, match="on another text than"):
        allocate(folder, BEST, Budget(nbytes=300_000), sensitivity=path, text=another)
    allocate(folder, BEST, Budget(nbytes=300_000), sensitivity=path, text=text)


@pytest.mark.slow
def test_the_same_weights_in_other_files_are_the_same_model(tmp_path: Path, text: Path):
    folder, copy = make(tmp_path / "model"), make(tmp_path / "copy", shards=3)
    measured(folder, text)
    allocate(copy, BEST, Budget(nbytes=300_000), sensitivity=tmp_path / "model.json")


def test_a_short_text_and_a_foreign_folder_in_the_way_are_refused(tmp_path: Path, text: Path):
    folder = make(tmp_path / "model")
    short = tmp_path / "short.txt"
    short.write_text("Hello.")
    with pytest.raises(UsageError, match="measuring needs at least 64"):
        measured(folder, short)
    (tmp_path / ".model.json.partial").mkdir()
    (tmp_path / ".model.json.partial/mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is in the way of the measurement"):
        measured(folder, text)
    assert (tmp_path / ".model.json.partial/mine.txt").read_text() == "mine"
