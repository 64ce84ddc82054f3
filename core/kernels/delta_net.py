"""Kernels of the gated delta net between its projections: one for a few positions, three for a prompt.

`delta_steps` keeps the state in registers through convolution, SiLU, normalised queries and keys, decay and
beta, the delta rule, and the gated norm. It may begin with the two small products behind decay and beta, of
which each head reads two rows. For a prompt `delta_mix` does what comes before the rule for all positions at
once, `delta_walk` runs the rule along them, several lanes to a column of the state, and `delta_norm` ends.
Equations are those of `ops.gated_delta_reference`; sums are float32.
"""

from dataclasses import dataclass
from functools import cache
from string import Template

from ..machine.backend import mx
from .launch import Kernel

MAX_STEPS = 8
LANES = 32
STEP_WARPS = 16  # of a block of `delta_steps`, which is one head
WALK_WARPS, WALK_LANES = 4, 8  # warps of a block of `delta_walk`; lanes to a column of the state
WALK_COLUMNS = WALK_WARPS * LANES // WALK_LANES  # columns of a block
NORM_WARPS = 8
WALK_STEPS = 16  # positions that `delta_walk` has in shared memory at a time
EPS = 1e-6  # of the normalised queries and keys


@dataclass(frozen=True)
class Net:
    """Sizes of one delta net and the layout of its projections.

    A row of `main` [T, main_width] begins with q | k | v and has z from column `z_at` on; a row of `ab`
    [T, ab_width] has a from column `a_at` on, then b.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    norm_eps: float
    main_width: int
    z_at: int
    ab_width: int
    a_at: int

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


_CONSTANTS = Template("""
  constexpr uint KEY_HEADS = $key_heads, VALUE_HEADS = $value_heads, DK = $key_dim, DV = $value_dim;
  constexpr uint TAPS = $taps, CHANNELS = $channels, KEYS = KEY_HEADS * DK, SHARERS = VALUE_HEADS / KEY_HEADS;
  constexpr uint MAIN = $main_width, Z_AT = $z_at, AB = $ab_width, A_AT = $a_at;
  const uint steps = main_shape[0];
""")
# WINDOW reads one channel of the convolution's input: the state before the first position, then `main`
_HELPERS = """
#define WINDOW(position, channel) float((position) < TAPS - 1 \\
  ? conv[(position) * CHANNELS + (channel)] : main[((position) - (TAPS - 1)) * MAIN + (channel)])
"""
_DECAY = """
  const float shifted = $a + dt_bias[$head];
  const float softplus = max(shifted, 0.0f) + log(1.0f + exp(-fabs(shifted)));
  $decay = exp(-exp(log_a[$head]) * softplus);
  $beta = 1.0f / (1.0f + exp(-$b));
"""
# a and b of `head` are norm(x) times two rows of `gates`: warps leave their shares of both, and of the norm,
# in `sums`, which no one uses yet
_GATES = Template("""
  constexpr uint PAIRS = $hidden / 2;
  for (uint t = 0; t < steps; ++t) {
    float of_a = 0, of_b = 0, square = 0;
    for (uint i = tid; i < PAIRS; i += THREADS) {
      const uint two = ((const DEVICE uint*)x)[t * PAIRS + i];
      const uint a = ((const DEVICE uint*)gates)[head * PAIRS + i];
      const uint b = ((const DEVICE uint*)gates)[(VALUE_HEADS + head) * PAIRS + i];
      const float low = low_float(two), high = high_float(two);
      square += low * low + high * high;
      const float first = low * entry[2 * i], second = high * entry[2 * i + 1];
      of_a += first * low_float(a) + second * high_float(a);
      of_b += first * low_float(b) + second * high_float(b);
    }
    of_a = lanes_sum(of_a); of_b = lanes_sum(of_b); square = lanes_sum(square);
    if (lane == 0) {
      sums[0][warp][3 * t] = of_a; sums[0][warp][3 * t + 1] = of_b; sums[0][warp][3 * t + 2] = square;
    }
  }
  BARRIER();
  if (tid < steps) {
    float of_a = 0, of_b = 0, square = 0;
    UNROLL for (uint w = 0; w < WARPS; ++w) {
      of_a += sums[0][w][3 * tid]; of_b += sums[0][w][3 * tid + 1]; square += sums[0][w][3 * tid + 2];
    }
    const float by = rsqrt(square / $hidden + $eps);
    $decay
  }
