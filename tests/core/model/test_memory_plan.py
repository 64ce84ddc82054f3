"""What fits: monotone, within what is free, and refused with numbers otherwise."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.conversation.session import Session
from qchat.core.engine.engine import Engine
from qchat.core.errors import DoesNotFit, UsageError
from qchat.core.machine.backend import Policy, mx
from qchat.core.model import memory_plan
from qchat.core.model.memory_plan import CHUNKS, Need, fit, need_of, plan_folder
from qchat.core.prompt_cache.snapshots import default_budget
from tests.checkpoints import tiny_config, write_checkpoint

POLICY = Policy(mx.bfloat16, dense=False)
GB = 10**9


def config_27b() -> ModelConfig:
    """The published dimensions of Qwen3.6-27B."""
    text = {
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "full_attention_interval": 4,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "vocab_size": 248320,
    }
    return ModelConfig.parse(tiny_config()["text_config"] | text | {"layer_types": None})


needs = st.builds(
    Need,
    weights_nbytes=st.integers(1 << 20, 1 << 36),
    state_nbytes=st.integers(0, 1 << 28),
    kv_nbytes_per_token=st.integers(1, 1 << 18),
    row_nbytes=st.integers(1, 1 << 18),
    score_nbytes=st.sampled_from([0, 96]),
)


@given(needs, st.integers(0, 1 << 38), st.integers(1, 1 << 18))
def test_what_is_planned_fits_and_what_is_refused_would_not(need: Need, free: int, longest: int):
    try:
        plan = fit(need, longest=longest, free_nbytes=free, context=None, name="m")
    except DoesNotFit:
        assert need.total_nbytes(CHUNKS[-1], min(longest, memory_plan.LEAST_CONTEXT)) > free
        return
    assert 0 < plan.context <= longest
    assert plan.chunk in CHUNKS
    if free:
        assert plan.total_nbytes <= free


@given(needs, st.integers(1, 1 << 38), st.integers(1, 1 << 18))
def test_more_memory_never_gives_less_context(need: Need, free: int, longest: int):
    def context(nbytes: int) -> int:
        try:
            return fit(need, longest=longest, free_nbytes=nbytes, context=None, name="m").context
        except DoesNotFit:
            return 0

    assert context(free) <= context(free + (1 << 30))


def test_keys_values_and_states_of_27b_are_the_published_ones():
    """64 KB of bfloat16 keys and values a token, 154 MB of states."""
    need = need_of(config_27b(), 15 * GB, POLICY)
    assert need.kv_nbytes_per_token == 64 << 10
    assert need.state_nbytes == pytest.approx(154e6, rel=0.01)
    assert need_of(config_27b(), 15 * GB, POLICY, kv_bits=8).kv_nbytes_per_token < 0.55 * (64 << 10)


def test_long_prompts_are_read_in_smaller_chunks_where_scores_take_the_memory():
    """27B at 128K of context: 12.9 GB of scores for 2,048 tokens at once."""
    need = need_of(config_27b(), 15 * GB, POLICY)
    assert need.transient_nbytes(2048, 1 << 17) - need.transient_nbytes(2048, 0) == pytest.approx(
        12.9e9, rel=0.01
    )
    roomy = fit(need, longest=1 << 17, free_nbytes=120 * GB, context=1 << 17, name="m")
    tight = fit(need, longest=1 << 17, free_nbytes=32 * GB, context=1 << 17, name="m")
    assert roomy.chunk > tight.chunk


def test_what_cannot_fit_is_refused_with_numbers_and_what_would():
    need = need_of(config_27b(), 15 * GB, POLICY)
    with pytest.raises(DoesNotFit, match=r"needs 15\.\d GB for 512 tokens .* has 8\.0 GB: a variant"):
        fit(need, longest=1 << 18, free_nbytes=8 * GB, context=None, name="big")
    with pytest.raises(
        DoesNotFit, match=r"for 262,144 tokens of context and .* 20\.0 GB: \d+,\d+ tokens would fit"
    ):
        fit(need, longest=1 << 18, free_nbytes=20 * GB, context=1 << 18, name="big")


@pytest.mark.parametrize(
    ("given", "message"), [({"context": 0}, "wanted 1 or more"), ({"kv_bits": 4}, "not at 4")]
)
def test_numbers_that_mean_nothing_are_refused(tmp_path: Path, given: dict, message: str):
    write_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=message):
        plan_folder(tmp_path, **given)


def test_the_plan_of_a_folder_counts_the_memory_that_loading_it_takes(tmp_path: Path):
    write_checkpoint(tmp_path)
    plan = plan_folder(tmp_path, context=64)
    before = mx.get_active_memory()
    engine = Engine.load(tmp_path)
    taken = mx.get_active_memory() - before
    assert plan.weights_nbytes == pytest.approx(taken, rel=0.1)
    cache = engine.model.new_cache()
    assert plan.state_nbytes == cache.state_nbytes
    engine.model.hidden(list(range(64)), cache)
    assert plan.kv_nbytes <= cache.nbytes - cache.state_nbytes


@pytest.mark.parametrize(("free", "budget"), [(22 * GB, 3 * GB), (0, None)])
def test_kept_states_get_a_quarter_of_what_the_weights_leave(tmp_path: Path, free: int, budget: int | None):
    write_checkpoint(tmp_path)
    engine = Engine.load(tmp_path)
    assert engine.model.plan is not None
    engine.model.plan = replace(engine.model.plan, free_nbytes=free, weights_nbytes=10 * GB)
    budgets = [Session(engine, snapshot_budget=given).live.snapshots.budget_nbytes for given in (None, 5)]
    assert budgets == [pytest.approx(budget or default_budget(), rel=0.05), 5]
