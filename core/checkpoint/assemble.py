"""Builds the canonical tensors of the layout table from stored ones, lazily: stacks experts, expands FP8.

Refuses tensors that are missing, left over, of the wrong shape or dtype, or packed as MLX cannot read.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import WeightsError
from ..machine.backend import mx
from .layouts import Spec
from .packed import Geometry, Hints, Packed, solve_geometry
from .stored import Module, Stored

Tensor = mx.array | Packed
FLOATS = ("BF16", "F16", "F32")
FP8_BLOCK = 128


class Assembler:
    """Builds the tensors of `folder` from its stored `modules`, each array by `read`.

    `notes` collects what had to be interpreted and for which of them.
    """

    def __init__(
        self, folder: Path, modules: Mapping[str, Module], read: Callable[[Stored], mx.array], hints: Hints
    ):
        self.notes: dict[str, list[str]] = {}
        self._folder, self._modules, self._read, self._hints = folder, modules, read, hints
        self._used: set[str] = set()

    def note(self, sentence: str, name: str) -> None:
        self.notes.setdefault(sentence, []).append(name)

    def ignore(self, name: str, reason: str) -> None:
        """Build nothing from the stored module `name`, if there is one, and note why."""
        if name in self._modules:
            self.note(reason, name)
            self._used.add(name)

    def build(self, name: str, spec: Spec) -> Tensor:
        """The canonical tensor `name`, in whatever form it is stored. Raises WeightsError."""
        base, mark, projection = name.partition("switch_mlp.")
        if name not in self._modules and mark:
            return self._stacked_experts(f"{base}experts.", projection, spec)
        return self._build_module(name, spec)

    def norm(self, name: str, spec: Spec) -> mx.array:
        """The norm weight `name` in float32, as stored. Raises WeightsError."""
        return self._plain_array(self._take_module(name), spec)

    def refuse_leftovers(self) -> None:
        """Raise WeightsError for the first stored tensor that nothing was built from."""
        for name, module in self._modules.items():
            if name not in self._used:
                stored = next(iter(module.values()))
                raise stored.refuse("is not part of the model that config.json describes")

    def _stacked_experts(self, base: str, projection: str, spec: Spec) -> Tensor:
        """One projection of all experts [E, N, K], stored as such, as half a stack, or expert by expert."""
        if base + projection in self._modules:
            return self._build_module(base + projection, spec)
        if f"{base}0.{projection}" in self._modules or base + "gate_up_proj" not in self._modules:
            return self._stack([f"{base}{expert}.{projection}" for expert in range(spec.shape[0])], spec)
        self.note("stacked experts were split into gate and up", base + projection)
        experts, inner, width = spec.shape
        both = self._build_module(base + "gate_up_proj", Spec("matrix", (experts, 2 * inner, width)))
        begin = 0 if projection == "gate_proj" else inner
        return _map_arrays(both, lambda array: mx.contiguous(array[:, begin : begin + inner]))

    def _stack(self, members: list[str], spec: Spec) -> Tensor:
        one = Spec(spec.kind, spec.shape[1:])
        built = [self._build_module(member, one) for member in members]
        for member, tensor in zip(members, built, strict=True):
            if _form(tensor) != _form(built[0]):
                stored = self._modules[member]["weight"]
                raise stored.refuse(f"is {_form(tensor)}, and the first expert is {_form(built[0])}")
        self.note("experts stored one by one were stacked", members[0])
        stacks = [mx.stack(list(arrays)) for arrays in zip(*map(_arrays, built), strict=True)]
        return _map_arrays(built[0], lambda _: stacks.pop(0))

    def _build_module(self, name: str, spec: Spec) -> Tensor:
        module = self._take_module(name)
        if spec.kind == "matrix" and "scales" in module:
            return self._packed_matrix(name, module, spec)
        if spec.kind == "matrix" and "scale_inv" in module:
            return self._expand_fp8(name, module, spec)
        return self._plain_array(module, spec)

    def _take_module(self, name: str) -> Module:
        module = self._modules.get(name)
        if module is None:
            raise WeightsError(f"{self._folder}: the tensor {name} is missing from the weight files")
        self._used.add(name)
        if "weight" not in module:
            raise next(iter(module.values())).refuse("comes without its weight")
        return module

    def _plain_array(self, module: Module, spec: Spec) -> mx.array:
        stored = module["weight"]
        for part, other in module.items():
            if part != "weight":
                raise other.refuse("belongs to a packed weight, and the weight is not packed")
        if stored.entry.dtype == "U32":
            raise stored.refuse("is packed (U32) but has no scales")
        _check_dtype(stored, *FLOATS)
        if spec.kind == "conv":
            channels, taps = spec.shape
            stored.check_shape((channels, 1, taps), (channels, taps, 1))
            return self._read(stored).reshape(spec.shape)  # [C, K]
        stored.check_shape(spec.shape)
        array = self._read(stored)
        return array if spec.kind == "matrix" else array.astype(mx.float32)

    def _packed_matrix(self, name: str, module: Module, spec: Spec) -> Packed:
        _check_parts(module, {"weight", "scales", "biases"})
        weight, scales, biases = module["weight"], module["scales"], module.get("biases")
        geometry = self._geometry(name, weight, scales, biases, spec)
        return Packed(
            self._read(weight),
            self._read(scales),
            None if biases is None else self._read(biases),
            geometry.group_size,
            geometry.bits,
            geometry.mode,
        )

    def _geometry(
        self, name: str, weight: Stored, scales: Stored, biases: Stored | None, spec: Spec
    ) -> Geometry:
        """Check all parts of a packed matrix and solve its geometry; note where the config contradicts it."""
        *rows, in_features = spec.shape
        columns, scale_columns = weight.columns, scales.columns
        _check_dtype(weight, "U32")
        weight.check_shape((*rows, columns))
        scales.check_shape((*rows, scale_columns))
        if biases is None:
            _check_dtype(scales, "U8")
        else:
            _check_dtype(scales, *FLOATS)
            _check_dtype(biases, scales.entry.dtype)
            biases.check_shape(scales.entry.shape)
        try:
            geometry = solve_geometry(in_features, columns, scale_columns, affine=biases is not None)
        except WeightsError as error:
            raise weight.refuse(f"cannot be unpacked: {error}") from error
        claim = self._hints.contradiction(name, geometry)
        if claim is not None:
            self.note(f"config.json says {claim} where the shapes say {geometry}, which is used", name)
        return geometry

    def _expand_fp8(self, name: str, module: Module, spec: Spec) -> mx.array:
        """An E4M3 matrix times its scales, one per block of 128 x 128, in bfloat16."""
        _check_parts(module, {"weight", "scale_inv"})
        weight, scales = module["weight"], module["scale_inv"]
        *stack, rows, columns = spec.shape
        _check_dtype(weight, "F8_E4M3", "U8")
        _check_dtype(scales, *FLOATS)
        weight.check_shape(spec.shape)
        scales.check_shape((*stack, math.ceil(rows / FP8_BLOCK), math.ceil(columns / FP8_BLOCK)))
        self.note("FP8 weights were expanded to bfloat16", name)
        blocks = self._read(scales).astype(mx.float32)
        wide = mx.repeat(mx.repeat(blocks, FP8_BLOCK, -2)[..., :rows, :], FP8_BLOCK, -1)[..., :columns]
        return (mx.from_fp8(self._read(weight), mx.float32) * wide).astype(mx.bfloat16)


def _check_dtype(stored: Stored, *wanted: str) -> None:
    if stored.entry.dtype not in wanted:
        raise stored.refuse(f"has the dtype {stored.entry.dtype}, wanted {' or '.join(wanted)}")


def _check_parts(module: Module, allowed: set[str]) -> None:
    for part, stored in module.items():
        if part not in allowed:
            raise stored.refuse(f"cannot be combined with {', '.join(sorted(allowed))}")


def _arrays(tensor: Tensor) -> tuple[mx.array, ...]:
    return tensor.arrays if isinstance(tensor, Packed) else (tensor,)


def _form(tensor: Tensor) -> str:
    return str(tensor.geometry if isinstance(tensor, Packed) else tensor.dtype)


def _map_arrays(tensor: Tensor, change: Callable[[mx.array], mx.array]) -> Tensor:
    """Apply `change` to the array of `tensor`, or to each array of a packed one in order."""
    if not isinstance(tensor, Packed):
        return change(tensor)
    weight, scales, *biases = map(change, tensor.arrays)
    geometry = tensor.geometry
    return Packed(
        weight, scales, biases[0] if biases else None, geometry.group_size, geometry.bits, geometry.mode
    )
