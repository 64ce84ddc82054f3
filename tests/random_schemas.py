"""Random JSON schemas that some document satisfies, from a seeded generator."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
PATTERNS = ["^[a-c]{2,5}$", "^x-[0-9]+$", "[0-9]{3}", "^(yes|no)$", "^a/b[.]c"]
FORMATS = ["date", "time", "date-time", "email", "uuid", "ipv4"]
WORDS = ["name", "größe", "a b", 'quo"te', "n/m", "id", "x-y", "Tags"]


class SchemaMaker:
    """Makes schemas; strings and arrays are short, so that a random model completes its answers."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def document(self) -> Schema:
        """Return the schema of a whole answer: an object, with definitions that it refers to."""
        definitions = {"point": self._object(1), "label": self._string()}
        return {**self._object(3), "$defs": definitions}

    def arguments(self) -> Schema:
        """Return the schema of a tool's arguments."""
        whole = self.document()
        names = {name: f"arg_{n}" for n, name in enumerate(whole["properties"])}
        whole["properties"] = {names[name]: schema for name, schema in whole["properties"].items()}
        whole["required"] = [names[name] for name in whole["required"]]
        return whole

    def _value(self, depth: int) -> Schema:
        kinds: list[Callable[[], Schema]] = [self._string, self._number, self._integer, self._choice]
        kinds += [lambda: {"type": "boolean"}, lambda: self._nullable(depth)]
        if depth > 0:
            kinds += [lambda: self._object(depth), lambda: self._array(depth), lambda: self._any_of(depth)]
            kinds += [lambda: {"$ref": f"#/$defs/{self._random.choice(['point', 'label'])}"}]
        return self._random.choice(kinds)()

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(WORDS, self._random.randint(1, 4))
        flat = depth <= 1  # definitions refer to nothing, so that documents end
        properties = {name: self._value(0 if flat else depth - 1) for name in names}
        required = [name for name in names if self._random.random() < 0.7]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    def _array(self, depth: int) -> Schema:
        low = self._random.randint(0, 2)
        return {
            "type": "array",
            "items": self._value(depth - 1),
            "minItems": low,
            "maxItems": low + self._random.randint(0, 2),
        }

    def _string(self) -> Schema:
        length = self._random.randint(0, 4)
        return {"type": "string"} | self._random.choice(
            [
                {"maxLength": self._random.randint(3, 12)},
                {"minLength": length, "maxLength": length + 5},
                {"pattern": self._random.choice(PATTERNS), "maxLength": 12},
                {"format": self._random.choice(FORMATS)},
            ]
        )

    def _number(self) -> Schema:
        low = self._random.choice([-2.5, 0, 1.25])
        return {"type": "number"} | self._random.choice(
            [{"minimum": low, "maximum": low + 10}, {"exclusiveMinimum": low, "exclusiveMaximum": low + 0.5}]
        )

    def _integer(self) -> Schema:
        low = self._random.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + self._random.randint(0, 1000)}

    def _choice(self) -> Schema:
        values = self._random.sample(["red", "blue", 3, None, True, "1", "null", 2.5], 3)
        return {"const": values[0]} if self._random.random() < 0.2 else {"enum": values}

    def _nullable(self, depth: int) -> Schema:
        if self._random.random() < 0.5:
            return {"type": ["integer", "null"], "minimum": 0, "maximum": 9}
        return {"anyOf": [self._string() if depth < 1 else self._value(depth - 1), {"type": "null"}]}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._value(depth - 1) for _ in range(self._random.randint(2, 3))]}
