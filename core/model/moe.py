"""The mixture-of-experts block: a router, the chosen experts, and one shared expert behind a gate."""

from dataclasses import replace

from ..checkpoint.config import ModelConfig
from ..kernels.expert_routing import route
from ..machine.backend import Policy, mx
from ..ops import fused_matvec
from ..ops.elementwise import sigmoid, swiglu
from ..ops.fused_matvec import Norm, Weight
from ..ops.linear import ExpertsLinear, evaluate, join_weights, make_linear, prepare
from .layers import DenseMLP, Named, is_plain

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
        self.gates = self._join_gates()

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, T, hidden] to the same shape."""
        rows = x.reshape(-1, x.shape[-1])  # [R, hidden]
        experts, shares = self.route(rows)
        mixed = (self.run(rows, experts) * shares[..., None].astype(x.dtype)).sum(axis=1)
        shared = self.shared(rows) * sigmoid(self.shared_gate(rows)).astype(x.dtype)
        total = (mixed + shared).reshape(x.shape)
        return total if self.sum is None else self.sum(total)

    def _join_gates(self) -> Weight | None:
        """Router and shared expert's gate below each other, where kernels read everything in this block."""
        gates, shared = [self.router.weight, self.shared_gate.weight], self.shared
        pairs = [[self.gate.weight, self.up.weight], [self.down.weight], gates]
        inner = [shared.gate_up.weights, [shared.down.weight]]
        if not fused_matvec.ours() or not all(fused_matvec.takes(*pair) for pair in pairs + inner):
            return None
        joined = join_weights(gates)
        evaluate(joined)
        return joined

    def takes_few(self) -> bool:
        products = (self.router, self.shared_gate, self.gate, self.up, self.down)
        mine = self.sum is None and self.gates is not None  # a part of the experts is summed over ranks
        return mine and all(map(is_plain, products)) and self.shared.takes_few()

    def few(self, x: mx.array, norm: Norm) -> mx.array:
        """x + the block's output of norm(x), for x [T, hidden] with few T."""
        if self.gates is None:
            raise TypeError("this block's weights are not for kernels")
        logits = fused_matvec.logits(x, self.gates, norm=norm)
        ids, shares, shared = route(logits, self.top, renormalise=self.renormalise)
        hidden = fused_matvec.experts_gated(x, self.gate.weight, self.up.weight, ids, self.top, norm=norm)
        inner = self.shared.few_hidden(x, norm)
        x = fused_matvec.experts_sum(hidden, self.down.weight, ids, shares, self.top, add=x)
        return fused_matvec.shared_sum(inner, self.shared.down.weight, shared, add=x)

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
