"""The kernel that dequantizes a packed weight to bfloat16, for products of many rows."""

from functools import cache
from string import Template

from ..checkpoint.packed import Geometry, Packed
from ..machine.backend import mx
from .launch import Kernel
from .unpack import WEIGHTS, load_text, scale_count, values_text

THREADS = 128

_DEQUANTIZE = Template("""
  constexpr uint THREADS = $threads;
  const uint slots = $slots, slot = block_x * THREADS + tid;
  // the four words of a lane's quarter slots lie apart in memory: through here they are written side by side
  SHARED uint4 staged[THREADS * 4];
  if (slot < slots) {
    constexpr uint r = 0;
    const uint at = slot;
    uint word[1][$words];
    float scale[1][$scales], bias[1] = {0}, value[32];
    $load
    $values
    UNROLL for (uint i = 0; i < 4; ++i) {
      const uint4 four = {
        float_pair(value[8 * i], value[8 * i + 1]), float_pair(value[8 * i + 2], value[8 * i + 3]),
        float_pair(value[8 * i + 4], value[8 * i + 5]), float_pair(value[8 * i + 6], value[8 * i + 7])};
      staged[tid * 4 + i] = four;
    }
  }
  BARRIER();
  UNROLL for (uint i = 0; i < 4; ++i) {
    const uint place = (block_x * 4 + i) * THREADS + tid;
    if (place < 4 * slots) ((DEVICE uint4*)y)[place] = staged[i * THREADS + tid];
  }
""")


def dequantize(packed: Packed) -> mx.array:
    """Return the dense weight [..., N, K] in bfloat16. Affine scales and biases must be bfloat16."""
    *stack, rows, _ = packed.weight.shape
    columns = packed.scales.shape[-1] * packed.group_size
    slots = packed.scales.size * packed.group_size // WEIGHTS
    (dense,) = dequantize_kernel(packed.geometry, packed.weight.ndim)(
        list(packed.arrays),
        blocks=(-(-slots // THREADS), 1, 1),
        results=[((*stack, rows, columns), mx.bfloat16)],
    )
    return dense


@cache
def dequantize_kernel(geometry: Geometry, rank: int) -> Kernel:
    parts = {
        "threads": THREADS,
        "slots": " * ".join(f"uint(weight_shape[{axis}])" for axis in range(rank)) + f" / {geometry.bits}",
        "words": geometry.bits,
        "scales": scale_count(geometry),
        "load": load_text(geometry),
        "values": values_text(geometry),
    }
    inputs = ("weight", "scales", "biases") if geometry.mode == "affine" else ("weight", "scales")
    return Kernel(
        f"dequantize_{geometry.mode}{geometry.bits}", inputs, ("y",), _DEQUANTIZE.substitute(parts), THREADS
    )
