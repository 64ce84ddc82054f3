"""One kernel for products of up to MAX_FUSED_ROWS rows with a packed or bfloat16 weight, at memory speed.

A thread keeps its slot of the inputs in registers and walks down the rows of the weight. The kernel also does
the RMS norm of its inputs, silu(gate) * up of two weights, the residual, and the routing to and sum over
experts. Scales and sums are float32; products within a slot are halves, of inputs scaled into range.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from string import Template
from typing import Literal

from ..checkpoint.packed import Geometry
from ..machine.backend import mx
from .expert_routing import Router, choose_text
from .launch import Kernel
from .unpack import DENSE_WEIGHTS, WEIGHTS, load_text, scale_count, unpacking

LANES = 32
# the most threads of a block: for one row of input, 17,408 packed columns take one step
ONE_ROW_THREADS, MORE_ROWS_THREADS = 640, 256
MAX_FUSED_ROWS = 8
# more input rows would not fit in a thread's registers
INPUTS_AT_ONCE = 4

Experts = Literal["none", "each", "routed", "summed", "shared"]


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for.

    geometry: None for bfloat16. columns: K. rows: those of the input, rounded up to a power of two. sides: 2
    for silu(first) * second. adds: whether a residual is added. experts: `each` of `top` ids per row has a
    weight of its own, or they are `routed` by logits as `router` says, and the shared expert follows as the
    last of the stack; products of `top` rows are `summed` with shares; a `shared` expert has a share only.
    """

    geometry: Geometry | None
    columns: int
    rows: int = 1
    sides: int = 1
    norm_eps: float | None = None
    adds: bool = False
    experts: Experts = "none"
    top: int = 1
    router: Router | None = None

    @property
    def begins_early(self) -> bool:
        """Whether the first rows of weights are known, and can be loaded, before the inputs are there."""
        return self.experts in ("none", "shared")

    @property
    def slot(self) -> int:
        """Weights of a slot."""
        return WEIGHTS if self.geometry else DENSE_WEIGHTS

    @property
    def slots(self) -> int:
        """Slots of one row of weights, or of one row of each expert that is summed."""
        return self.columns // self.slot * (self.top if self.experts == "summed" else 1)


@dataclass(frozen=True)
class Tiling:
    """How the work is divided: `at_once` rows of weights in flight, `outputs` and `threads` of a block.

    `resident` blocks share a multiprocessor. With `prefetch`, rows load while the last ones are multiplied.
    """

    at_once: int
    outputs: int
    threads: int
    resident: int = 1
    prefetch: bool = True


# For one row of input, by bits of a weight: rows of weights at once, and warps of a multiprocessor. So about
# 40 KB are on their way from memory, and no register spills.
ONE_ROW = {2: (8, 20), 3: (8, 15), 4: (4, 20), 5: (4, 18), 6: (4, 16), 8: (2, 20), 16: (4, 24)}
# for more rows of input, by their number: inputs take the registers, and multiplying hides the loads
MORE_ROWS = {2: (4, 20), 4: (4, 10), 8: (4, 10)}
# of an H100 or H200, for which these numbers are; elsewhere the last wave of blocks may be smaller
MULTIPROCESSORS = 132
MAX_OUTPUTS = 96
SUMS_NBYTES = 28 << 10  # of the shared memory of a block: 32 KB on Metal, 48 KB on CUDA


