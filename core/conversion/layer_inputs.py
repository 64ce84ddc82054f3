"""What the matrices of one layer read: H = X^T X of each input, or for experts the inputs themselves.

An H is kept reversed, as its factor wants it, and only its lower half. Of experts, which have an H each, the
rows are kept, and an H is made when its expert is rounded; one for which there are no rows has the mean
squares of all rows on its diagonal, so that rounding it compensates nothing.
"""

from collections.abc import Callable
from typing import Any, Protocol

from ..machine.backend import mx
from ..model.layers import AttentionLayer, DeltaLayer
from ..model.moe import MixtureOfExperts
from ..model.observers import observe, observe_layer
from ..quant.gptq import BLOCK, Factor, cut_lower, factorise


class Inputs(Protocol):
    """The inputs of some matrices."""

    arrays: list[mx.array]  # to be evaluated after each forward pass

    def factor(self, begin: int, end: int) -> Factor:
        """Return the factor for rows, or experts, `begin` to `end` of a matrix that reads these inputs."""
        ...

    def unreached(self) -> int:
        """Return how many experts read nothing."""
        ...

    def release(self) -> None:
        """Forget the product, whose weights are no longer needed."""
        ...


class SharedInputs:
    """In the place of a product, H of what it reads; all rows of its matrices have the same factor."""

    def __init__(self, product: Callable[..., Any]):
        self._product = product
        self.arrays: list[mx.array] = []
        self._factor: Factor | None = None

    def __call__(self, x: mx.array) -> Any:
        self.add(x)
        return self._product(x)

    def add(self, x: mx.array) -> None:
        """Add the rows of x [..., K]."""
        rows = x.astype(mx.float32).reshape(-1, x.shape[-1])[:, ::-1]
        width = rows.shape[-1]
        bounds = [(i, min(i + BLOCK, width)) for i in range(0, width, BLOCK)]
        blocks = self.arrays or [mx.zeros((end - begin, end)) for begin, end in bounds]
        self.arrays = [
            mx.addmm(block, rows[:, begin:end].T, rows[:, :end])
            for block, (begin, end) in zip(blocks, bounds, strict=True)
        ]

    def factor(self, begin: int, end: int) -> Factor:  # noqa: ARG002  all rows share it
        if self._factor is None:
            blocks, self.arrays = self.arrays, []
            self._factor = factorise([block[None] for block in blocks])
        return self._factor

    def unreached(self) -> int:
        return 0

    def release(self) -> None:
        self._product = _released


class ChosenInputs:
    """In the place of the products of experts, the rows [R, K] that they read, and who reads them [R, top].

    The product takes rows and choices first, in these shapes or in those of `ExpertsLinear`.
    """

    def __init__(self, product: Callable[..., Any], experts: int):
        self._product, self._experts = product, experts
        self.arrays: list[mx.array] = []  # rows and choices in turn

    def __call__(self, x: mx.array, choices: mx.array, *rest: Any) -> Any:
        rows = x.astype(mx.float32).reshape(-1, x.shape[-1])
        self.arrays += [rows, choices.reshape(len(rows), -1)]
        return self._product(x, choices, *rest)

    def factor(self, begin: int, end: int) -> Factor:
        rows, choices = self._joined()
        reading = [(choices == expert).any(axis=-1) for expert in range(begin, end)]
        return factorise(cut_lower(mx.stack([self._hessian(rows, chosen) for chosen in reading])))

    def unreached(self) -> int:
        _, choices = self._joined()
        return sum(not (choices == expert).any().item() for expert in range(self._experts))

    def release(self) -> None:
        self._product = _released

    def _joined(self) -> tuple[mx.array, mx.array]:
        if len(self.arrays) > 2:
            self.arrays = [mx.concatenate(self.arrays[::2]), mx.concatenate(self.arrays[1::2])]
            mx.eval(self.arrays)
        return self.arrays[0], self.arrays[1]

    def _hessian(self, rows: mx.array, chosen: mx.array) -> mx.array:
        """H [K, K], reversed, of the `chosen` [R] rows."""
        count = int(chosen.sum())
        if not count:
            return mx.diag(mx.square(rows).mean(axis=0)[::-1])
        own = rows[mx.argsort(mx.where(chosen, 0, 1))[:count], ::-1]
        return own.T @ own


def _released(*_: Any) -> Any:
    raise RuntimeError("the product of these inputs was released")


def observe_inputs(layer: AttentionLayer | DeltaLayer, name: str, experts: int) -> dict[str, Inputs]:
    """Observe the inputs of every matrix of the layer `name`, as in "layers.3", by the matrices' names."""
    found: dict[str, Inputs] = {}

    def make(product: Callable, names: tuple[str, ...], count: int) -> Callable:
        if count and not names[0].endswith("down_proj"):
            return product  # these read what the whole block does
        inputs = ChosenInputs(product, count) if count else SharedInputs(product)
        found.update(dict.fromkeys(names, inputs))
        return inputs

    for _ in observe_layer(layer, name, experts, make):
        pass
    block = layer.feed_forward
    if isinstance(block, MixtureOfExperts):
        gate_up = tuple(f"{name}.mlp.switch_mlp.{part}_proj" for part in ("gate", "up"))
        inputs = observe(block, "run", lambda run, _names, _count: ChosenInputs(run, experts), *gate_up)
        found |= dict.fromkeys(gate_up, inputs)
    return found
