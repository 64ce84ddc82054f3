"""Build models: read and check the weights, choose a policy, take this rank's share of them, plan the memory.

The one place where a `Model` is made, of a folder or of weights from anywhere. Refuses what does not fit.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..checkpoint.config import ModelConfig
from ..checkpoint.finite import find_not_finite
from ..checkpoint.weights import Progress, Weights, load_weights
from ..hub.names import model_name
from ..machine.backend import choose_policy
from ..model.memory_plan import plan_memory
from ..model.network import Model
from ..ops.linear import Linear, make_linear, materialize
from .ranks import Ranks, join_ranks, slice_for_rank, splits_head

M = TypeVar("M", bound=Model)


def load_folder(kind: type[M], folder: Path, config: ModelConfig, progress: Progress | None = None) -> M:
    """Load the model in `folder` as a `kind` of Model; among several ranks, this rank's share of it.

    Reports to `progress` before each tensor, once all are checked. Raises ModelError and its children,
    DoesNotFit, UsageError where ranks cannot share the model, and what `progress` raises.
    """
    weights, name = load_weights(folder, config), model_name(folder.resolve())
    model = build_model(kind, weights.settle(config), weights, progress, ranks=join_ranks(), name=name)
    model.explain_failure = partial(find_not_finite, folder, config)
    return model


def build_model(
    kind: type[M],
    config: ModelConfig,
    weights: Weights,
    progress: Progress | None = None,
    *,
    ranks: Ranks | None = None,
    name: str | None = None,
) -> M:
    """Build a `kind` of Model from the whole model's weights; of several `ranks`, this rank's share.

    Its memory is planned, and DoesNotFit raised, only with a `name` to call the model by in messages.
    """
    policy, gather = choose_policy(weights.parameters), None
    if ranks is not None:
        gather = ranks.gather if splits_head(config, ranks) else None
        config, weights = slice_for_rank(config, weights, ranks)
        policy = replace(policy, sum=ranks.sum)
    plan = None
    if name is not None:
        sharers = 1 if ranks is None else ranks.sharers()
        plan = plan_memory(config, weights, policy, name=name, sharers=sharers)
    return kind(config, weights, policy, progress, gather, plan)


def load_head(folder: Path, config: ModelConfig) -> Linear:
    """Load the output head of the model in `folder` alone: hidden states [..., hidden] to logits [..., V].

    Raises ModelError and its children.
    """
    weights = load_weights(folder, config)
    name = "embed_tokens" if weights.settle(config).tie_word_embeddings else "lm_head"
    return make_linear(materialize(weights.tensors[name], choose_policy(weights.parameters)))
