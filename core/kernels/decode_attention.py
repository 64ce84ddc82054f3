"""Kernels of gated attention for a few queries: heads out of projections, then attention over a KV cache.

`split_heads` normalises and rotates queries and keys. `attend` reads the cache once for all query heads that
share it, in splits of the context; a second kernel joins the splits and applies the output gate. After Dao
et al. (arXiv 2205.14135), with the splits of FlashDecoding. Takes bfloat16 and head dims of 256 only.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from string import Template

from ..machine.backend import mx
from .launch import Kernel

HEAD_DIM = 256
MAX_SHARERS = 8  # query heads per key head
LANES = 32
TILE = 64  # positions whose scores are in shared memory at a time
AT_ONCE = 4  # keys, or values, that a thread loads before it uses the first
MAX_SPLITS = 64


@dataclass(frozen=True)
class Heads:
    """Sizes of one attention; a row of its projections is [q 256 | gate 256] per head, then keys, values."""

    heads: int
    kv_heads: int
    rotary: int
    norm_eps: float

    @property
    def width(self) -> int:
        """Columns of the projections."""
        return 2 * (self.heads + self.kv_heads) * HEAD_DIM


def fits(heads: Heads, head_dim: int) -> bool:
    """Whether the kernels take an attention of these sizes."""
    sharers, odd = divmod(heads.heads, heads.kv_heads)
    return head_dim == HEAD_DIM and not odd and sharers <= MAX_SHARERS and heads.rotary % 2 == 0


_CONSTANTS = Template("""
  constexpr uint HEADS = $heads, KV = $kv_heads, D = 256, ROTARY = $rotary, WIDTH = $width;
  constexpr uint SHARERS = HEADS / KV, TILE = $tile, WARPS = D / 32;
  constexpr uint AT_ONCE = $at_once;
""")
# five words describe a cache: two each are the addresses of keys and values, the last is the capacity
WORDS = 5
_FOUND = Template("""
  ${mutable}bf16* $first = (${mutable}bf16*)(found_at[0] | (unsigned long long)found_at[1] << 32);
  ${mutable}bf16* $second = (${mutable}bf16*)(found_at[2] | (unsigned long long)found_at[3] << 32);
""")
_SPLIT = Template("""
  // a block is one head of one position: of queries, of keys, then of values
  const uint part = block_x, t = block_y, steps = main_shape[0];
  const bool is_query = part < HEADS, is_key = !is_query && part < HEADS + KV;
  SHARED float squares[WARPS], line[D];
  float value = float(main[t * WIDTH + (is_query ? 2 * part : HEADS + part) * D + tid]);
  const float square = lanes_sum(value * value);
  if (lane == 0) squares[tid / 32] = square;
  BARRIER();
  float all = 0;
  UNROLL for (uint w = 0; w < WARPS; ++w) all += squares[w];
  if (is_query || is_key) value *= rsqrt(all / D + $eps) * (is_query ? q_norm[tid] : k_norm[tid]);
  line[tid] = value;
  BARRIER();
  if ((is_query || is_key) && tid < ROTARY) {
    const bool low = tid < ROTARY / 2;
    const float angle = float(uint(offset[0]) + t) * turns[tid % (ROTARY / 2)];
    const float other = line[low ? tid + ROTARY / 2 : tid - ROTARY / 2];
    value = value * exact_cos(angle) + (low ? -other : other) * exact_sin(angle);
  }
  if (is_query) q[(part * steps + t) * D + tid] = bf16(value);
  else if (is_key) k[((part - HEADS) * $stride + $start + t) * D + tid] = bf16(value);
  else v[((part - HEADS - KV) * $stride + $start + t) * D + tid] = bf16(value);
