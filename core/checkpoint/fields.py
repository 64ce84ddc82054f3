"""A JSON object whose fields are checked as they are read; every refusal names the file and the field."""

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..quoting import quote_value

MAX_VOCAB = 1 << 22


class Fields:
    """A JSON object with a name for messages; null counts as missing."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where

    def refuse(self, name: str, wanted: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name} is {quote_value(self.values.get(name))}, wanted {wanted}")

    def section(self, name: str) -> "Fields":
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        # compared before it becomes a float, which an integer of 400 digits cannot; NaN fails the comparison
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            raise self.refuse(name, f"a number above {low:g} and at most {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < MAX_VOCAB for i in ids):
            raise self.refuse(name, "a token id or a list of them")
        return tuple(ids)
