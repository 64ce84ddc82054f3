"""What a measurement holds: figures that fit each other, and none where there is nothing to measure."""

from pathlib import Path

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.errors import UsageError
from qchat.core.measuring import bench
from qchat.core.measuring.bench import Measured, Steps, measure, measure_random
from tests.checkpoints import tiny_config, write_checkpoint


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench, "PREFILLS", (16, 64, 8192))
    monkeypatch.setattr(bench, "SUSTAINED_TOKENS", 32)


def followed(steps: Steps) -> tuple[list[bench.Progress], Measured]:
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


def test_a_models_figures_fit_each_other(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench, "CAPITALS", ("What?", "And?"))
    monkeypatch.setattr(bench, "hold_conversation", hold_short_conversation)
    write_checkpoint(tmp_path)
    seen, row = followed(measure(tmp_path, runs=1))
    assert [step.done for step in seen] == list(range(len(seen)))
    assert row.prefills[8192] is None  # the model's context is shorter
    assert row.prefills[16] == row.prefill_tokens_per_s > 0
    assert len(row.speeds) == bench.SPEEDS
    assert min(row.speeds) <= row.decode_tokens_per_s <= max(row.speeds)
    figures = row.as_json()
    assert figures["bandwidth_share"] == pytest.approx(
        row.step_nbytes * row.decode_tokens_per_s / row.bandwidth
    )


def test_a_context_that_holds_no_prompt_of_the_measurement_has_no_speed_of_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PREFILLS", (8192,))
    monkeypatch.setattr(bench, "CAPITALS", ("What?", "And?"))
    monkeypatch.setattr(bench, "hold_conversation", hold_short_conversation)
    write_checkpoint(tmp_path)
    _, row = followed(measure(tmp_path, runs=1))
    assert (row.prefills, row.prefill_tokens_per_s) == ({8192: None}, 0.0)


def hold_short_conversation(engine):
    session = bench.Session(engine, enable_thinking=False, max_new_tokens=4)
    return [session.send(question) for question in bench.CAPITALS]


def test_a_random_model_is_measured_without_saying_anything():
    config = ModelConfig.parse(tiny_config(hidden_size=128, intermediate_size=256))
    _, row = followed(measure_random(config, "UD-Q4_K_XL", runs=1))
    assert row.capitals_tokens_per_s is None
    assert row.decode_tokens_per_s > 0


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="no variant 'Q9'; known are UD-Q2_K_XL"):
        next(measure_random(ModelConfig.parse(tiny_config()), "Q9"))
