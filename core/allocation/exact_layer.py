"""One decoder layer as stored, in which single matrices can be rounded for a while.

Reads the layer's weights once. Owns where a layer holds the product of each matrix; runs on plain layers in
float32 activations, so that a small divergence is not lost in rounding.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..checkpoint.assemble import Tensor
from ..checkpoint.config import ModelConfig
from ..checkpoint.packed import Geometry, Packed
from ..checkpoint.weights import WeightScope
from ..conversion.source import Source, to_dense
from ..machine.backend import Policy, mx, on_gpu
from ..model.cache import Cache, DeltaState, LayerCache
from ..model.layers import AttentionLayer, DeltaLayer, DenseMLP, FeedForward, GatedAttention
from ..model.moe import MixtureOfExperts
from ..model.network import make_layer
from ..ops.linear import ExpertsLinear, Linear, Projections, Weight, make_linear
from ..ops.tiled import TiledExperts
from ..quant.codes import unpack
from ..quant.rounding import quantize

DENSE_NBYTES = 1 << 30  # up to which a layer's weights are kept in float32
ROUNDING_NBYTES = 8 << 20  # of weights in float32 that are rounded at once


Product = Linear | TiledExperts


@dataclass(frozen=True)
class _Attribute:
    """A product that is the attribute `name` of `owner`."""

    owner: object
    name: str

    def get(self) -> Product | ExpertsLinear:
        return getattr(self.owner, self.name)

    def put(self, product: Product | ExpertsLinear) -> None:
        setattr(self.owner, self.name, product)


@dataclass(frozen=True)
class _Item:
    """A product that is the item `index` of a list."""

    products: list[Any]
    index: int

    def get(self) -> Product | ExpertsLinear:
        return self.products[self.index]

    def put(self, product: Product | ExpertsLinear) -> None:
        self.products[self.index] = product


Slot = _Attribute | _Item


@dataclass(frozen=True)
class _Reader(Mapping[str, Tensor]):
    """Tensors read from disk when a layer asks for them."""

    source: Source

    def __getitem__(self, name: str) -> Tensor:
        return self.source.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.specs)

    def __len__(self) -> int:
        return len(self.source.specs)


class ExactLayer:
    """Layer `index` of `source`."""

    def __init__(self, source: Source, index: int):
        self._config, self._index = source.config, index
        self._policy = layer_policy(source, index)
        scope = WeightScope(_Reader(source)).within(f"layers.{index}")
        self._layer = make_layer(source.config, scope, source.config.layer_types[index], self._policy)
        self._slots = dict(_slots(self._layer, f"layers.{index}"))
        for slot in self._slots.values():
            product = slot.get()
            if isinstance(product, ExpertsLinear):
                slot.put(TiledExperts(product.weight))

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [B, T, hidden] float32, each row with an empty cache, to the same shape, evaluated."""
        output = self._layer(x, _empty_cache(self._config, self._index, len(x)))
        mx.eval(output)
        return output

    @contextmanager
    def rounded(self, codes: Mapping[str, Geometry]) -> Iterator[None]:
        """Round these matrices, by canonical name, within the block; those of other layers are ignored."""
        kept = {name: self._slots[name].get() for name in codes if name in self._slots}
        for name, product in kept.items():
            self._slots[name].put(_rounded(product, codes[name], self._policy))
        try:
            yield
        finally:
            for name, product in kept.items():
                self._slots[name].put(product)

    def close(self) -> None:
        """Drop the weights, which the layer's compiled functions would keep."""
        vars(self._layer).clear()
        self._slots.clear()


def layer_policy(source: Source, index: int) -> Policy:
    """Keep a small layer dense in float32; a large one as stored, which each product casts."""
    prefix = f"layers.{index}."
    weights = sum(math.prod(spec.shape) for name, spec in source.specs.items() if name.startswith(prefix))
    return Policy(mx.float32, dense=4 * weights <= DENSE_NBYTES)


def _rounded(product: Product | ExpertsLinear, code: Geometry, policy: Policy) -> Product:
    weight = round_weight(product.weight, code, mx.float32 if policy.dense else mx.bfloat16)
    return TiledExperts(weight) if isinstance(product, TiledExperts) else make_linear(weight)


def round_weight(weight: Weight, code: Geometry, dtype: mx.Dtype) -> mx.array:
    """Return the weight rounded to an affine `code`, dense in `dtype` and evaluated."""
    dense = to_dense(weight, dtype)
    # rounding takes several times the memory of what it rounds, and is fastest in a processor's caches
    step = max(1, ROUNDING_NBYTES // (4 * math.prod(dense.shape[1:])))
    parts = []
    for begin in range(0, len(dense), step):
        parts.append(_dequantize(quantize(dense[begin : begin + step], code), dtype))
        mx.eval(parts[-1])
    rounded = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    mx.eval(rounded)
    return rounded


def _dequantize(packed: Packed, dtype: mx.Dtype) -> mx.array:
    """Return what an affine matrix means; a few times as fast as MLX's own on a CPU."""
    if on_gpu() or packed.biases is None:
        return packed.dequantize(dtype)
    levels = unpack(packed.weight, packed.bits).astype(mx.float32)
    groups = levels.reshape(*packed.scales.shape, packed.group_size)
    scales, biases = (part.astype(mx.float32)[..., None] for part in (packed.scales, packed.biases))
    return (groups * scales + biases).astype(dtype).reshape(*packed.scales.shape[:-1], -1)


def _empty_cache(config: ModelConfig, index: int, rows: int) -> LayerCache:
    cache = Cache.empty(config, mx.float32).layers[index]
    if isinstance(cache, DeltaState):
        return DeltaState(mx.repeat(cache.conv, rows, axis=0), mx.repeat(cache.state, rows, axis=0))
    return cache


def _slots(layer: AttentionLayer | DeltaLayer, name: str) -> Iterator[tuple[str, Slot]]:
    """Yield the slot of every matrix of a layer."""
    mixer = layer.mixer
    if isinstance(mixer, GatedAttention):
        yield from _parts(mixer.qkv, [f"{name}.self_attn.{part}_proj" for part in "qkv"])
        yield f"{name}.self_attn.o_proj", _Attribute(mixer, "out")
    else:
        parts = [f"{name}.linear_attn.in_proj_{part}" for part in ("qkv", "z", "a", "b")]
        yield from _parts(mixer.inputs, parts)
        yield f"{name}.linear_attn.out_proj", _Attribute(mixer, "out")
    yield from _feed_forward_slots(layer.feed_forward, f"{name}.mlp")


def _feed_forward_slots(block: FeedForward, name: str) -> Iterator[tuple[str, Slot]]:
    if isinstance(block, DenseMLP):
        yield from _parts(block.gate_up, [f"{name}.gate_proj", f"{name}.up_proj"])
        yield f"{name}.down_proj", _Attribute(block, "down")
    elif isinstance(block, MixtureOfExperts):
        yield from _feed_forward_slots(block.shared, f"{name}.shared_expert")
        for part in ("gate", "up", "down"):
            yield f"{name}.switch_mlp.{part}_proj", _Attribute(block, part)


def _parts(projections: Projections, names: list[str]) -> Iterator[tuple[str, Slot]]:
    places = ((group.parts, index) for group in projections.groups for index in range(len(group.parts)))
    for name, (parts, index) in zip(names, places, strict=True):
        yield name, _Item(parts, index)
