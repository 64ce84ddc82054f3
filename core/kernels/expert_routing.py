"""How tokens are routed to experts: softmax over the router's logits and its top, by one warp a token.

`route` is a kernel of its own. Where the shared expert is stacked behind the others, the experts' first
product routes instead (`kernels.matvec`), each of its warps for itself: a launch less.
"""

from dataclasses import dataclass
from functools import cache
from string import Template

from ..machine.backend import mx
from .launch import Kernel

LANES = 32
MAX_EXPERTS = 1024


@dataclass(frozen=True)
class Router:
    """A router over `experts`, of which each token takes the best `chosen`; shares add up to 1 if asked."""

    experts: int
    chosen: int
    renormalise: bool


# leaves winner[CHOSEN] and odds[CHOSEN] of `token`, their `divisor`, and the shared expert's `gate`
_CHOOSE = Template("""
  constexpr uint EXPERTS = $experts, CHOSEN = $chosen, WIDTH = EXPERTS + 1, PER_LANE = (EXPERTS + 31) / 32;
  float logit[PER_LANE], sum_of_all = 0, sum_of_chosen = 0;
  float highest = -1e30f;
  UNROLL for (uint i = 0; i < PER_LANE; ++i) {
    const uint expert = i * 32 + lane;
    logit[i] = expert < EXPERTS ? logits[token * WIDTH + expert] : -1e30f;
    highest = max(highest, logit[i]);
  }
  UNROLL for (uint mask = 16; mask > 0; mask /= 2) highest = max(highest, lane_xor(highest, mask));
  UNROLL for (uint i = 0; i < PER_LANE; ++i) sum_of_all += exp(logit[i] - highest);
  sum_of_all = lanes_sum(sum_of_all);
  float odds[CHOSEN];
  uint winner[CHOSEN];
  UNROLL for (uint n = 0; n < CHOSEN; ++n) {
    float best = -1e38f, place = 0;
    UNROLL for (uint i = 0; i < PER_LANE; ++i)
      if (logit[i] > best) { best = logit[i]; place = float(i * 32 + lane); }
    // among equals the first expert
    UNROLL for (uint mask = 16; mask > 0; mask /= 2) {
      const float other = lane_xor(best, mask), there = lane_xor(place, mask);
      if (other > best || (other == best && there < place)) { best = other; place = there; }
    }
    UNROLL for (uint i = 0; i < PER_LANE; ++i) if (float(i * 32 + lane) == place) logit[i] = -1e38f;
    winner[n] = uint(place);
    odds[n] = exp(best - highest);
    sum_of_chosen += odds[n];
  }
  const float divisor = $renormalise ? sum_of_chosen : sum_of_all;
  const float gate = 1.0f / (1.0f + exp(-logits[token * WIDTH + EXPERTS]));
""")
_ROUTE = """
  if (lane == 0) {
    UNROLL for (uint n = 0; n < CHOSEN; ++n) {
      ids[token * CHOSEN + n] = winner[n];
      shares[token * CHOSEN + n] = odds[n] / divisor;
    }
    shared[token] = gate;
  }
"""


def choose_text(router: Router) -> str:
    """Return text by which each warp finds the experts of `token`, given logits [R, E + 1] in float32.

    The last column is the shared expert's.
    """
    parts = vars(router) | {"renormalise": str(router.renormalise).lower()}
    return _CHOOSE.substitute(parts)


def route(logits: mx.array, top: int, *, renormalise: bool) -> tuple[mx.array, mx.array, mx.array]:
    """Return the best experts' ids (uint32) and shares, both [R * top], and the shared expert's share [R].

    logits [R, E + 1] are float32, the last column the shared expert's; shares are float32.
    """
    rows, width = logits.shape
    return tuple(  # pyright: ignore[reportReturnType]
        route_kernel(Router(width - 1, top, renormalise))(
            [logits],
            blocks=(rows, 1, 1),
            results=[((rows * top,), mx.uint32), ((rows * top,), mx.float32), ((rows,), mx.float32)],
        )
    )


@cache
def route_kernel(router: Router) -> Kernel:
    """Return the kernel that routes one token a block."""
    body = f"  const uint token = block_x;{choose_text(router)}{_ROUTE}"
    return Kernel("route", ("logits",), ("ids", "shares", "shared"), body, LANES)
