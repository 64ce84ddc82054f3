"""Turns slices of the source into arrays ready to write: folds and packs them, a few in flight at once.

MLX runs the operations of one CPU stream one after the other, so slices alternate between several streams.
Copies codes unchanged that the source already has in the wanted form.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle

from ..checkpoint.assemble import Tensor
from ..checkpoint.finite import is_finite, not_finite
from ..checkpoint.packed import Packed
from ..machine.backend import mx, on_gpu
from ..quant.folds import Folds
from ..quant.recipe_file import RoundingMethod
from ..quant.rounding import quantize
from .source import Source, to_dense
from .writer import MLX_DTYPES, Unit

MAX_STREAMS = 4


@dataclass(frozen=True)
class Rounding:
    """How matrices are rounded; those in `done`, by canonical name, are rounded already.

    The `method` is that of `quantize`.
    """

    method: RoundingMethod | None = None
    done: Mapping[str, Packed] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Entries `begin` to `end` along the first axis of a unit: its arrays by part, in their final dtypes.

    `finite` [] says whether the source has no NaN or infinity there: rounding would spread it, or hide it.
    """

    unit: Unit
    begin: int
    end: int
    arrays: dict[str, mx.array]
    finite: mx.array


def convert_slices(
    source: Source, folds: Folds, units: Iterable[Unit], rounding: Rounding = Rounding()
) -> Iterator[Slice]:
    """Yield every slice of `units` in order, evaluated; keeps none once the next is asked for.

    Raises WeightsError for a value that is not finite.
    """
    pending: deque[Slice] = deque()
    turns = streams()
    spans = ((unit, *span) for unit in units for span in _spans(source, unit, rounding))
    for (unit, begin, end), stream in zip(spans, cycle(turns), strict=False):
        with mx.stream(stream):
            arrays, finite = _slice_arrays(source, folds, unit, begin, end, rounding)
        mx.async_eval([*arrays.values(), finite])
        pending.append(Slice(unit, begin, end, arrays, finite))
        del arrays
        if len(pending) == len(turns):
            yield _evaluate(pending.popleft())
    while pending:
        yield _evaluate(pending.popleft())


def _evaluate(piece: Slice) -> Slice:
    mx.eval(list(piece.arrays.values()))
    if not piece.finite:
        raise not_finite(piece.unit.name)
    return piece


@cache
def streams() -> list[mx.Stream]:
    """The streams that slices alternate between; made once, because MLX never ends a stream's thread."""
    if on_gpu():
        return [mx.default_stream(mx.default_device())] * 2  # so that reading and writing overlap
    return [mx.new_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, MAX_STREAMS))]


def _spans(source: Source, unit: Unit, rounding: Rounding) -> Iterator[tuple[int, int]]:
    if unit.name in rounding.done:
        yield 0, unit.arrays["weight"].shape[0]
    elif unit.name in source.specs and source.specs[unit.name].kind == "matrix":
        yield from source.slices(unit.name)
    else:
        yield 0, unit.arrays["weight"].shape[0]


def _slice_arrays(
    source: Source, folds: Folds, unit: Unit, begin: int, end: int, rounding: Rounding
) -> tuple[dict[str, mx.array], mx.array]:
    if unit.name in rounding.done:
        return _arrays_by_part(rounding.done[unit.name]), mx.array(True)
    if unit.geometry is None:
        weight = unit.arrays["weight"]
        values = read_unrounded(source, folds, unit, begin, end)
        final = values.astype(MLX_DTYPES[weight.dtype]).reshape(end - begin, *weight.shape[1:])
        return {"weight": final}, is_finite(values)
    tensor = source.read(unit.name, begin, end)
    finite = is_finite(tensor)
    if not (isinstance(tensor, Packed) and can_copy(source, folds, unit)):
        importance = folds.importance(unit.name)
        if importance is not None and importance.ndim > 1:
            importance = importance[begin:end]
        values = _fold_slice(folds, unit.name, tensor, begin, end)
        tensor = quantize(values, unit.geometry, importance, method=rounding.method)
    return _arrays_by_part(tensor), finite


def _arrays_by_part(packed: Packed) -> dict[str, mx.array]:
    arrays = {"weight": packed.weight, "scales": packed.scales}
    if packed.biases is None:
        return arrays
    return {
        "weight": packed.weight,
        "scales": packed.scales.astype(mx.bfloat16),
        "biases": packed.biases.astype(mx.bfloat16),
    }


def can_copy(source: Source, folds: Folds, unit: Unit) -> bool:
    """Whether the codes of the source are the wanted ones, so that copying them loses nothing."""
    same = unit.geometry is not None and source.packed.get(unit.name) == unit.geometry
    return same and unit.name not in folds.columns and unit.name not in folds.rows


def read_unrounded(source: Source, folds: Folds, unit: Unit, begin: int, end: int) -> mx.array:
    """Read entries `begin` to `end` of a unit, folded but not rounded."""
    if unit.name not in source.specs:
        return source.read_vision(unit.name)
    return _fold_slice(folds, unit.name, source.read(unit.name, begin, end), begin, end)


def _fold_slice(folds: Folds, name: str, tensor: Tensor, begin: int, end: int) -> mx.array:
    """Apply the scales of this slice; without any, a packed tensor becomes bfloat16."""
    columns, rows = folds.columns.get(name), folds.rows.get(name)
    values = to_dense(tensor, mx.bfloat16) if isinstance(tensor, Packed) else tensor
    if columns is not None and columns.ndim > 1:
        columns = columns[begin:end]
    here = Folds(
        columns={} if columns is None else {name: columns},
        rows={} if rows is None else {name: rows[begin:end]},
    )
    return here.apply(name, values)
