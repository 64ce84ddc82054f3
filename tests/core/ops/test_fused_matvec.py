"""A whole model on the kernels of few rows, run on the CPU, against the plain forms in float32."""

from pathlib import Path
from typing import Any

import pytest

from qchat.core.engine.engine import Engine
from qchat.core.kernels import launch
from qchat.core.machine.backend import mx
from qchat.core.model.network import Model
from qchat.core.ops import choices, tuning
from qchat.core.ops.candidates import contests
from qchat.core.ops.race import run
from tests.checkpoints import write_checkpoint
from tests.compare import relative_rms
from tests.core.kernels import on_cpu
from tests.core.kernels.on_cpu import needs_a_compiler

IDS = [(7 * i * i + 3 * i) % 250 for i in range(19)]
# head dims that the kernels take
SIZES: dict[str, Any] = {
    "head_dim": 256,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "hv_ratio": 3,
}

pytestmark = needs_a_compiler


@pytest.fixture(autouse=True)
def try_forms_here(monkeypatch: pytest.MonkeyPatch):
    """Hold contests in this process, where kernels run on the CPU, with prompts of few tokens."""

    def begin(tuner: tuning.Tuner) -> None:
        run(contests(tuner.dimensions), tuner.record)

    monkeypatch.setattr(tuning.Tuner, "begin", begin)
    monkeypatch.setattr(choices, "LENGTHS", {"1 token": 1, "2 to 8 tokens": 2, "a prompt": 9})
    choices.forget()
    yield
    choices.forget()
    launch._distrusted.clear()


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCHAT_TUNE", "auto")


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, *, kernels: bool) -> tuple[Model, list[str]]:
    """The model, in bfloat16 on kernels or plain in float32; which kernels ran."""
    ran: list[str] = []

    def run(kernel: launch.Kernel, arrays, **given):
        ran.append(kernel.name)
        return on_cpu.run(kernel, arrays, **given)

    monkeypatch.setattr(launch.Kernel, "__call__", run)
    monkeypatch.setattr(launch, "_device", lambda: "cuda" if kernels else None)
    monkeypatch.setenv("QCHAT_KERNELS", "on")
    monkeypatch.setenv("QCHAT_GRAPHS", "off")
    monkeypatch.setenv("QCHAT_COMPILE", "off")  # the shim wants values, which a trace has not
    monkeypatch.setenv("QCHAT_DENSE", "off")
    monkeypatch.setenv("QCHAT_ACTIVATIONS", "bfloat16" if kernels else "float32")
    return Engine.load(folder).model, ran


def logits(model: Model, pieces: list[int]) -> mx.array:
    cache, found, begin = model.new_cache(), [], 0
    for length in pieces:
        found.append(model.logits(model.hidden(IDS[begin : begin + length], cache)))
        begin += length
    return mx.concatenate(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "after_mixer"),
    [
        ({}, 2),
        ({"moe": True}, 3),  # the shared expert is stacked behind the others, whose first product routes
        ({"moe": True, "shared_expert_intermediate_size": 128}, 6),
    ],
    ids=["dense", "moe", "moe with another shared expert"],
)
def test_a_model_on_kernels_of_few_rows_equals_the_plain_one(shape, after_mixer, tmp_path, monkeypatch):
    """Steps of one and of several positions, through states, caches and residuals."""
    write_checkpoint(tmp_path, **SIZES, **shape)
    plain = logits(load(tmp_path, monkeypatch, kernels=False)[0], [8])
    model, ran = load(tmp_path, monkeypatch, kernels=True)
    ran.clear()
    # bfloat16 activations alone are 2 to 5 % off in this model
    assert relative_rms(logits(model, [3, 1, 1, 3]), plain) <= 0.06
    assert {"delta_steps", "split_heads", "attend", "join_splits"} <= set(ran)
    assert ("route" in ran) == (after_mixer == 6)
    assert len(ran) == 4 * (3 * (3 + after_mixer) + 5 + after_mixer + 1)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 2, 4])