""")
_STEPS = Template("""
  constexpr uint WARPS = $warps, THREADS = WARPS * 32, OWN = DK / WARPS, COLUMNS = DV / 32;
  constexpr uint WIDTH = 2 * DK + DV;
  SHARED float mixed[$max_steps][WIDTH];
  SHARED float sums[2][WARPS][DV];
  SHARED float decays[$max_steps], betas[$max_steps], overlaps[$max_steps];
  const uint head = block_x, key_head = head / SHARERS, warp = tid / 32, kept = EVERY ? steps : 1;
  // of the state: this warp's rows, of which each lane has some columns
  float held[OWN][COLUMNS];
  UNROLL for (uint i = 0; i < OWN; ++i)
    UNROLL for (uint j = 0; j < COLUMNS; ++j)
      held[i][j] = state[(head * DK + warp * OWN + i) * DV + j * 32 + lane];
  for (uint i = tid; i < (steps + TAPS - 1) * WIDTH; i += THREADS) {
    const uint t = i / WIDTH, c = i % WIDTH;
    const uint channel = c < DK ? key_head * DK + c : c < 2 * DK ? KEYS + key_head * DK + c - DK
      : 2 * KEYS + head * DV + c - 2 * DK;
    if (t < steps) {
      float total = 0;
      UNROLL for (uint tap = 0; tap < TAPS; ++tap)
        total += WINDOW(t + tap, channel) * float(taps[tap * CHANNELS + channel]);
      mixed[t][c] = total / (1.0f + exp(-total));
    }
    // of the heads that share a key head the first writes its convolution's state
    if (c >= 2 * DK || head % SHARERS == 0) {
      for (uint s = 0; s < kept; ++s) {
        const uint first = EVERY ? s + 1 : steps;
        if (t >= first && t < first + TAPS - 1)
          new_conv[(s * (TAPS - 1) + t - first) * CHANNELS + channel] = bf16(WINDOW(t, channel));
      }
    }
  }
  $decays
  BARRIER();
  for (uint t = warp; t < steps; t += WARPS) {
    float of_query = 0, of_key = 0, of_both = 0;
    for (uint i = lane; i < DK; i += 32) {
      const float q = mixed[t][i], k = mixed[t][DK + i];
      of_query += q * q; of_key += k * k; of_both += q * k;
    }
    const float by_query = rsqrt(lanes_sum(of_query) + $eps) * rsqrt(float(DK));
    const float by_key = rsqrt(lanes_sum(of_key) + $eps);
    const float overlap = lanes_sum(of_both) * by_query * by_key;
    for (uint i = lane; i < DK; i += 32) { mixed[t][i] *= by_query; mixed[t][DK + i] *= by_key; }
    if (lane == 0) overlaps[t] = overlap;
  }
  BARRIER();
  for (uint t = 0; t < steps; ++t) {
    // what the state before this step says of the query and of the key
    UNROLL for (uint j = 0; j < COLUMNS; ++j) {
      float of_query = 0, of_key = 0;
      UNROLL for (uint i = 0; i < OWN; ++i) {
        of_query += held[i][j] * mixed[t][warp * OWN + i];
        of_key += held[i][j] * mixed[t][DK + warp * OWN + i];
      }
      sums[0][warp][j * 32 + lane] = of_query;
      sums[1][warp][j * 32 + lane] = of_key;
    }
    float value[COLUMNS];
    UNROLL for (uint j = 0; j < COLUMNS; ++j) value[j] = mixed[t][2 * DK + j * 32 + lane];
    BARRIER();
    const float decay = decays[t];
    UNROLL for (uint j = 0; j < COLUMNS; ++j) {
      float of_query = 0, of_key = 0;
      UNROLL for (uint w = 0; w < WARPS; ++w) {
        of_query += sums[0][w][j * 32 + lane];
        of_key += sums[1][w][j * 32 + lane];
      }
      const float delta = betas[t] * (value[j] - decay * of_key);
      UNROLL for (uint i = 0; i < OWN; ++i)
        held[i][j] = held[i][j] * decay + mixed[t][DK + warp * OWN + i] * delta;
      // the value's place is free for the output: every warp has read it before the barrier
      if (warp == 0) mixed[t][2 * DK + j * 32 + lane] = decay * of_query + overlaps[t] * delta;
    }
    if (EVERY || t + 1 == steps) {
      UNROLL for (uint i = 0; i < OWN; ++i)
        UNROLL for (uint j = 0; j < COLUMNS; ++j) {
          const uint row = ((EVERY ? t : 0) * VALUE_HEADS + head) * DK + warp * OWN + i;
          new_state[row * DV + j * 32 + lane] = held[i][j];
        }
    }
    BARRIER();
  }
  for (uint t = warp; t < steps; t += WARPS) {
    float square = 0;
    for (uint j = lane; j < DV; j += 32) square += mixed[t][2 * DK + j] * mixed[t][2 * DK + j];
    const float by = rsqrt(lanes_sum(square) / DV + $norm_eps);
    for (uint j = lane; j < DV; j += 32) {
      const float z = float(main[t * MAIN + Z_AT + head * DV + j]);
      const float normal = mixed[t][2 * DK + j] * by * norm[j];
      y[(t * VALUE_HEADS + head) * DV + j] = bf16(normal * z / (1.0f + exp(-z)));
    }
  }
