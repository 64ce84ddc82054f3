"""Times ways of cutting one product of few rows on this GPU, next to the one that `choose_tiling` takes.

`PYTHONPATH=.dev:. python tests/gpu/tilings.py [--rows 1 4] [--formats affine2 ...] [--places gate_up ...]`.
Each kernel compiles for a second. Weights are rotated through more memory than any cache holds; the share is
of what a large copy moves.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

from qchat.core.checkpoint.packed import FLOAT_MODES, Geometry
from qchat.core.kernels.matvec import Shape, Tiling, choose_tiling, run_matvec
from qchat.core.machine.backend import mx
from tests.gpu.race import copy_bandwidth

EPS = 1e-6
ROTATED_NBYTES = 400 << 20
AFFINE = {f"affine{bits}": Geometry(bits, 64, "affine") for bits in (2, 3, 4, 5, 6, 8)}
FLOATS = {mode: Geometry(bits, group, mode) for (bits, group), mode in FLOAT_MODES.items()}
FORMATS: dict[str, Geometry | None] = {**AFFINE, **FLOATS, "bfloat16": None}
# of Qwen3.6-27B: columns, outputs, sides, whether a norm or a residual goes along
PLACES = {
    "gate_up": (5120, 17408, 2, True, False),
    "down": (17408, 5120, 1, False, True),
    "in": (5120, 16384, 1, True, False),
    "out": (6144, 5120, 1, False, True),
}


def weight(geometry: Geometry | None, rows: int, columns: int) -> list[mx.array]:
    """Random codes under constant scales, or random bfloat16."""
    if geometry is None:
        return [mx.random.normal((rows, columns)).astype(mx.bfloat16)]
    words = rows * columns * geometry.bits // 32
    packed = mx.random.split(mx.random.key(0), words // 2).reshape(rows, -1)
    groups = (rows, columns // geometry.group_size)
    if geometry.mode == "affine":
        return [packed, *(mx.full(groups, value, mx.bfloat16) for value in (0.01, -0.01))]
    return [packed & 0xFEFEFEFE, mx.full(groups, 40 if geometry.mode == "nvfp4" else 119, mx.uint8)]


def tilings(shape: Shape, chosen: Tiling) -> Iterator[Tiling]:
    """The chosen one first, then its neighbours."""
    yield chosen
    for at_once in {2, 4, 8} - {chosen.at_once}:
        if at_once >= shape.sides and chosen.outputs % (at_once // shape.sides) == 0:
            yield replace(chosen, at_once=at_once)
    for resident in (chosen.resident - 1, chosen.resident + 1):
        if resident:
            yield replace(chosen, resident=resident)
    yield replace(chosen, prefetch=not chosen.prefetch)
    per_pass = chosen.at_once // shape.sides
    for outputs in (chosen.outputs // 2, chosen.outputs * 2):
        yield replace(chosen, outputs=max(outputs // per_pass, 1) * per_pass)


def seconds(shape: Shape, tiling: Tiling, x: mx.array, sets: list, extras: list[mx.array]) -> float:
    """Of one product, the best of a few rounds over all `sets` of weights."""

    def run() -> float:
        results = [run_matvec(shape, x, weights, extras, tiling=tiling)[0] for weights in sets * 3]
        mx.synchronize()
        began = time.perf_counter()
        mx.eval(results)
        return (time.perf_counter() - began) / len(results)

    return min(run() for _ in range(4))


def measure(name: str, place: str, rows: int, bandwidth: float, neighbours: bool) -> None:
    columns, outputs, sides, normed, adds = PLACES[place]
    geometry = FORMATS[name]
    shape = Shape(geometry, columns, rows, sides, EPS if normed else None, adds)
    nbytes = sides * sum(array.nbytes for array in weight(geometry, outputs, columns))
    sets = [
        [weight(geometry, outputs, columns) for _ in range(sides)]
        for _ in range(1 + ROTATED_NBYTES // nbytes)
    ]
    x, add = (mx.random.normal((rows, n)).astype(mx.bfloat16) for n in (columns, outputs))
    extras = [mx.ones(columns)] * normed + [add] * adds
    mx.eval(sets, x, extras)
    chosen = choose_tiling(shape, outputs)
    for tiling in tilings(shape, chosen) if neighbours else [chosen]:
        try:
            took = seconds(shape, tiling, x, sets, extras)
        except RuntimeError as error:  # too many registers for one block
            print(f"{name:9} {place:8} {rows} rows {tiling}: {' '.join(str(error).split())[:90]}", flush=True)
            continue
        share = nbytes / took / bandwidth
        print(f"{name:9} {place:8} {rows} rows {took * 1e6:8.1f} us {share:5.0%}  {tiling}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the ways of cutting products of few rows.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], choices=[1, 2, 4, 8])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--chosen", action="store_true", help="only the one that `choose_tiling` takes")
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"a copy moves {bandwidth / 1e12:.2f} TB/s", flush=True)
    for name in args.formats:
        for place in args.places:
            for rows in args.rows:
                measure(name, place, rows, bandwidth, not args.chosen)


if __name__ == "__main__":
    main()
