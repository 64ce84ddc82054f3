"""Measured sensitivities and their file: the KL divergence that each group of matrices costs in each code.

The file is JSON with the model's identity, the text's hash and a digest of its own. It belongs to weights,
not to a place: copies of a model share it. Refuses files that are damaged, or of another model or text.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.layouts import MTP_PREFIX
from ..checkpoint.packed import AFFINE_BITS, AFFINE_GROUPS, Geometry
from ..checkpoint.stored import Stored
from ..conversion.source import Source
from ..errors import UsageError
from ..machine.files import read_json, write_whole

KIND = "qchat sensitivity"
FORMAT = 1
SAMPLE_NBYTES = 4096  # of the bytes of each tensor, from its beginning and from its middle
FIELDS = ("kind", "format", "model", "text", "tokens", "groups", "digest")


@dataclass(frozen=True)
class Measured:
    """The KL divergence in nats by code when these matrices alone are quantized."""

    tensors: tuple[str, ...]
    kl: Mapping[Geometry, float]


@dataclass(frozen=True)
class Sensitivity:
    """The measurements of the model with this identity over `tokens` tokens of the text with this hash."""

    model: str
    text: str
    tokens: int
    groups: tuple[Measured, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the file's fields, its digest included."""
        groups = [
            {"tensors": list(g.tensors), "kl": {_key(code): kl for code, kl in g.kl.items()}}
            for g in self.groups
        ]
        fields = {"kind": KIND, "format": FORMAT, "model": self.model, "text": self.text}
        fields |= {"tokens": self.tokens, "groups": groups}
        return fields | {"digest": _digest(fields)}

    @property
    def digest(self) -> str:
        """The digest that the file has of itself."""
        return self.as_json()["digest"]

    def write(self, path: Path) -> None:
        """Write the file whole or not at all. Raises UsageError."""
        try:
            write_whole(path, json.dumps(self.as_json(), indent=1) + "\n", sync=True)
        except OSError as error:
            raise UsageError(f"the sensitivities cannot be written to {path}: {error.strerror}") from error


def read_sensitivity(path: Path) -> Sensitivity:
    """Read a file of sensitivities. Raises UsageError for a file that is none, or damaged."""
    fields = read_json(path, UsageError)
    if fields.get("kind") != KIND:
        raise UsageError(f"{path} is not a file of sensitivities")
    if fields.get("format") != FORMAT:
        raise UsageError(f"{path} has a format of sensitivities that this version of qchat cannot read")
    rest = {name: value for name, value in fields.items() if name != "digest"}
    if set(fields) != set(FIELDS) or fields["digest"] != _digest(rest):
        raise UsageError(f"{path} is damaged: its digest does not match; measure the sensitivities again")
    try:
        return _parse(fields)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise UsageError(f"{path} is damaged: its sensitivities cannot be read") from problem


def _parse(fields: Mapping[str, Any]) -> Sensitivity:
    groups = [
        Measured(tuple(map(str, g["tensors"])), {_code(key): _figure(kl) for key, kl in g["kl"].items()})
        for g in fields["groups"]
    ]
    if not groups or not all(group.tensors and group.kl for group in groups):
        raise ValueError("a group is empty")
    return Sensitivity(str(fields["model"]), str(fields["text"]), int(fields["tokens"]), tuple(groups))


def _key(code: Geometry) -> str:
    return f"{code.bits}/{code.group_size}"


def _code(key: str) -> Geometry:
    bits, group = map(int, key.split("/"))
    if bits not in AFFINE_BITS or group not in AFFINE_GROUPS:
        raise ValueError(key)
    return Geometry(bits, group, "affine")


def _figure(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(value)
    return float(value)


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def model_identity(source: Source) -> str:
    """Hash names, dtypes, shapes and samples of the bytes of all tensors of the body.

    Copies of a model have the same identity, however its tensors are spread over files.
    """
    digest = hashlib.sha256()
    for name, module in sorted(source.checkpoint.modules.items()):
        if not name.startswith(MTP_PREFIX):
            for part, stored in sorted(module.items()):
                digest.update(repr((name, part, stored.entry.dtype, stored.entry.shape)).encode())
                digest.update(b"".join(_samples(stored)))
    return digest.hexdigest()


def _samples(stored: Stored) -> Iterator[bytes]:
    """Yield some of a tensor's bytes. Raises WeightsError."""
    entry = stored.entry
    try:
        with stored.path.open("rb") as file:
            for begin in (entry.begin, (entry.begin + entry.end) // 2):
                file.seek(stored.header.data_begin + begin)
                yield file.read(min(SAMPLE_NBYTES, entry.end - begin))
    except OSError as error:
        raise stored.refuse(f"cannot be read: {error.strerror}") from error
