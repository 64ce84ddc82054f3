"""Weights looked up by the part of their name that follows a module's prefix."""

from collections.abc import Mapping

from ..machine.backend import mx
from ..ops.linear import Weight


class WeightScope:
    """The weights whose names begin with `prefix`."""

    def __init__(self, tensors: Mapping[str, Weight], prefix: str = ""):
        self.tensors = tensors
        self.prefix = prefix

    def __getitem__(self, name: str) -> Weight:
        return self.tensors[self.prefix + name]

    def within(self, name: str) -> "WeightScope":
        """Return the scope of the submodule `name`."""
        return WeightScope(self.tensors, f"{self.prefix}{name}.")

    def vector(self, name: str) -> mx.array:
        """Return a dense tensor, evaluated. Raises TypeError for a packed one."""
        value = self[name]
        if not isinstance(value, mx.array):
            raise TypeError(f"{self.prefix}{name} is packed, and a vector never is")
        mx.eval(value)
        return value