def choose_tiling(shape: Shape, outputs: int, groups: int = 1) -> Tiling:
    """Return the tiling for `groups` times `outputs` rows of weights: blocks that end at the same time."""
    bits = shape.geometry.bits if shape.geometry else 16
    few = shape.rows == 1 or shape.geometry is None
    at_once, warps = ONE_ROW[bits] if few else MORE_ROWS[shape.rows]
    steps = -(-shape.slots // (ONE_ROW_THREADS if shape.rows == 1 else MORE_ROWS_THREADS))
    threads = -(-shape.slots // (steps * LANES)) * LANES
    resident = max(1, round(warps * LANES / threads))
    total = outputs * groups * max(shape.rows // INPUTS_AT_ONCE, 1)
    waves = -(-total // (MULTIPROCESSORS * resident * MAX_OUTPUTS))
    share = -(-total // (MULTIPROCESSORS * resident * waves))
    per_pass = at_once // shape.sides
    room = SUMS_NBYTES // (4 * threads // LANES * shape.sides * min(shape.rows, INPUTS_AT_ONCE))
    per_block = min(-(-share // per_pass), room // per_pass) * per_pass
    return Tiling(at_once, per_block, threads, resident, prefetch=shape.rows == 1)


_LOAD_ROWS = Template("""UNROLL for (uint r = 0; r < AT_ONCE; ++r) {
        const uint output = min(first + $turn * PER_PASS + r % PER_PASS, rows - 1);
        const uint at = (expert * rows + output) * PIECES + piece;
        $load
      }""")
_BODY = Template("""
  constexpr uint COLUMNS = $columns, SLOT = $slot, PIECES = COLUMNS / SLOT, SLOTS = $slots;
  constexpr uint INPUTS = $inputs, GROUPS = $groups, SIDES = $sides, TOP = $top;
  constexpr uint THREADS = $threads, STEPS = $steps;
  constexpr uint AT_ONCE = $at_once, PER_PASS = AT_ONCE / SIDES, OUTPUTS = $outputs;
  constexpr uint SUMS = AT_ONCE * INPUTS, PASSES = OUTPUTS / PER_PASS, WARPS = THREADS / 32;
  constexpr uint WORDS = $words, SCALES = $scales, CHAINS = $chains;
  SHARED float partial[WARPS][PASSES * SUMS];
  $declare_squares
  $route
  const uint rows = weight_shape[$rank - 2], first = block_x / GROUPS * OUTPUTS, warp = tid / 32;
  const uint base = block_x % GROUPS * INPUTS;  // neighbouring blocks read the same weights
  for (uint step = 0; step < STEPS; ++step) {
    const uint wanted = step * THREADS + tid;
    const bool inside = SLOTS % THREADS == 0 || wanted < SLOTS;
    const uint slot = inside ? wanted : SLOTS - 1;
    const uint place = slot / PIECES, piece = slot % PIECES;
    const uint expert = $expert;
    uint next_word[AT_ONCE][WORDS];
    $declare_next
    $load_first_rows
    $wait
    $declare_inputs
    UNROLL for (uint t = 0; t < INPUTS; ++t) {
      const uint row = $input_row;
      float value[SLOT];
      UNROLL for (uint i = 0; i < SLOT / 8; ++i) {
        uint4 four = {0, 0, 0, 0};
        if (inside && row < uint(x_shape[0]))
          four = ((const DEVICE uint4*)x)[(row * COLUMNS + piece * SLOT) / 8 + i];
        value[8 * i] = low_float(four.x); value[8 * i + 1] = high_float(four.x);
        value[8 * i + 2] = low_float(four.y); value[8 * i + 3] = high_float(four.y);
        value[8 * i + 4] = low_float(four.z); value[8 * i + 5] = high_float(four.z);
        value[8 * i + 6] = low_float(four.w); value[8 * i + 7] = high_float(four.w);
      }
      $change_inputs
      $keep_inputs
    }
    for (uint pass = 0; pass < PASSES; ++pass) {
      uint word[AT_ONCE][WORDS];
      $declare_scales
      $load_these_rows
      UNROLL for (uint r = 0; r < AT_ONCE; ++r) {
        UNROLL for (uint i = 0; i < WORDS; ++i) word[r][i] = next_word[r][i];
        $take_scales
      }
      $load_next_rows
      float sum[SUMS];
      UNROLL for (uint r = 0; r < AT_ONCE; ++r) {
        $multiply
      }
      // over the warp: in each round a lane gives away half of its sums, until it has one for all lanes
      UNROLL for (uint mask = 16, count = SUMS; mask > 0; mask /= 2, count = count > 1 ? count / 2 : 1) {
        const bool upper = lane & mask;
        UNROLL for (uint i = 0; i < (count > 1 ? count / 2 : 1); ++i) {
          const float other = count > 1 ? sum[i + count / 2] : sum[i];
          const float kept = upper ? other : sum[i], given = upper ? sum[i] : other;
          sum[i] = kept + lane_xor(given, mask);
        }
      }
      constexpr uint KEPT = SUMS > 32 ? SUMS / 32 : 1;
      UNROLL for (uint i = 0; i < KEPT; ++i) {
        const uint where = pass * SUMS + lane * SUMS / 32 + i;
        if (lane * SUMS % 32 == 0) $keep_sum
      }
    }
  }
  $keep_squares
  BARRIER();
  for (uint i = tid; i < OUTPUTS * INPUTS; i += THREADS) {
    const uint t = i % INPUTS, local = i / INPUTS, output = first + local, row = $output_row;
    const uint where = local / PER_PASS * SUMS + local % PER_PASS * INPUTS + t;
    float total[SIDES];
    UNROLL for (uint side = 0; side < SIDES; ++side) {
      total[side] = 0;
      UNROLL for (uint w = 0; w < WARPS; ++w) total[side] += partial[w][where + side * PER_PASS * INPUTS];
    }
    $change_output
    if (output < rows && row < $output_rows) y[row * rows + output] = $cast(total[0]);
  }
""")
_BEGIN_EARLY = """
#undef WAIT_FIRST
#define WAIT_FIRST() BEGIN_EARLY()
"""
_ROUTE = Template("""uint routed = 0;
  {
    const uint token = block_y / TOP, wanted = block_y % TOP;
    $choose
    routed = EXPERTS;  // the shared one is the last
    UNROLL for (uint n = 0; n < CHOSEN; ++n) if (n == wanted) routed = winner[n];
    if (block_x == 0 && wanted == 0 && tid == 0) {
      UNROLL for (uint n = 0; n < CHOSEN; ++n) {
        ids[token * TOP + n] = winner[n];
        shares[token * TOP + n] = odds[n] / divisor;
      }
      ids[token * TOP + CHOSEN] = EXPERTS;
      shares[token * TOP + CHOSEN] = gate;
    }
  }""")
_DENSE_MULTIPLY = """UNROLL for (uint t = 0; t < INPUTS; ++t) {
          float total = 0;
          UNROLL for (uint i = 0; i < WORDS; ++i) {
            total += low_float(word[r][i]) * input[t][2 * i] + high_float(word[r][i]) * input[t][2 * i + 1];
          }
          sum[r * INPUTS + t] = total;
        }"""
_PACKED_MULTIPLY = Template("""halves product[CHAINS][INPUTS];
        UNROLL for (uint i = 0; i < CHAINS; ++i)
          UNROLL for (uint t = 0; t < INPUTS; ++t) product[i][t] = make_halves(0.0f, 0.0f);
        $setup
        $pairs
        UNROLL for (uint t = 0; t < INPUTS; ++t) {
          float total = $bias;
          UNROLL for (uint i = 0; i < SCALES; ++i) {
            float coded = 0;
            UNROLL for (uint j = i * CHAINS / SCALES; j < (i + 1) * CHAINS / SCALES; ++j)
              coded += halves_low(product[j][t]) + halves_high(product[j][t]);
            total += (scale[r][i] * unit[t]) * coded;
          }
          sum[r * INPUTS + t] = total;
        }""")
_KEEP_PAIRS = Template("""float largest = 0;
      sums[t] = 0;
      UNROLL for (uint i = 0; i < SLOT; ++i) {
        largest = max(largest, fabs(value[i]));
        sums[t] += value[i];
      }
      const int exponent = min(max(int(float_bits(largest) >> 23) - 127, -100), 100);
      const float fit = bits_float(uint(127 + $input_exponent - exponent) << 23);
      unit[t] = bits_float(uint(127 + $exponent - $input_exponent + exponent) << 23);
      $pairs""")
_TAKE_SCALES = "UNROLL for (uint i = 0; i < SCALES; ++i) scale[r][i] = next_scale[r][i];"
_NORM_INPUTS = """UNROLL for (uint i = 0; i < SLOT / 4; ++i) {
        const float4 by = ((const DEVICE float4*)norm)[piece * SLOT / 4 + i];
        const float factor[4] = {by.x, by.y, by.z, by.w};
        UNROLL for (uint j = 0; j < 4; ++j) {
          square[t] += value[4 * i + j] * value[4 * i + j];
          value[4 * i + j] *= factor[j];
        }
      }"""
_NORM_OUTPUT = Template("""float squares = 0;
    UNROLL for (uint w = 0; w < WARPS; ++w) squares += square_sums[w][t];
    const float norm_factor = rsqrt(squares / COLUMNS + $eps);
    UNROLL for (uint side = 0; side < SIDES; ++side) total[side] *= norm_factor;""")


@cache
def matvec_kernel(shape: Shape, tiling: Tiling, rank: int, wide: bool = False) -> Kernel:
    """Return the kernel for weights of `rank` dimensions; `wide` results are float32, others bfloat16."""
    geometry = shape.geometry
    parts = {
        "columns": shape.columns,
        "slot": shape.slot,
        "slots": shape.slots,
        "inputs": min(shape.rows, INPUTS_AT_ONCE),
        "groups": max(shape.rows // INPUTS_AT_ONCE, 1),
        "sides": shape.sides,
        "top": shape.top,
        "rank": rank,
        "threads": tiling.threads,
        "steps": -(-shape.slots // tiling.threads),
        "at_once": tiling.at_once,
        "outputs": tiling.outputs,
        "words": geometry.bits if geometry else DENSE_WEIGHTS // 2,
        "chains": _chains(geometry),
        "scales": scale_count(geometry) if geometry else 1,
        "wait": "WAIT_FOR_INPUTS();" if shape.begins_early else "",
        "cast": "float" if wide else "bf16",
        "route": _ROUTE.substitute(choose=choose_text(shape.router)) if shape.router else "",
        **_indices(shape),
        **_changes(shape),
        **_loads(shape, tiling),
        **(_packed(geometry) if geometry else _dense()),
    }
    parts |= _accumulation(parts["steps"] > 1)
    name = f"matvec_{geometry.mode}{geometry.bits}" if geometry else "matvec_bf16"
    outputs = ("y", "ids", "shares") if shape.router else ("y",)
    body = _BODY.substitute(parts)
    helpers = _BEGIN_EARLY if shape.begins_early else ""
    return Kernel(name, tuple(_names(shape)), outputs, body, tiling.threads, helpers, tiling.resident)


def _chains(geometry: Geometry | None) -> int:
    """Return the number of sums of halves per slot: two round less than one, which is faster with 2 bits."""
    return 1 if geometry and geometry.bits == 2 else 2


def _names(shape: Shape) -> list[str]:
    """Return the names of the kernel's inputs in order."""
    names = ["x"]
    for side in range(shape.sides):
        names += [f"{name}{side or ''}" for name in _arrays(shape.geometry)]
    names += ["norm"] if shape.norm_eps is not None else []
    names += ["add"] if shape.adds else []
    return names + _ROUTING[shape.experts]


_ROUTING: Mapping[Experts, list[str]] = {
    "none": [],
    "each": ["ids"],
    "routed": ["logits"],
    "summed": ["ids", "shares"],
    "shared": ["shares"],
}


def _arrays(geometry: Geometry | None) -> tuple[str, ...]:
    if geometry is None:
        return ("weight",)
    return ("weight", "scales", "biases") if geometry.mode == "affine" else ("weight", "scales")


def _indices(shape: Shape) -> dict[str, str]:
    """Return the expressions of the expert, the row of the input and the row of the result."""
    if shape.experts == "none":
        rows = "uint(x_shape[0])"
        return {"expert": "0", "input_row": "base + t", "output_row": "base + t", "output_rows": rows}
    place = "block_y * TOP + place"
    expert, row = {
        "each": ("uint(ids[block_y])", "block_y / TOP"),
        "routed": ("routed", "block_y / TOP"),
        "summed": (f"uint(ids[{place}])", place),
        "shared": ("0", place),
    }[shape.experts]
    return {"expert": expert, "input_row": row, "output_row": "block_y", "output_rows": "block_y + 1"}


def _changes(shape: Shape) -> dict[str, str]:
    """Return what happens to inputs before the product and to outputs after it."""
    before, after = [], []
    squares = {"declare_squares": "", "keep_squares": ""}
    if shape.norm_eps is not None:
        before.append(_NORM_INPUTS)
        after.append(_NORM_OUTPUT.substitute(eps=f"{shape.norm_eps!r}f"))
        squares["declare_squares"] = (
            "SHARED float square_sums[WARPS][INPUTS];\n"
            "  float square[INPUTS];\n"
            "  UNROLL for (uint t = 0; t < INPUTS; ++t) square[t] = 0;"
        )
        squares["keep_squares"] = (
            "UNROLL for (uint t = 0; t < INPUTS; ++t) {\n"
            "    const float all = lanes_sum(square[t]);\n"
            "    if (lane == 0) square_sums[warp][t] = all;\n"
            "  }"
        )
    if shape.experts in ("summed", "shared"):
        before.append("UNROLL for (uint i = 0; i < SLOT; ++i) value[i] *= shares[row];")
    if shape.sides == 2:
        after.append("total[0] = total[0] / (1.0f + exp(-total[0])) * total[1];")
    if shape.adds:
        after.append("if (output < rows && row < $output_rows) total[0] += float(add[row * rows + output]);")
    after_text = Template("\n    ".join(after)).substitute(_indices(shape))
    return {"change_inputs": "\n      ".join(before), "change_output": after_text, **squares}


def _accumulation(again: bool) -> dict[str, str]:
    """Return how to keep a sum; with `again`, several steps add to it."""
    if not again:
        return {"keep_sum": "partial[warp][where] = sum[i];"}
    return {"keep_sum": "partial[warp][where] = step == 0 ? sum[i] : partial[warp][where] + sum[i];"}


def _loads(shape: Shape, tiling: Tiling) -> dict[str, str]:
    """Return the text that loads the first rows, those of a pass, and those of the next pass."""
    load = load_text(shape.geometry, into="next_")
    if shape.sides == 2:
        load = (
            f"if (r < PER_PASS) {{ {load} }} else {{ {load_text(shape.geometry, into='next_', side='1')} }}"
        )
    first, these, after = (
        _LOAD_ROWS.substitute(turn=turn, load=load) for turn in ("0", "pass", "(pass + 1)")
    )
    if not tiling.prefetch:
        return {"load_first_rows": "", "load_these_rows": these, "load_next_rows": ""}
    after = f"if (pass + 1 < PASSES) {{ {after} }}"
    return {"load_first_rows": first, "load_these_rows": "", "load_next_rows": after}


def _declare_scales(prefix: str, affine: bool) -> str:
    bias = f", {prefix}bias[AT_ONCE]" if affine else ""
    return f"float {prefix}scale[AT_ONCE][SCALES]{bias};"


def _dense() -> dict[str, str]:
    return {
        "declare_inputs": "float input[INPUTS][SLOT];",
        "keep_inputs": "UNROLL for (uint i = 0; i < SLOT; ++i) input[t][i] = value[i];",
        "declare_scales": "",
        "declare_next": "",
        "take_scales": "",
        "multiply": _DENSE_MULTIPLY,
    }


def _packed(geometry: Geometry) -> dict[str, str]:
    code, affine = unpacking(geometry), geometry.mode == "affine"
    lines = []
    for place, pair in enumerate(code.pairs):
        chain = place * 2 * _chains(geometry) // WEIGHTS
        lines.append(
            f"{{ const halves code = bits_halves({pair.text}); UNROLL for (uint t = 0; t < INPUTS; ++t)"
            f" product[{chain}][t] = halves_fma(code, input[t][{place}], product[{chain}][t]); }}"
        )
    setup = code.setup.replace("word[", "word[r][")
    pairs = "\n        ".join(lines).replace("word[", "word[r][")
    keep = []
    for place, pair in enumerate(code.pairs):
        fit = f"(fit * {0.5**pair.shift!r}f)"
        keep.append(
            f"input[t][{place}] = make_halves(value[{pair.low}] * {fit}, value[{pair.high}] * {fit});"
        )
    return {
        "declare_inputs": f"halves input[INPUTS][{WEIGHTS // 2}];\n    float sums[INPUTS], unit[INPUTS];",
        "keep_inputs": _KEEP_PAIRS.substitute(
            pairs="\n      ".join(keep), exponent=code.exponent, input_exponent=code.input_exponent
        ),
        "declare_scales": _declare_scales("", affine),
        "declare_next": _declare_scales("next_", affine),
        "take_scales": _TAKE_SCALES + (" bias[r] = next_bias[r];" if affine else ""),
        "multiply": _PACKED_MULTIPLY.substitute(
            setup=setup, pairs=pairs, bias="bias[r] * sums[t]" if affine else "0"
        ),
    }


def run_matvec(
    shape: Shape,
    x: mx.array,
    weights: Sequence[Sequence[mx.array]],
    extras: Sequence[mx.array] = (),
    *,
    wide: bool = False,
    tiling: Tiling | None = None,
) -> list[mx.array]:
    """Multiply x [R, K] bfloat16 with one or two weights, each the arrays of `Packed` or one [..., N, K].

    extras: those that `shape` needs of norm [K] float32, residual [R, N], router's logits [R, E + 1] float32,
    ids and shares [R * top]. Returns [R, N], float32 if `wide`, else bfloat16; with experts `each` or
    `routed`, one row per expert; with `routed` also the ids and shares [R * top] that it found.
    """
    weight = weights[0][0]
    outputs = weight.shape[-2]
    rows, groups = x.shape[0], 1
    if shape.experts in ("each", "routed"):
        rows = groups = x.shape[0] * shape.top
    elif shape.experts != "none":
        rows = groups = x.shape[0] // shape.top
    tiling = tiling or choose_tiling(shape, outputs, groups)
    blocks = -(-outputs // tiling.outputs) * max(shape.rows // INPUTS_AT_ONCE, 1)
    found = [((rows,), mx.uint32), ((rows,), mx.float32)] if shape.router else []
    return matvec_kernel(shape, tiling, weight.ndim, wide)(
        [x, *(array for side in weights for array in side), *extras],
        blocks=(blocks, groups, 1),
        results=[((rows, outputs), mx.float32 if wide else mx.bfloat16), *found],
    )