""")
_MIX = Template("""
  // a block is a head's channels at one position: of queries, of keys, then of values
  const uint t = block_x, part = block_y;
  const bool is_query = part < KEY_HEADS, is_key = !is_query && part < 2 * KEY_HEADS;
  const uint dim = is_query || is_key ? DK : DV;
  const uint from = is_query || is_key ? part * DK : 2 * KEYS + (part - 2 * KEY_HEADS) * DV;
  SHARED float squares[$threads / 32];
  float total = 0;
  if (tid < dim) {
    UNROLL for (uint tap = 0; tap < TAPS; ++tap)
      total += WINDOW(t + tap, from + tid) * float(taps[tap * CHANNELS + from + tid]);
    total = total / (1.0f + exp(-total));
  }
  const float square = lanes_sum(total * total);
  if (lane == 0) squares[tid / 32] = square;
  BARRIER();
  float all = 0;
  UNROLL for (uint w = 0; w < $threads / 32; ++w) all += squares[w];
  if (is_query || is_key) total *= rsqrt(all + $eps);
  if (tid < dim) {
    if (is_query) q[t * KEYS + from + tid] = total * rsqrt(float(DK));
    else if (is_key) k[t * KEYS + from - KEYS + tid] = total;
    else v[t * VALUE_HEADS * DV + from - 2 * KEYS + tid] = total;
  }
  if (tid == 0 && part >= 2 * KEY_HEADS) {
    const uint head = part - 2 * KEY_HEADS;
    $decay
  }
