"""The kernel that dequantizes a packed weight to bfloat16, for products of many rows."""

from functools import cache
from string import Template

from ..checkpoint.packed import Geometry, Packed
from ..machine.backend import mx
from .launch import Kernel
from .unpack import WEIGHTS, write_text

THREADS = 128

_DEQUANTIZE = Template("""
  constexpr uint THREADS = $threads;
  const uint slots = $slots, slot = block_x * THREADS + tid;
  // the four words of a lane's quarter slots lie apart in memory: through here they are written side by side
  SHARED uint4 staged[THREADS * 4];
  if (slot < slots) {
    const uint at = slot;
    $write
  }
  BARRIER();
  UNROLL for (uint i = 0; i < 4; ++i) {
    const uint place = (block_x * 4 + i) * THREADS + tid;
    if (place < 4 * slots) ((DEVICE uint4*)y)[place] = staged[i * THREADS + tid];
  }
""")


def dequantize(packed: Packed) -> mx.array:
    """Return the dense weight [..., N, K] in bfloat16. Affine scales and biases must be bfloat16."""
    slots = packed.scales.size * packed.group_size // WEIGHTS
    (dense,) = dequantize_kernel(packed.geometry, packed.weight.ndim)(
        list(packed.arrays),
        blocks=(-(-slots // THREADS), 1, 1),
        results=[(packed.shape, mx.bfloat16)],
    )
    return dense


@cache
def dequantize_kernel(geometry: Geometry, rank: int) -> Kernel:
    parts = {
        "threads": THREADS,
        "slots": " * ".join(f"uint(weight_shape[{axis}])" for axis in range(rank)) + f" / {geometry.bits}",
        "write": write_text(geometry, "staged[tid * 4 + i]"),
    }
    inputs = ("weight", "scales", "biases") if geometry.mode == "affine" else ("weight", "scales")
    return Kernel(
        f"dequantize_{geometry.mode}{geometry.bits}", inputs, ("y",), _DEQUANTIZE.substitute(parts), THREADS
    )
