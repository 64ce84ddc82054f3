"""The mixture-of-experts block: a router, the chosen experts, and one shared expert behind a gate."""

from dataclasses import replace

from .backend import Policy, mx
from .config import ModelConfig
from .kernels.elementwise import sigmoid, swiglu
from .kernels.linear import ExpertsLinear, make_linear, prepare
from .layers import DenseMLP, Named

# from this many choices on, rows are sorted by expert so that each expert's weights are read once
SORT_FROM = 64


class MixtureOfExperts:
    """sum over the top experts of p_e * expert_e(x), plus sigmoid(gate(x)) * shared_expert(x)."""

    def __init__(self, config: ModelConfig, weights: Named, policy: Policy):
        self.top, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        experts = weights.within("switch_mlp")
        self.gate, self.up, self.down = (
            ExpertsLinear(prepare(experts[f"{name}_proj"], policy)) for name in ("gate", "up", "down")
        )
        self.router = make_linear(prepare(weights["gate"], policy))
        self.shared = DenseMLP(weights.within("shared_expert"), replace(policy, sum=None))
        self.sum = policy.sum
        self.shared_gate = make_linear(prepare(weights["shared_expert_gate"], policy))

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, T, hidden] to the same shape."""
        rows = x.reshape(-1, x.shape[-1])  # [R, hidden]
        experts, shares = self.route(rows)
        mixed = (self.run(rows, experts) * shares[..., None].astype(x.dtype)).sum(axis=1)
        shared = self.shared(rows) * sigmoid(self.shared_gate(rows)).astype(x.dtype)
        total = (mixed + shared).reshape(x.shape)
        return total if self.sum is None else self.sum(total)

    def route(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """The best experts of each row and their shares by a softmax over all (float32); both [R, top]."""
        shares = mx.softmax(self.router(rows).astype(mx.float32), axis=-1)
        experts = mx.argpartition(-shares, self.top - 1, axis=-1)[..., : self.top]
        shares = mx.take_along_axis(shares, experts, axis=-1)
        return experts, shares / shares.sum(axis=-1, keepdims=True) if self.renormalise else shares

    def run(self, rows: mx.array, experts: mx.array) -> mx.array:
        """Each row through each of its experts: [R, hidden], [R, top] to [R, top, hidden]."""
        chosen = experts.flatten()
        ordered = chosen.size >= SORT_FROM
        order = mx.argsort(chosen) if ordered else mx.arange(chosen.size)
        x, index = rows[order // self.top][:, None], chosen[order]  # [R*top, 1, hidden]
        hidden = swiglu(self.gate(x, index, ordered), self.up(x, index, ordered))
        output = self.down(hidden, index, ordered)[:, 0]
        output = output[mx.argsort(order)] if ordered else output
        return output.reshape(*experts.shape, -1)