""")
_WALK = Template("""
  constexpr uint WARPS = $warps, SHARE = $lanes, STRETCH = $stretch;
  constexpr uint OWN = DK / SHARE, PER_WARP = 32 / SHARE, PER_BLOCK = WARPS * PER_WARP, THREADS = WARPS * 32;
  const uint head = block_y, key_head = head / SHARERS;
  const uint within = tid / SHARE, column = block_x * PER_BLOCK + within, part = lane % SHARE;
  SHARED float4 queries[STRETCH][DK / 4], keys[STRETCH][DK / 4];
  SHARED float values[STRETCH][PER_BLOCK], rates[STRETCH][2];
  // this lane's rows are those with row / 4 % SHARE == part, so that neighbours read neighbours
  float held[OWN];
  UNROLL for (uint i = 0; i < OWN; ++i)
    held[i] = state[(head * DK + (i / 4 * SHARE + part) * 4 + i % 4) * DV + column];
  for (uint begin = 0; begin < steps; begin += STRETCH) {
    const uint here = min(STRETCH, steps - begin);
    BARRIER();
    for (uint i = tid; i < here * DK / 4; i += THREADS) {
      const uint s = i / (DK / 4), c = i % (DK / 4);
      queries[s][c] = ((const DEVICE float4*)q)[((begin + s) * KEY_HEADS + key_head) * (DK / 4) + c];
      keys[s][c] = ((const DEVICE float4*)k)[((begin + s) * KEY_HEADS + key_head) * (DK / 4) + c];
    }
    for (uint i = tid; i < here * PER_BLOCK; i += THREADS)
      values[i / PER_BLOCK][i % PER_BLOCK] =
        v[((begin + i / PER_BLOCK) * VALUE_HEADS + head) * DV + block_x * PER_BLOCK + i % PER_BLOCK];
    for (uint i = tid; i < here; i += THREADS) {
      rates[i][0] = decay[(begin + i) * VALUE_HEADS + head];
      rates[i][1] = beta[(begin + i) * VALUE_HEADS + head];
    }
    BARRIER();
    for (uint s = 0; s < here; ++s) {
      float key[OWN], of_query[4] = {0, 0, 0, 0}, of_key[4] = {0, 0, 0, 0}, of_both[4] = {0, 0, 0, 0};
      UNROLL for (uint i = 0; i < OWN / 4; ++i) {
        const float4 a = queries[s][i * SHARE + part], b = keys[s][i * SHARE + part];
        const float query[4] = {a.x, a.y, a.z, a.w};
        key[4 * i] = b.x; key[4 * i + 1] = b.y; key[4 * i + 2] = b.z; key[4 * i + 3] = b.w;
        UNROLL for (uint j = 0; j < 4; ++j) {
          of_query[j] += held[4 * i + j] * query[j];
          of_key[j] += held[4 * i + j] * key[4 * i + j];
          of_both[j] += query[j] * key[4 * i + j];
        }
      }
      float query_sum = of_query[0] + of_query[1] + of_query[2] + of_query[3];
      float key_sum = of_key[0] + of_key[1] + of_key[2] + of_key[3];
      float both_sum = of_both[0] + of_both[1] + of_both[2] + of_both[3];
      UNROLL for (uint mask = SHARE / 2; mask > 0; mask /= 2) {
        query_sum += lane_xor(query_sum, mask);
        key_sum += lane_xor(key_sum, mask);
        both_sum += lane_xor(both_sum, mask);
      }
      const float rate = rates[s][0], delta = rates[s][1] * (values[s][within] - rate * key_sum);
      UNROLL for (uint i = 0; i < OWN; ++i) held[i] = held[i] * rate + key[i] * delta;
      if (part == 0)
        y[((begin + s) * VALUE_HEADS + head) * DV + column] = rate * query_sum + both_sum * delta;
    }
  }
  UNROLL for (uint i = 0; i < OWN; ++i)
    new_state[(head * DK + (i / 4 * SHARE + part) * 4 + i % 4) * DV + column] = held[i];
