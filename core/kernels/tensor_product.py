"""Products of packed weights with many rows on CUDA's tensor cores, without writing the weights out dense.

A warp unpacks 16 rows of a weight to bfloat16 and multiplies them with up to GROUP rows of x. It takes
columns in the order in which a packed row holds them: a lane has 32 neighbours of one row, so another kernel
lays x out likewise first. With experts, x is sorted by expert, and a group is of one expert. Metal needs none
of this: MLX's packed products use its matrix units.
"""

from functools import cache
from string import Template

from ..checkpoint.packed import Geometry, Packed
from ..machine.backend import mx
from .launch import Kernel
from .unpack import load_text, scale_count, values_text

# more rows of x cost less with the weight written out once, as measured on an H200 at the dimensions of 27B
MAX_TENSOR_ROWS = 40
COLUMNS = 128  # of a step: four slots
WARPS, WEIGHT_ROWS, TILE, TILES = 8, 16, 8, 8
GROUP = TILE * TILES  # rows of x that a warp multiplies
ARRANGE_THREADS, GROUP_THREADS = 128, 256
# warps that share the columns of 16 rows of a weight, by its least number of rows: all multiprocessors work
SPLITS = {16384: 1, 8192: 2, 4096: 4, 0: 8}

HELPERS = """
__device__ inline void multiply_tiles(float (&sum)[4], uint a, uint b, uint c, uint d, uint x, uint y) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
    : "r"(a), "r"(b), "r"(c), "r"(d), "r"(x), "r"(y));
}
"""
_GROUP_ROWS = Template("""
  constexpr uint EXPERTS = $experts, THREADS = $threads;
  const uint rows = index_shape[0];
  SHARED uint starts[EXPERTS + 1], begins[EXPERTS + 1];  // an expert's first row and first group
  for (uint expert = tid; expert <= EXPERTS; expert += THREADS) {
    uint low = 0, high = rows;
    while (low < high) {
      const uint middle = (low + high) / 2;
      if (index[middle] < expert) low = middle + 1; else high = middle;
    }
    starts[expert] = low;
  }
  BARRIER();
  if (tid == 0) {
    begins[0] = 0;
    for (uint i = 0; i < EXPERTS; ++i)
      begins[i + 1] = begins[i] + (starts[i + 1] - starts[i] + $group - 1) / $group;
  }
  BARRIER();
  for (uint expert = tid; expert < EXPERTS; expert += THREADS) {
    uint first = starts[expert];
    for (uint i = begins[expert]; i < begins[expert + 1]; ++i, first += $group) {
      groups[3 * i] = expert;
      groups[3 * i + 1] = first;
      groups[3 * i + 2] = min(uint($group), starts[expert + 1] - first);
    }
  }
  for (uint i = begins[EXPERTS] + tid; i < EXPERTS + rows / $group; i += THREADS) groups[3 * i + 2] = 0;
""")
# the rows of x of a block, and the expert whose weight they meet
_ALL_ROWS = f"""
  const uint expert = 0, row_begin = block_y * {GROUP};
  const uint count = min(uint({GROUP}), uint(x_shape[0]) - row_begin);"""
_ROWS_OF_EXPERT = """
  const DEVICE uint* group = groups + 3 * block_y;
  const uint expert = group[0], row_begin = group[1], count = group[2];
  if (count == 0) return;"""
_ARRANGE = Template("""
  $rows
  const uint columns = x_shape[1], lane_words = columns / 8, tiles = (count + $tile - 1) / $tile;
  const uint at = block_x * $threads + tid;  // four words of a lane, in the order of `tiled`
  if (at < lane_words * tiles * $tile) {
    const uint tile = at / 32 % tiles, eight = at / 32 / tiles;
    const uint row = tile * $tile + at % 32 / 4, column = eight / 4 * $columns + at % 4 * 32 + eight % 4 * 8;
    uint4 words = {0, 0, 0, 0};
    if (row < count) words = *(const DEVICE uint4*)(x + (row_begin + row) * columns + column);
    ((DEVICE uint4*)tiled)[block_y * $group * lane_words + at] = words;
  }
""")
_PRODUCT = Template("""
  constexpr uint WARPS = $warps;
  $rows
  const uint outputs = weight_shape[$rank - 2], slots = weight_shape[$rank - 1] / $bits, steps = slots / 4;
  const uint splits = $splits, parts = WARPS / splits, warp = tid / 32, split = warp % splits;
  const uint first = block_x * parts * 16, mine = first + warp / splits * 16;
  const uint tiles = (count + $tile - 1) / $tile;
  const DEVICE uint4* inputs = (const DEVICE uint4*)tiled + block_y * $group * slots * 4;
  uint begins[2];
  UNROLL for (uint r = 0; r < 2; ++r)
    begins[r] = (expert * outputs + min(mine + lane / 4 + 8 * r, outputs - 1)) * slots + lane % 4;
  float sum[$tiles][4] = {};
  uint word[2][$bits], next_word[2][$bits];
  float scale[2][$scales], bias[2] = {0, 0}, next_scale[2][$scales], next_bias[2] = {0, 0};
  UNROLL for (uint r = 0; r < 2; ++r) {
    const uint at = begins[r] + min(split, steps - 1) * 4;
    $load_next
  }
  for (uint step = split; step < steps; step += splits) {
    UNROLL for (uint r = 0; r < 2; ++r) {
      UNROLL for (uint i = 0; i < $bits; ++i) word[r][i] = next_word[r][i];
      UNROLL for (uint i = 0; i < $scales; ++i) scale[r][i] = next_scale[r][i];
      bias[r] = next_bias[r];
    }
    UNROLL for (uint r = 0; r < 2; ++r) {
      const uint at = begins[r] + min(step + splits, steps - 1) * 4;
      $load_next
    }
    uint two[2][16];
    UNROLL for (uint r = 0; r < 2; ++r) {
      float value[32];
      $values
      UNROLL for (uint i = 0; i < 16; ++i) two[r][i] = float_pair(value[2 * i], value[2 * i + 1]);
    }
    UNROLL for (uint eight = 0; eight < 4; ++eight) {
      UNROLL for (uint tile = 0; tile < $tiles; ++tile) if (tile < tiles) {
        const uint4 x8 = inputs[((step * 4 + eight) * tiles + tile) * 32 + lane];
        const uint i = 4 * eight;
        multiply_tiles(sum[tile], two[0][i], two[1][i], two[0][i + 1], two[1][i + 1], x8.x, x8.y);
        multiply_tiles(sum[tile], two[0][i + 2], two[1][i + 2], two[0][i + 3], two[1][i + 3], x8.z, x8.w);
      }
    }
  }
  SHARED float sums[WARPS][$group][16];
  UNROLL for (uint tile = 0; tile < $tiles; ++tile) if (tile < tiles) {
    UNROLL for (uint i = 0; i < 4; ++i)
      sums[warp][tile * $tile + lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = sum[tile][i];
  }
  BARRIER();
  const uint width = parts * 16;
  for (uint i = tid; i < width * count; i += WARPS * 32) {
    const uint output = first + i % width, row = i / width;
    float total = 0;
    for (uint s = 0; s < splits; ++s) total += sums[i % width / 16 * splits + s][row][i % 16];
    if (output < outputs) y[(row_begin + row) * outputs + output] = bf16(total);
  }
""")