def test_of_tokens_read_tentatively_by_kernels_some_count(kept: int, tmp_path, monkeypatch):
    """The kernel emits the states after every token, so nothing is computed again."""
    write_checkpoint(tmp_path, **SIZES)
    model, ran = load(tmp_path, monkeypatch, kernels=True)
    cache, other = model.new_cache(), model.new_cache()
    for some in (cache, other):
        model.hidden(IDS[:3], some)
    ran.clear()
    found = model.logits(model.forward_speculative(mx.array(IDS[3:7]), cache))
    speculative = list(ran)
    cache.commit(kept, 4)
    ran.clear()
    expected = model.logits(model.hidden(IDS[3:7], other.copy()))
    assert speculative == ran
    assert relative_rms(found, expected) < 1e-6
    model.hidden(IDS[3 : 3 + kept], other)
    after = [model.logits(model.hidden(IDS[8:9], some)) for some in (cache, other)]
    # products of another number of rows are rounded to bfloat16 elsewhere
    assert relative_rms(*after) < 0.03
    cache.detach()
    assert all(len(layer.arrays()[0]) == 1 for layer in cache.layers)


@pytest.mark.slow
def test_a_model_on_its_plain_layers_runs_no_kernels_between_products(tmp_path, monkeypatch):
    """Calibration replaces parts of the plain layers, so nothing may bypass them."""
    write_checkpoint(tmp_path, **SIZES)
    plain = logits(load(tmp_path, monkeypatch, kernels=False)[0], [8])
    model, ran = load(tmp_path, monkeypatch, kernels=True)
    assert model.use_plain_layers() == model.layers
    ran.clear()
    assert relative_rms(logits(model, [3, 1, 1, 3]), plain) <= 0.06
    assert {name.partition("_")[0] for name in ran} == {"matvec"}


@pytest.mark.slow
def test_a_cache_that_takes_no_files_keeps_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/qchat").write_text("a file where the folder should be")
    write_checkpoint(tmp_path / "model", **SIZES)
    assert "attend" in load(tmp_path / "model", monkeypatch, kernels=True)[1]


@pytest.mark.slow
def test_a_prompt_on_kernels_equals_the_plain_one(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, **SIZES)
    plain = logits(load(tmp_path, monkeypatch, kernels=False)[0], [19])
    model, ran = load(tmp_path, monkeypatch, kernels=True)
    ran.clear()
    assert relative_rms(logits(model, [16, 3]), plain) <= 0.06
    assert ran[:3] == ["delta_mix", "delta_walk", "delta_norm"]


@pytest.mark.slow
def test_kernels_are_tried_once_and_the_verdict_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "model", **SIZES)
    model, ran = load(tmp_path / "model", monkeypatch, kernels=True)
    assert "attend" in ran
    assert not any("kernels" in notice for notice in model.policy.notices)
    assert "attend" not in load(tmp_path / "model", monkeypatch, kernels=True)[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raising", "wrong", "no numbers at the end"])
def test_kernels_that_fail_are_left_alone_with_a_notice(how, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, **SIZES)
    right = on_cpu.run

    def wrong(kernel: launch.Kernel, arrays, **given):
        if how == "raising":
            raise RuntimeError("[metal::Device] Unable to build\nmetal library")
        by = 1.1 if how == "wrong" else float("nan") if kernel.name == "attend" else 1
        return [array if array.dtype == mx.uint32 else array * by for array in right(kernel, arrays, **given)]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(on_cpu, "run", wrong)
    model, ran = load(tmp_path, monkeypatch, kernels=True)
    said = "Unable to build metal library" if how == "raising" else "GPU kernels are off by"
    assert any(said in notice for notice in model.policy.notices)
    ran.clear()
    logits(model, [8, 1])
    assert ran == []
