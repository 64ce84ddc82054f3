"""Tells numbers from what is none: NaN and infinity in weights, by the name of the tensor.

Loading checks what is small: norms, vectors, and the scales of packed matrices. `find_not_finite` reads all.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import WeightsError
from ..machine.backend import mx
from .assemble import Tensor
from .config import ModelConfig
from .packed import Packed
from .weights import load_weights

E8M0_NAN, E4M3_NAN = 0xFF, 0x7F  # the second without its sign


class CheckedTensors(Mapping[str, Tensor]):
    """The same tensors; asking for one raises WeightsError if its small parts hold NaN or infinity."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if (isinstance(tensor, Packed) or tensor.ndim < 2) and not is_finite(tensor):
            raise not_finite(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def is_finite(tensor: Tensor) -> mx.array:
    """Whether all values of a dense tensor, or all scales of a packed one, are finite: a lazy flag []."""
    if not isinstance(tensor, Packed):
        return mx.isfinite(tensor).all()
    if tensor.biases is not None:
        return mx.isfinite(tensor.scales).all() & mx.isfinite(tensor.biases).all()
    if tensor.mode == "nvfp4":
        return ((tensor.scales & E4M3_NAN) != E4M3_NAN).all()
    return (tensor.scales != E8M0_NAN).all()


def not_finite(name: str) -> WeightsError:
    """The error of the tensor `name`, which holds NaN or infinity."""
    return WeightsError(_sentence(name))


def find_not_finite(folder: Path, config: ModelConfig) -> str:
    """Read all weights of a folder whose outputs are not finite; return a sentence that names the tensor."""
    for name, tensor in load_weights(folder, config).tensors.items():
        values = tensor.dequantize() if isinstance(tensor, Packed) else tensor
        if not mx.isfinite(values).all():
            return f"{folder}: {_sentence(name)}"
    return (
        f"{folder}: the model's outputs are not finite numbers, although its weights are: "
        "set QCHAT_ACTIVATIONS=float32"
    )


def _sentence(name: str) -> str:
    return (
        f"the tensor {name} holds a value that is not a finite number: "
        "the weights are damaged, so download or convert the model again"
    )