""")
_GATED_NORM = Template("""
  // a warp is one head's output at one position
  const uint place = block_x * $warps + tid / 32, t = place / VALUE_HEADS, head = place % VALUE_HEADS;
  if (t < steps) {
    float square = 0;
    for (uint j = lane; j < DV; j += 32) square += x[place * DV + j] * x[place * DV + j];
    const float by = rsqrt(lanes_sum(square) / DV + $norm_eps);
    for (uint j = lane; j < DV; j += 32) {
      const float z = float(main[t * MAIN + Z_AT + head * DV + j]);
      y[place * DV + j] = bf16(x[place * DV + j] * by * norm[j] * z / (1.0f + exp(-z)));
    }
  }
""")


@dataclass(frozen=True)
class Gates:
    """The rows [2 * Hv, hidden] bfloat16 that make a and b, and the norm [hidden] float32 of their input."""

    rows: mx.array
    norm: mx.array
    eps: float


def fits(net: Net) -> bool:
    """Whether the kernels' blocks divide the heads of this net."""
    return (
        net.value_heads % net.key_heads == 0
        and net.key_dim % (4 * WALK_LANES) == 0
        and net.key_dim % STEP_WARPS == 0
        and net.value_dim % LANES == 0
        and net.value_dim % WALK_COLUMNS == 0
        and net.taps > 1
    )