""")
_ATTEND = Template("""
  const uint split = block_x, kv = block_y, t = block_z, warp = tid / 32;
  const uint steps = q_shape[2], capacity = $capacity;
  const uint visible = uint(offset[0]) + t + 1;
  const uint stretch = (visible + $splits - 1) / $splits;
  const uint begin = min(split * stretch, visible), end = min(begin + stretch, visible);
  SHARED float scores[SHARERS][TILE], fades[SHARERS], highest[SHARERS], totals[SHARERS];
  SHARED float others[3][SHARERS][D];
  float query[SHARERS][8];
  UNROLL for (uint r = 0; r < SHARERS; ++r) {
    const uint4 four = ((const DEVICE uint4*)q)[((kv * SHARERS + r) * steps + t) * (D / 8) + lane];
    query[r][0] = low_float(four.x); query[r][1] = high_float(four.x);
    query[r][2] = low_float(four.y); query[r][3] = high_float(four.y);
    query[r][4] = low_float(four.z); query[r][5] = high_float(four.z);
    query[r][6] = low_float(four.w); query[r][7] = high_float(four.w);
    UNROLL for (uint i = 0; i < 8; ++i) query[r][i] *= 0.0625f;  // 1 / sqrt(256)
  }
  if (tid < SHARERS) { highest[tid] = -1e30f; totals[tid] = 0; }
  // four threads have the same four columns of the values, each for every fourth position
  const uint columns = tid % (D / 4), quarter = tid / (D / 4);
  float mixed[SHARERS][4];
  UNROLL for (uint r = 0; r < SHARERS; ++r) { UNROLL for (uint c = 0; c < 4; ++c) mixed[r][c] = 0; }
  for (uint first = begin; first < end; first += TILE) {
    const uint here = min(TILE, end - first);
    BARRIER();
    for (uint start = warp; start < here; start += AT_ONCE * WARPS) {
      uint4 four[AT_ONCE];  // all on their way before the first is used
      UNROLL for (uint n = 0; n < AT_ONCE; ++n) {
        const uint i = min(start + n * WARPS, here - 1);
        four[n] = ((const DEVICE uint4*)keys)[(kv * capacity + first + i) * (D / 8) + lane];
      }
      UNROLL for (uint n = 0; n < AT_ONCE; ++n) {
        const float key[8] = {
          low_float(four[n].x), high_float(four[n].x), low_float(four[n].y), high_float(four[n].y),
          low_float(four[n].z), high_float(four[n].z), low_float(four[n].w), high_float(four[n].w)};
        float score[8];
        UNROLL for (uint r = 0; r < 8; ++r) {
          score[r] = 0;
          if (r < SHARERS) { UNROLL for (uint j = 0; j < 8; ++j) score[r] += query[r % SHARERS][j] * key[j]; }
        }
        // eight sums over the warp at once: each round halves a lane's, until lane / 4 names its head
        UNROLL for (uint count = 4, mask = 16; count > 0; count /= 2, mask /= 2) {
          const bool upper = lane & mask;
          UNROLL for (uint r = 0; r < count; ++r) {
            const float kept = upper ? score[r + count] : score[r];
            const float given = upper ? score[r] : score[r + count];
            score[r] = kept + lane_xor(given, mask);
          }
        }
        score[0] += lane_xor(score[0], 2);
        score[0] += lane_xor(score[0], 1);
        const uint i = start + n * WARPS;
        if (i < here && lane % 4 == 0 && lane / 4 < SHARERS) scores[lane / 4][i] = score[0];
      }
    }
    BARRIER();
    if (warp < SHARERS) {
      float top = -1e30f, total = 0;
      for (uint i = lane; i < here; i += 32) top = max(top, scores[warp][i]);
      UNROLL for (uint mask = 16; mask > 0; mask /= 2) top = max(top, lane_xor(top, mask));
      const float before = highest[warp];
      top = max(top, before);
      for (uint i = lane; i < TILE; i += 32) {
        const float weight = i < here ? exp(scores[warp][i] - top) : 0.0f;
        scores[warp][i] = weight;
        total += weight;
      }
      total = lanes_sum(total);
      if (lane == 0) {
        fades[warp] = exp(before - top);
        totals[warp] = totals[warp] * fades[warp] + total;
        highest[warp] = top;
      }
    }
    BARRIER();
    UNROLL for (uint r = 0; r < SHARERS; ++r) { UNROLL for (uint c = 0; c < 4; ++c) mixed[r][c] *= fades[r]; }
    for (uint start = quarter; start < here; start += 4 * AT_ONCE) {
      uint2 two[AT_ONCE];
      UNROLL for (uint n = 0; n < AT_ONCE; ++n) {
        const uint i = min(start + 4 * n, here - 1);
        two[n] = ((const DEVICE uint2*)values)[(kv * capacity + first + i) * (D / 4) + columns];
      }
      UNROLL for (uint n = 0; n < AT_ONCE; ++n) {
        const float value[4] = {
          low_float(two[n].x), high_float(two[n].x), low_float(two[n].y), high_float(two[n].y)};
        UNROLL for (uint r = 0; r < SHARERS; ++r) {
          const float weight = scores[r][start + 4 * n];
          UNROLL for (uint c = 0; c < 4; ++c) mixed[r][c] += weight * value[c];
        }
      }
    }
  }
  BARRIER();
  if (quarter > 0) {
    UNROLL for (uint r = 0; r < SHARERS; ++r) {
      UNROLL for (uint c = 0; c < 4; ++c) others[quarter - 1][r][4 * columns + c] = mixed[r][c];
    }
  }
  BARRIER();
  const uint place = (split * steps + t) * HEADS + kv * SHARERS;
  if (quarter == 0) {
    UNROLL for (uint r = 0; r < SHARERS; ++r) {
      UNROLL for (uint c = 0; c < 4; ++c) {
        const uint column = 4 * columns + c;
        parts[(place + r) * D + column] =
          mixed[r][c] + others[0][r][column] + others[1][r][column] + others[2][r][column];
      }
    }
  }
  if (tid < SHARERS) {
    weights[2 * (place + tid)] = highest[tid];
    weights[2 * (place + tid) + 1] = totals[tid];
  }
