"""The mixture-of-experts block: a router, the experts it chooses, and one shared expert behind a gate."""

from dataclasses import replace

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import WeightScope
from ..machine.backend import Policy, mx
from ..ops.elementwise import sigmoid, swiglu
from ..ops.linear import ExpertsLinear, make_linear, materialize
from ..ops.tiled import TiledExperts
from .layers import DenseMLP

# from this many choices on, rows are sorted by expert so that each expert's weights are read once
SORT_FROM = 64


class MixtureOfExperts:
    """The sum over the top experts of p_e * expert_e(x), plus sigmoid(gate(x)) * shared_expert(x)."""

    def __init__(self, config: ModelConfig, weights: WeightScope, policy: Policy):
        self.top, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        experts = weights.within("switch_mlp")
        self.gate: ExpertsLinear | TiledExperts
        self.up: ExpertsLinear | TiledExperts
        self.down: ExpertsLinear | TiledExperts
        self.gate, self.up, self.down = (
            ExpertsLinear(materialize(experts[f"{name}_proj"], policy)) for name in ("gate", "up", "down")
        )
        self.router = make_linear(materialize(weights["gate"], policy))
        self.shared = DenseMLP(weights.within("shared_expert"), replace(policy, sum=None))
        self.sum = policy.sum
        self.shared_gate = make_linear(materialize(weights["shared_expert_gate"], policy))

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [B, T, hidden] to the same shape; R rows are B * T tokens."""
        rows = x.reshape(-1, x.shape[-1])  # [R, hidden]
        experts, shares = self.route(rows)  # [R, top]
        routed = (self.run(rows, experts) * shares[..., None].astype(x.dtype)).sum(axis=1)  # [R, hidden]
        shared = self.shared(rows) * sigmoid(self.shared_gate(rows)).astype(x.dtype)  # [R, hidden]
        total = (routed + shared).reshape(x.shape)  # [B, T, hidden]
        return total if self.sum is None else self.sum(total)

    def route(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Return each row's best experts and their shares by a softmax over all (float32); both [R, top]."""
        shares = mx.softmax(self.router(rows).astype(mx.float32), axis=-1)  # [R, E]
        experts = mx.argpartition(-shares, self.top - 1, axis=-1)[..., : self.top]  # [R, top]
        shares = mx.take_along_axis(shares, experts, axis=-1)  # [R, top]
        return experts, shares / shares.sum(axis=-1, keepdims=True) if self.renormalise else shares

    def run(self, rows: mx.array, experts: mx.array) -> mx.array:
        """Send each row through each of its experts: [R, hidden], [R, top] to [R, top, hidden]."""
        choices = experts.flatten()  # [R*top]
        ordered = choices.size >= SORT_FROM
        order = mx.argsort(choices) if ordered else mx.arange(choices.size)
        x, index = rows[order // self.top][:, None], choices[order]  # [R*top, 1, hidden], [R*top]
        hidden = swiglu(self.gate(x, index, ordered), self.up(x, index, ordered))
        output = self.down(hidden, index, ordered)[:, 0]  # [R*top, hidden]
        output = output[mx.argsort(order)] if ordered else output
        return output.reshape(*experts.shape, -1)
