"""The kernel that routes tokens to experts: softmax over the router's logits and its top, one warp a row."""

from functools import cache
from string import Template

from ..machine.backend import mx
from .launch import Kernel

LANES = 32
MAX_EXPERTS = 1024

_ROUTE = Template("""
  constexpr uint EXPERTS = $experts, TOP = $top, WIDTH = $width, PER_LANE = (EXPERTS + 31) / 32;
  const uint row = block_x;
  float logit[PER_LANE], total = 0, chosen = 0;
  float highest = -1e30f;
  UNROLL for (uint i = 0; i < PER_LANE; ++i) {
    const uint expert = i * 32 + lane;
    logit[i] = expert < EXPERTS ? logits[row * WIDTH + expert] : -1e30f;
    highest = max(highest, logit[i]);
  }
  UNROLL for (uint mask = 16; mask > 0; mask /= 2) highest = max(highest, lane_xor(highest, mask));
  UNROLL for (uint i = 0; i < PER_LANE; ++i) total += exp(logit[i] - highest);
  total = lanes_sum(total);
  float weight[TOP];
  UNROLL for (uint n = 0; n < TOP; ++n) {
    float best = -1e38f, place = 0;
    UNROLL for (uint i = 0; i < PER_LANE; ++i)
      if (logit[i] > best) { best = logit[i]; place = float(i * 32 + lane); }
    // among equals the first expert
    UNROLL for (uint mask = 16; mask > 0; mask /= 2) {
      const float other = lane_xor(best, mask), there = lane_xor(place, mask);
      if (other > best || (other == best && there < place)) { best = other; place = there; }
    }
    UNROLL for (uint i = 0; i < PER_LANE; ++i) if (float(i * 32 + lane) == place) logit[i] = -1e38f;
    weight[n] = exp(best - highest);
    chosen += weight[n];
    if (lane == 0) ids[row * TOP + n] = uint(place);
  }
  UNROLL for (uint n = 0; n < TOP; ++n)
    if (lane == 0) shares[row * TOP + n] = weight[n] / ($renormalise ? chosen : total);
  if (lane == 0) shared[row] = 1.0f / (1.0f + exp(-logits[row * WIDTH + EXPERTS]));
""")


def route(logits: mx.array, top: int, *, renormalise: bool) -> tuple[mx.array, mx.array, mx.array]:
    """Return the best experts' ids (uint32) and shares, both [R * top], and the shared expert's share [R].

    logits [R, E + 1] are float32, the last column the shared expert's; shares are float32.
    """
    rows, width = logits.shape
    return tuple(  # pyright: ignore[reportReturnType]
        route_kernel(width - 1, top, renormalise)(
            [logits],
            blocks=(rows, 1, 1),
            results=[((rows * top,), mx.uint32), ((rows * top,), mx.float32), ((rows,), mx.float32)],
        )
    )


@cache
def route_kernel(experts: int, top: int, renormalise: bool) -> Kernel:
    """Return the kernel for `experts` routed experts, of which each row takes the best `top`."""
    parts = {"experts": experts, "top": top, "width": experts + 1, "renormalise": str(renormalise).lower()}
    return Kernel("route", ("logits",), ("ids", "shares", "shared"), _ROUTE.substitute(parts), LANES)