""")
_JOIN = Template("""
  const uint head = block_x, t = block_y, steps = main_shape[0];
  float top = -1e30f, total = 0, mixed = 0;
  for (uint s = 0; s < $splits; ++s) top = max(top, weights[2 * ((s * steps + t) * HEADS + head)]);
  for (uint s = 0; s < $splits; ++s) {
    const uint place = (s * steps + t) * HEADS + head;
    const float weight = exp(weights[2 * place] - top);
    total += weight * weights[2 * place + 1];
    mixed += weight * parts[place * D + tid];
  }
  const float gate = float(main[t * WIDTH + (2 * head + 1) * D + tid]);
  y[(t * HEADS + head) * D + tid] = bf16(mixed / total / (1.0f + exp(-gate)));
""")


def split_heads(
    heads: Heads,
    main: mx.array,
    q_norm: mx.array,
    k_norm: mx.array,
    frequencies: mx.array,
    offset: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Map projections `main` [T, width] bfloat16 at position `offset` [1] int32 to q, k and v in bfloat16.

    q is [1, H, T, 256], k and v are [1, Hkv, T, 256]. Norms [256] and the `rope_frequencies` are float32.
    """
    steps = main.shape[0]
    of_queries, of_keys = ((1, n, steps, HEAD_DIM) for n in (heads.heads, heads.kv_heads))
    return tuple(  # pyright: ignore[reportReturnType]
        split_kernel(heads)(
            [main, q_norm, k_norm, frequencies, offset],
            blocks=(heads.heads + 2 * heads.kv_heads, steps, 1),
            results=[(of_queries, mx.bfloat16), (of_keys, mx.bfloat16), (of_keys, mx.bfloat16)],
        )
    )


def split_heads_into(
    heads: Heads,
    main: mx.array,
    q_norm: mx.array,
    k_norm: mx.array,
    frequencies: mx.array,
    turned: mx.array,
    offset: mx.array,
    found_at: mx.array,
) -> mx.array:
    """Do the same, but write keys and values into a cache from position `offset` [1] on; return q.

    `found_at` are the WORDS that describe the cache, `turned` [1] is the position of the rotation.
    """
    steps = main.shape[0]
    (q,) = split_kernel(heads, cached=True)(
        [main, q_norm, k_norm, frequencies, turned, offset, found_at],
        blocks=(heads.heads + 2 * heads.kv_heads, steps, 1),
        results=[((1, heads.heads, steps, HEAD_DIM), mx.bfloat16)],
    )
    return q