@dataclass(frozen=True)
class DeltaKernels:
    """The kernels with one layer's parameters.

    taps [K, channels] are bfloat16; log_a and dt_bias [Hv] and norm [Dv] are float32.
    """

    net: Net
    taps: mx.array
    log_a: mx.array
    dt_bias: mx.array
    norm: mx.array

    def __call__(
        self, main: mx.array, ab: mx.array, conv: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return outputs [T, Hv * Dv], and the convolution's and the recurrent state after them, for any T.

        The projections main [T, main_width] and ab [T, ab_width], conv [1, K-1, channels] and the outputs are
        bfloat16; state [1, Hv, Dk, Dv] is float32.
        """
        if main.shape[0] <= MAX_STEPS:
            return self.steps(main, ab, conv, state)
        return self.prompt(main, ab, conv, state)

    def steps(
        self, main: mx.array, ab: mx.array, conv: mx.array, state: mx.array, *, every: bool = False
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Do the same for at most MAX_STEPS positions.

        With `every`, states after each position are returned, along their first axis.
        """
        return self._run(steps_kernel(self.net, every), [ab], main, conv, state, every)

    def steps_of(
        self,
        main: mx.array,
        x: mx.array,
        gates: Gates,
        conv: mx.array,
        state: mx.array,
        *,
        every: bool = False,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Do the same as `steps` with a and b of x [T, hidden] bfloat16, the layer's input."""
        kernel = steps_kernel(self.net, every, (x.shape[-1], gates.eps))
        return self._run(kernel, [x, gates.rows, gates.norm], main, conv, state, every)

    def _run(
        self,
        kernel: Kernel,
        of_ab: list[mx.array],
        main: mx.array,
        conv: mx.array,
        state: mx.array,
        every: bool,
    ) -> tuple[mx.array, mx.array, mx.array]:
        net, steps = self.net, main.shape[0]
        kept = steps if every else 1
        y, conv, state = kernel(
            [main, *of_ab, conv, state, self.taps, self.log_a, self.dt_bias, self.norm],
            blocks=(net.value_heads, 1, 1),
            results=[
                ((steps, net.value_heads * net.value_dim), mx.bfloat16),
                ((kept, net.taps - 1, net.channels), mx.bfloat16),
                ((kept, net.value_heads, net.key_dim, net.value_dim), mx.float32),
            ],
        )
        return y, conv, state

    def prompt(
        self, main: mx.array, ab: mx.array, conv: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Do the same for more positions than there are taps."""
        net, steps, heads = self.net, main.shape[0], self.net.value_heads
        widest = -(-max(net.key_dim, net.value_dim) // LANES) * LANES
        q, k, v, decay, beta = mix_kernel(net, widest)(
            [main, ab, conv, self.taps, self.log_a, self.dt_bias],
            blocks=(steps, 2 * net.key_heads + heads, 1),
            results=[
                *[((steps, net.key_heads * net.key_dim), mx.float32)] * 2,
                ((steps, heads * net.value_dim), mx.float32),
                *[((steps, heads), mx.float32)] * 2,
            ],
        )
        y, state = walk_kernel(net)(
            [main, q, k, v, decay, beta, state],
            blocks=(net.value_dim // WALK_COLUMNS, heads, 1),
            results=[((steps, heads * net.value_dim), mx.float32), (state.shape, mx.float32)],
        )
        (output,) = norm_kernel(net)(
            [main, y, self.norm],
            blocks=(-(-steps * heads // NORM_WARPS), 1, 1),
            results=[(y.shape, mx.bfloat16)],
        )
        # the tail is copied: a slice would keep all projections alive
        return output, mx.contiguous(main[None, 1 - net.taps :, : net.channels]), state


def _constants(net: Net) -> str:
    return _CONSTANTS.substitute(vars(net) | {"channels": net.channels})


@cache
def steps_kernel(net: Net, every: bool, gated: tuple[int, float] | None = None) -> Kernel:
    """Return the kernel for a few positions; `gated` are width and eps of `Gates`, None if ab is given."""
    parts = {"warps": STEP_WARPS, "max_steps": MAX_STEPS, "eps": f"{EPS}f", "norm_eps": f"{net.norm_eps!r}f"}
    body = _constants(net) + f"  constexpr bool EVERY = {str(every).lower()};\n"
    if gated is None:
        inputs, decays = ("ab",), f"if (tid < steps) {{ {_decay_text('tid', 'decays[tid]', 'betas[tid]')} }}"
    else:
        inputs = ("x", "gates", "entry")
        decay = _decay_text("tid", "decays[tid]", "betas[tid]", a="(of_a * by)", b="(of_b * by)")
        decays = _GATES.substitute(hidden=gated[0], eps=f"{gated[1]!r}f", decay=decay)
    return Kernel(
        "delta_steps",
        ("main", *inputs, "conv", "state", "taps", "log_a", "dt_bias", "norm"),
        ("y", "new_conv", "new_state"),
        body + _STEPS.substitute(parts, decays=decays),
        STEP_WARPS * LANES,
        _HELPERS,
    )


def _decay_text(t: str, decay: str, beta: str, *, a: str = "", b: str = "") -> str:
    """Return text that assigns decay and beta of `head` at `t`; a and b are read from `ab` unless given."""
    a = a or f"float(ab[{t} * AB + A_AT + head])"
    b = b or f"float(ab[{t} * AB + A_AT + VALUE_HEADS + head])"
    return Template(_DECAY).substitute(head="head", decay=decay, beta=beta, a=a, b=b)


@cache
def mix_kernel(net: Net, threads: int) -> Kernel:
    place = "t * VALUE_HEADS + head"
    decay = _decay_text("t", f"decay[{place}]", f"beta[{place}]")
    return Kernel(
        "delta_mix",
        ("main", "ab", "conv", "taps", "log_a", "dt_bias"),
        ("q", "k", "v", "decay", "beta"),
        _constants(net) + _MIX.substitute(threads=threads, eps=f"{EPS}f", decay=decay),
        threads,
        _HELPERS,
    )


@cache
def walk_kernel(net: Net) -> Kernel:
    parts = {"warps": WALK_WARPS, "lanes": WALK_LANES, "stretch": WALK_STEPS}
    inputs = ("main", "q", "k", "v", "decay", "beta", "state")
    body = _constants(net) + _WALK.substitute(parts)
    return Kernel("delta_walk", inputs, ("y", "new_state"), body, WALK_WARPS * LANES)


@cache
def norm_kernel(net: Net) -> Kernel:
    body = _GATED_NORM.substitute(warps=NORM_WARPS, norm_eps=f"{net.norm_eps!r}f")
    return Kernel("delta_norm", ("main", "x", "norm"), ("y",), _constants(net) + body, NORM_WARPS * LANES)
