"""The forms of the gated delta rule on this device, each against the reference and the clock, in one table.

`MLX_ENABLE_TF32=0 PYTHONPATH=.dev python tests/gpu/delta_forms.py [--lengths 1 8 512]`. Times are those of
one layer of Qwen3.6-27B. "fused" is `kernels.delta_net`, which also does the convolution, norms and gates
around the rule, so its time contains them. Ends with exit code 1 where a form is off by more than LIMIT.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

from qchat.core.kernels.delta_net import DeltaKernels, Net
from qchat.core.kernels.launch import backend
from qchat.core.machine.backend import mx, on_gpu
from qchat.core.ops.elementwise import l2_normalise
from qchat.core.ops.gated_delta import CPU_CHUNK, GPU_CHUNK, delta_chunks, delta_mlx, delta_step
from qchat.core.ops.gated_delta_reference import gated_delta_rule

LIMIT = 2e-5
KEY_HEADS, VALUE_HEADS, DIM, TAPS = 16, 48, 128, 4
REPEATS = (1, 2, 3, 4)
SHORT = 16  # up to so many tokens the reference is timed, too

Arguments = tuple[mx.array, ...]
Form = Callable[..., tuple[mx.array, mx.array]]


def draw(length: int, key_heads: int, repeats: int, dim: int) -> Arguments:
    """q, k, v, log decays, betas and a state of one layer, float32."""
    heads = key_heads * repeats
    q, k = (l2_normalise(mx.random.normal((1, length, key_heads, dim))) for _ in range(2))
    g, beta = (mx.random.normal((1, length, heads)) for _ in range(2))
    v, state = mx.random.normal((1, length, heads, dim)), mx.random.normal((1, heads, dim, dim))
    arguments = q * dim**-0.5, k, v, -0.1 * mx.abs(g), mx.sigmoid(beta), state
    mx.eval(arguments)
    return arguments


def forms(length: int) -> dict[str, Form]:
    chunk = GPU_CHUNK if on_gpu() else CPU_CHUNK
    chunked: Form = delta_step if length == 1 else lambda *given: delta_chunks(*given, chunk=chunk)
    return {"chunked": chunked, "mlx": delta_mlx}


def relative_rms(found: mx.array, wanted: mx.array) -> float:
    return float(mx.sqrt(mx.square(found - wanted).mean() / mx.square(wanted).mean()))


def milliseconds(work: Callable[..., object], *arguments: object) -> float:
    """The median of several runs, the first one left out."""
    times = []
    for _ in range(9):
        begun = time.perf_counter()
        mx.eval(work(*arguments))
        times.append(1e3 * (time.perf_counter() - begun))
    return sorted(times[1:])[4]


def fused(length: int) -> Callable[[], object] | None:
    """One call of our kernels on random projections; None where they do not run."""
    if backend() is None:
        return None
    channels = (2 * KEY_HEADS + VALUE_HEADS) * DIM
    width = channels + VALUE_HEADS * DIM
    net = Net(KEY_HEADS, VALUE_HEADS, DIM, DIM, TAPS, 1e-6, width, channels, 2 * VALUE_HEADS, 0)
    taps, vectors = mx.random.normal((TAPS, channels)).astype(mx.bfloat16), mx.ones(VALUE_HEADS)
    kernels = DeltaKernels(net, taps, vectors, vectors, mx.ones(DIM))
    shapes = (length, width), (length, 2 * VALUE_HEADS), (1, TAPS - 1, channels)
    main, ab, conv = (mx.random.normal(shape).astype(mx.bfloat16) for shape in shapes)
    state = mx.random.normal((1, VALUE_HEADS, DIM, DIM))
    mx.eval(main, ab, conv, state)
    return lambda: kernels(main, ab, conv, state)


def compare(lengths: list[int]) -> float:
    """Print the largest error of each form for each length over all head ratios; return the worst."""
    worst = 0.0
    print(
        f"{'error, tokens':16}" + "".join(f"{f'Hv/Hk {r}: {name}':>20}" for r in REPEATS for name in forms(2))
    )
    for length in lengths:
        cells = []
        for repeats in REPEATS:
            arguments = draw(length, 2, repeats, DIM)
            wanted = gated_delta_rule(*arguments)
            mx.eval(wanted)
            for form in forms(length).values():
                errors = [relative_rms(*pair) for pair in zip(form(*arguments), wanted, strict=True)]
                cells.append(max(errors))
        worst = max(worst, *cells)
        print(f"{length:<16}" + "".join(f"{cell:20.1e}" for cell in cells), flush=True)
    return worst


def race(lengths: list[int]) -> None:
    """Print milliseconds of one layer for each form and length."""
    columns = ("reference", "chunked", "mlx", "fused")
    print(f"{'ms, tokens':16}" + "".join(f"{name:>12}" for name in columns))
    for length in lengths:
        arguments = draw(length, KEY_HEADS, VALUE_HEADS // KEY_HEADS, DIM)
        ours = fused(length)
        cells = [
            milliseconds(gated_delta_rule, *arguments) if length <= SHORT else None,
            *(milliseconds(form, *arguments) for form in forms(length).values()),
            milliseconds(ours) if ours else None,
        ]
        shown = (f"{'-':>12}" if cell is None else f"{cell:12.3f}" for cell in cells)
        print(f"{length:<16}" + "".join(shown), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the forms of the gated delta rule on this device.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 8, 16, 64, 512, 2000])
    args = parser.parse_args()
    if on_gpu() and os.environ.get("MLX_ENABLE_TF32") != "0":
        parser.error("wanted MLX_ENABLE_TF32=0: float32 products would keep ten bits")
    device = mx.device_info()
    print(f"MLX {version('mlx')} on {device.get('device_name')}; times of {VALUE_HEADS} value heads of {DIM}")
    worst = compare(args.lengths)
    race(args.lengths)
    print(f"worst error {worst:.1e}, limit {LIMIT:.0e}")
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