def fits(x: mx.array, weight: Packed) -> bool:
    """Whether the kernel takes rows x [..., K] and a weight [..., N, K] of a format that our kernels read."""
    return x.dtype == mx.bfloat16 and x.shape[-1] % COLUMNS == 0 and weight.weight.ndim < 4


def tensor_product(x: mx.array, weight: Packed) -> mx.array:
    """Return x [R, K] @ weight [N, K]^T as bfloat16 [R, N]. Affine scales and biases must be bfloat16."""
    return _multiply(x, weight, [], -(-x.shape[0] // GROUP), splits_of(weight.weight.shape[0]))


def experts_product(x: mx.array, weight: Packed, groups: mx.array) -> mx.array:
    """Return each row of x [R, K] times the weight of its expert, of [E, N, K]; `groups` are those of x."""
    return _multiply(x, weight, [groups], groups.shape[0], 1)


def group_rows(index: mx.array, experts: int) -> mx.array:
    """Return the groups [G, 3] of rows with experts `index` [R] uint32, sorted: expert, first row and count.

    A group has up to GROUP rows; groups behind the last one are empty.
    """
    capacity = experts + index.size // GROUP
    (groups,) = group_kernel(experts)([index], blocks=(1, 1, 1), results=[((capacity, 3), mx.uint32)])
    return groups


def _multiply(x: mx.array, weight: Packed, groups: list[mx.array], count: int, splits: int) -> mx.array:
    (rows, columns), outputs = x.shape, weight.weight.shape[-2]
    blocks = -(-GROUP * columns // 8 // ARRANGE_THREADS)
    tiled_words = count * GROUP * columns // 2
    (tiled,) = arrange_kernel(experts=bool(groups))(
        [x, *groups], blocks=(blocks, count, 1), results=[((tiled_words,), mx.uint32)]
    )
    (y,) = product_kernel(weight.geometry, experts=bool(groups))(
        [*weight.arrays, tiled, *(groups or [x])],
        blocks=(-(-outputs // (WARPS // splits * WEIGHT_ROWS)), count, 1),
        results=[((rows, outputs), mx.bfloat16)],
    )
    return y


def splits_of(outputs: int) -> int:
    """Return how many warps share the columns of a weight with so many rows."""
    return next(splits for least, splits in SPLITS.items() if outputs >= least)


@cache
def group_kernel(experts: int) -> Kernel:
    parts = {"experts": experts, "threads": GROUP_THREADS, "group": GROUP}
    body = _GROUP_ROWS.substitute(parts)
    return Kernel(f"group_rows_{experts}", ("index",), ("groups",), body, GROUP_THREADS)


@cache
def arrange_kernel(*, experts: bool) -> Kernel:
    parts = {"tile": TILE, "columns": COLUMNS, "group": GROUP, "threads": ARRANGE_THREADS}
    body = _ARRANGE.substitute(parts, rows=_ROWS_OF_EXPERT if experts else _ALL_ROWS)
    return Kernel("arrange", ("x", *(["groups"] if experts else [])), ("tiled",), body, ARRANGE_THREADS)


@cache
def product_kernel(geometry: Geometry, *, experts: bool) -> Kernel:
    cases = [f"outputs >= {least} ? {n} :" for least, n in SPLITS.items() if least]
    parts = {
        "group": GROUP,
        "tile": TILE,
        "tiles": TILES,
        "warps": WARPS,
        "rows": _ROWS_OF_EXPERT if experts else _ALL_ROWS,
        "rank": 3 if experts else 2,
        "splits": "1" if experts else f"{' '.join(cases)} {SPLITS[0]}",
        "bits": geometry.bits,
        "scales": scale_count(geometry),
        "load_next": load_text(geometry, into="next_"),
        "values": values_text(geometry),
    }
    scales = ("scales", "biases") if geometry.mode == "affine" else ("scales",)
    return Kernel(
        f"{'experts' if experts else 'tensor'}_product_{geometry.mode}{geometry.bits}",
        ("weight", *scales, "tiled", "groups" if experts else "x"),
        ("y",),
        _PRODUCT.substitute(parts),
        32 * WARPS,
        helpers=HELPERS,
        resident=2,
    )
