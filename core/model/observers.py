"""Observers in the place of a layer's products, which see the inputs of every projection.

An observer computes what its product does. Owns which products a layer has, and which modules each computes.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from .layers import AttentionLayer, DeltaLayer, DenseMLP, FeedForward
from .moe import MixtureOfExperts

T = TypeVar("T", bound=Callable)
# takes a product, the modules that it computes, and the number of experts, 0 for a plain product
MakeObserver = Callable[[Callable, tuple[str, ...], int], T]


def observe_layer(
    layer: AttentionLayer | DeltaLayer, name: str, experts: int, make: MakeObserver[T]
) -> Iterator[T]:
    """Put an observer in the place of each product of the layer `name`, as in "layers.3"."""
    mixer = layer.mixer
    if isinstance(layer, AttentionLayer):
        yield observe(mixer, "qkv", make, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
        yield observe(mixer, "out", make, f"{name}.self_attn.o_proj")
    else:
        parts = ("qkv", "z", "a", "b")
        yield observe(mixer, "inputs", make, *(f"{name}.linear_attn.in_proj_{part}" for part in parts))
        yield observe(mixer, "out", make, f"{name}.linear_attn.out_proj")
    yield from _observe_feed_forward(layer.feed_forward, f"{name}.mlp", experts, make)


def _observe_feed_forward(block: FeedForward, name: str, experts: int, make: MakeObserver[T]) -> Iterator[T]:
    if isinstance(block, DenseMLP):
        yield observe(block, "gate_up", make, f"{name}.gate_proj", f"{name}.up_proj")
        yield observe(block, "down", make, f"{name}.down_proj")
    elif isinstance(block, MixtureOfExperts):
        yield observe(block, "router", make, f"{name}.gate")
        yield observe(block, "shared_gate", make, f"{name}.shared_expert_gate")
        yield from _observe_feed_forward(block.shared, f"{name}.shared_expert", 0, make)
        for part in ("gate", "up", "down"):
            yield observe(block, part, make, f"{name}.switch_mlp.{part}_proj", experts=experts)


def observe(owner: object, attribute: str, make: MakeObserver[T], *names: str, experts: int = 0) -> T:
    """Put an observer in the place of one product, an attribute of `owner`."""
    observer = make(getattr(owner, attribute), names, experts)
    setattr(owner, attribute, observer)
    return observer
