"""From slices of the source to arrays ready to be written: folded, packed, a few in flight at once.

MLX runs the operations of one CPU stream one after the other, so slices take turns on several streams. What
the source holds in the wanted code already is passed through untouched.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle

from ..checkpoint.assemble import Tensor
from ..checkpoint.packed import Packed
from ..machine.backend import mx, on_gpu
from ..quant.folds import Folds
from ..quant.rounding import quantize
from .source import Source, dense
from .writer import DTYPES, Unit

MAX_STREAMS = 4


@dataclass(frozen=True)
class Slice:
    """Entries `begin` to `end` along the first axis of a unit, its arrays by part in their final dtypes."""

    unit: Unit
    begin: int
    end: int
    arrays: dict[str, mx.array]


def converted(source: Source, folds: Folds, units: Iterable[Unit]) -> Iterator[Slice]:
    """Every slice of `units` in order, evaluated; none is kept once the next is asked for."""
    pending: deque[Slice] = deque()
    turns = streams()
    spans = ((unit, *span) for unit in units for span in _spans(source, unit))
    for (unit, begin, end), stream in zip(spans, cycle(turns), strict=False):
        with mx.stream(stream):
            arrays = _arrays(source, folds, unit, begin, end)
        mx.async_eval(list(arrays.values()))
        pending.append(Slice(unit, begin, end, arrays))
        del arrays
        if len(pending) == len(turns):
            yield _finished(pending.popleft())
    while pending:
        yield _finished(pending.popleft())


def _finished(piece: Slice) -> Slice:
    mx.eval(list(piece.arrays.values()))
    return piece


@cache
def streams() -> list[mx.Stream]:
    """To take turns on; made once, because MLX never ends a stream's thread."""
    if on_gpu():
        return [mx.default_stream(mx.default_device())] * 2  # so that reading and writing overlap
    return [mx.new_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, MAX_STREAMS))]


def _spans(source: Source, unit: Unit) -> Iterator[tuple[int, int]]:
    if unit.name in source.specs and source.specs[unit.name].kind == "matrix":
        yield from source.slices(unit.name)
    else:
        yield 0, unit.arrays["weight"].shape[0]


def _arrays(source: Source, folds: Folds, unit: Unit, begin: int, end: int) -> dict[str, mx.array]:
    if unit.geometry is None:
        weight = unit.arrays["weight"]
        values = exact(source, folds, unit, begin, end)
        return {"weight": values.astype(DTYPES[weight.dtype]).reshape(end - begin, *weight.shape[1:])}
    tensor = source.read(unit.name, begin, end)
    if not (isinstance(tensor, Packed) and is_kept(source, folds, unit)):
        importance = folds.importance(unit.name)
        if importance is not None and importance.ndim > 1:
            importance = importance[begin:end]
        tensor = quantize(_folded(folds, unit.name, tensor, begin, end), unit.geometry, importance)
    return _parts(tensor)


def _parts(packed: Packed) -> dict[str, mx.array]:
    arrays = {"weight": packed.weight, "scales": packed.scales}
    if packed.biases is None:
        return arrays
    return {
        "weight": packed.weight,
        "scales": packed.scales.astype(mx.bfloat16),
        "biases": packed.biases.astype(mx.bfloat16),
    }


def is_kept(source: Source, folds: Folds, unit: Unit) -> bool:
    """Whether the source's own codes are copied, which loses nothing."""
    same = unit.geometry is not None and source.packed.get(unit.name) == unit.geometry
    return same and unit.name not in folds.columns and unit.name not in folds.rows


def exact(source: Source, folds: Folds, unit: Unit, begin: int, end: int) -> mx.array:
    """What entries `begin` to `end` of a unit stand for before anything is rounded."""
    if unit.name not in source.specs:
        return source.read_vision(unit.name)
    return _folded(folds, unit.name, source.read(unit.name, begin, end), begin, end)


def _folded(folds: Folds, name: str, tensor: Tensor, begin: int, end: int) -> mx.array:
    """The slice with its part of the scales; in bfloat16 where there are none and it was packed."""
    columns, rows = folds.columns.get(name), folds.rows.get(name)
    values = dense(tensor, mx.bfloat16) if isinstance(tensor, Packed) else tensor
    if columns is not None and columns.ndim > 1:
        columns = columns[begin:end]
    here = Folds(
        columns={} if columns is None else {name: columns},
        rows={} if rows is None else {name: rows[begin:end]},
    )
    return here.apply(name, values)