def attend(
    heads: Heads, main: mx.array, q: mx.array, keys: mx.array, values: mx.array, offset: mx.array
) -> mx.array:
    """Attend with q [1, H, T, 256] to the positions up to each query's own, and apply the output gate.

    `offset` [1] int32 is the first query's position, keys and values are [1, Hkv, capacity, 256], and the
    gates are in the projections `main` [T, width]. All but the offset are bfloat16. Returns [T, H * 256]
    bfloat16.
    """
    splits = split_count(keys.shape[2])
    kernel = attend_kernel(heads, splits)
    return _attend(heads, splits, kernel, main, q, [keys, values, offset])


def attend_at(
    heads: Heads, main: mx.array, q: mx.array, found_at: mx.array, offset: mx.array, splits: int
) -> mx.array:
    """Do what `attend` does over the cache that `found_at` describes, in so many splits."""
    kernel = attend_kernel(heads, splits, cached=True)
    return _attend(heads, splits, kernel, main, q, [found_at, offset])


def _attend(
    heads: Heads, splits: int, kernel: Kernel, main: mx.array, q: mx.array, cache: list[mx.array]
) -> mx.array:
    steps = q.shape[2]
    parts, weights = kernel(
        [q, *cache],
        blocks=(splits, heads.kv_heads, steps),
        results=[
            ((splits, steps, heads.heads, HEAD_DIM), mx.float32),
            ((splits, steps, heads.heads, 2), mx.float32),
        ],
    )
    (mixed,) = join_kernel(heads, splits)(
        [main, parts, weights],
        blocks=(heads.heads, steps, 1),
        results=[((steps, heads.heads * HEAD_DIM), mx.bfloat16)],
    )
    return mixed


@lru_cache(maxsize=2)
def position(offset: int) -> mx.array:
    """Return `offset` as an array [1] int32, one for all layers of a step."""
    return mx.array([offset], mx.int32)


def rope_frequencies(rotary: int, theta: float) -> mx.array:
    """Return the radians per position of each rotated pair, [rotary / 2] float32."""
    return mx.array([theta ** (-2 * i / rotary) for i in range(rotary // 2)], mx.float32)


def split_count(capacity: int) -> int:
    """Return the splits of a cache, a power of two so that growth seldom needs another kernel."""
    splits = 1
    while splits < MAX_SPLITS and splits * TILE < capacity:
        splits *= 2
    return splits


def _constants(heads: Heads) -> str:
    return _CONSTANTS.substitute(vars(heads), width=heads.width, tile=TILE, at_once=AT_ONCE)


@cache
def split_kernel(heads: Heads, *, cached: bool = False) -> Kernel:
    """Return the kernel that splits heads; `cached`, keys and values go into a cache that words describe."""
    inputs = ("main", "q_norm", "k_norm", "turns", "offset", *(("place", "found_at") if cached else ()))
    stride, start = ("uint(found_at[4])", "uint(place[0])") if cached else ("steps", "0")
    found = _FOUND.substitute(mutable="", first="k", second="v") if cached else ""
    parts = {"eps": f"{heads.norm_eps!r}f", "stride": stride, "start": start}
    body = found + _constants(heads) + _SPLIT.substitute(parts)
    return Kernel("split_heads", inputs, ("q",) if cached else ("q", "k", "v"), body, HEAD_DIM)


@cache
def attend_kernel(heads: Heads, splits: int, *, cached: bool = False) -> Kernel:
    """Return the kernel that attends in splits; `cached`, to a cache that words describe."""
    capacity = "uint(found_at[4])" if cached else "keys_shape[2]"
    found = _FOUND.substitute(mutable="const ", first="keys", second="values") if cached else ""
    body = found + _constants(heads) + _ATTEND.substitute(splits=splits, capacity=capacity)
    inputs = ("q", "found_at", "offset") if cached else ("q", "keys", "values", "offset")
    return Kernel("attend", inputs, ("parts", "weights"), body, HEAD_DIM, resident=2)


@cache
def join_kernel(heads: Heads, splits: int) -> Kernel:
    body = _constants(heads) + _JOIN.substitute(splits=splits)
    return Kernel("join_splits", ("main", "parts", "weights"), ("y",), body, HEAD_DIM)
