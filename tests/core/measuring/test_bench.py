"""Figures of a measurement are consistent, and absent where there is nothing to measure."""

from pathlib import Path

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.errors import UsageError
from qchat.core.measuring import bench
from qchat.core.measuring.bench import BenchRun, measure, measure_random
from qchat.core.measuring.results import BenchResult
from tests.checkpoints import tiny_config, write_checkpoint


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench, "PREFILL_LENGTHS", (16, 64, 8192))
    monkeypatch.setattr(bench, "SUSTAINED_TOKENS", 32)


def run_to_end(run: BenchRun) -> tuple[list[bench.BenchStep], BenchResult]:
    seen = []
    while True:
        try:
            seen.append(next(run))
        except StopIteration as end:
            return seen, end.value


def test_a_models_figures_fit_each_other(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench, "CAPITALS", ("What?", "And?"))
    monkeypatch.setattr(bench, "hold_conversation", hold_short_conversation)
    write_checkpoint(tmp_path)
    seen, row = run_to_end(measure(tmp_path, runs=1))
    assert [step.done for step in seen] == list(range(len(seen)))
    assert row.prefills[8192] is None  # the model's context is shorter
    assert row.prefills[16] == row.prefill_tokens_per_s > 0
    assert len(row.speeds) == bench.SPEED_SAMPLES
    assert min(row.speeds) <= row.decode_tokens_per_s <= max(row.speeds)
    figures = row.as_json()
    assert figures["bandwidth_share"] == pytest.approx(
        row.step_nbytes * row.decode_tokens_per_s / row.bandwidth
    )


@pytest.mark.slow
def test_a_context_shorter_than_every_prompt_has_no_prefill_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PREFILL_LENGTHS", (8192,))
    monkeypatch.setattr(bench, "CAPITALS", ("What?", "And?"))
    monkeypatch.setattr(bench, "hold_conversation", hold_short_conversation)
    write_checkpoint(tmp_path)
    _, row = run_to_end(measure(tmp_path, runs=1))
    assert (row.prefills, row.prefill_tokens_per_s) == ({8192: None}, 0.0)


def hold_short_conversation(engine):
    session = bench.Session(engine, enable_thinking=False, max_new_tokens=4)
    return [session.send(question) for question in bench.CAPITALS]


def test_a_random_model_is_measured_without_a_conversation():
    config = ModelConfig.parse(tiny_config(hidden_size=128, intermediate_size=256))
    _, row = run_to_end(measure_random(config, "UD-Q4_K_XL", runs=1))
    assert row.capitals_tokens_per_s is None
    assert row.decode_tokens_per_s > 0


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="no variant 'Q9'; known are UD-Q2_K_XL"):
        next(measure_random(ModelConfig.parse(tiny_config()), "Q9"))
