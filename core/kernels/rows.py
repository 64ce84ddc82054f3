"""Kernels that move rows: those of an embedding by their ids, and parts of rows side by side."""

from collections.abc import Sequence
from functools import cache
from string import Template

from ..checkpoint.packed import Geometry, Packed
from ..machine.backend import mx
from .launch import Kernel
from .unpack import DENSE_WEIGHTS, WEIGHTS, write_text

THREADS = 128

_EMBED_PACKED = Template("""
  const uint slots = uint(weight_shape[1]) / $bits, slot = block_x * $threads + tid;
  if (slot < slots) {
    const uint at = uint(ids[block_y]) * slots + slot;
    $write
  }
""")
_EMBED_DENSE = Template("""
  const uint slots = uint(weight_shape[1]) / $slot, slot = block_x * $threads + tid;
  const uint from = uint(ids[block_y]) * slots + slot;
  if (slot < slots) ((DEVICE uint4*)y)[block_y * slots + slot] = ((const DEVICE uint4*)weight)[from];
""")
_JOIN = Template("""
  uint column = block_x * $threads + tid;
  const uint width = $width;
  if (column < width) {
    DEVICE bf16* to = y + block_y * width + column;
    $parts
  }
""")


def embed(ids: mx.array, table: mx.array | Packed) -> mx.array:
    """Return rows `ids` [T] uint32 of a table [V, K] in bfloat16: [T, K] bfloat16."""
    geometry = table.geometry if isinstance(table, Packed) else None
    arrays = table.arrays if isinstance(table, Packed) else (table,)
    columns = table.shape[-1]
    slots = columns // (WEIGHTS if geometry else DENSE_WEIGHTS)
    (rows,) = embed_kernel(geometry)(
        [ids, *arrays],
        blocks=(-(-slots // THREADS), ids.shape[0], 1),
        results=[((ids.shape[0], columns), mx.bfloat16)],
    )
    return rows


@cache
def embed_kernel(geometry: Geometry | None) -> Kernel:
    """Return the kernel for tables of one packed format; None is bfloat16."""
    if geometry is None:
        body = _EMBED_DENSE.substitute(slot=DENSE_WEIGHTS, threads=THREADS)
        return Kernel("embed_bf16", ("ids", "weight"), ("y",), body, THREADS)
    parts = {
        "threads": THREADS,
        "bits": geometry.bits,
        "write": write_text(geometry, "((DEVICE uint4*)y)[(block_y * slots + slot) * 4 + i]"),
    }
    inputs = ("ids", "weight", "scales", *(("biases",) if geometry.mode == "affine" else ()))
    body = _EMBED_PACKED.substitute(parts)
    return Kernel(f"embed_{geometry.mode}{geometry.bits}", inputs, ("y",), body, THREADS)


def join(parts: Sequence[mx.array]) -> mx.array:
    """Return parts [T, N1], [T, N2], ... in bfloat16 side by side: [T, N1 + N2 + ...]."""
    rows, width = parts[0].shape[0], sum(part.shape[1] for part in parts)
    (joined,) = join_kernel(len(parts))(
        list(parts), blocks=(-(-width // THREADS), rows, 1), results=[((rows, width), mx.bfloat16)]
    )
    return joined


@cache
def join_kernel(count: int) -> Kernel:
    """Return the kernel that joins `count` parts."""
    names = tuple(f"part{number}" for number in range(count))
    widths = [f"uint({name}_shape[1])" for name in names]
    lines = []
    for name, width in zip(names, widths, strict=True):
        lines.append(f"if (column < {width}) {{ *to = {name}[block_y * {width} + column]; return; }}")
        lines.append(f"column -= {width};")
    parts = {"threads": THREADS, "width": " + ".join(widths), "parts": "\n    ".join(lines[:-1])}
    return Kernel(f"join_rows{count}", names, ("y",), _JOIN.substitute(parts), THREADS)
