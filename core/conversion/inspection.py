"""Describes a model folder: every tensor's class, code, shape and bytes, and the loader's repairs.

Bytes are those of the files. Codes and shapes come from the loader, which checks the folder as it would to
run it. Reads no weights but the few norms that tell the layout, so a folder of any size takes a moment.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from ..checkpoint.assemble import FP8_BLOCK, Tensor
from ..checkpoint.config import ModelConfig
from ..checkpoint.header import ITEM_NBYTES, Entry
from ..checkpoint.layouts import body_specs, is_vision, mtp_specs, split_part
from ..checkpoint.packed import Packed
from ..checkpoint.stored import open_checkpoint
from ..checkpoint.weights import load_weights
from ..errors import TemplateError
from ..quant.plan import tensor_class
from ..quoting import printable
from ..text.template import Template
from .results import ClassSummary, InspectionSummary, TensorSummary

DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
EXPERTS = re.compile(r"(.*mlp\.)experts\.(?:\d+\.)?(\w+)")


@dataclass(frozen=True)
class Code:
    """How weights are stored: `bits` each without the scales, and one scale to `group_size` weights of a row.

    `group_size` is None if they are not quantized.
    """

    mode: str
    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        return (
            self.mode if self.group_size is None else f"{self.mode} {self.bits}-bit group {self.group_size}"
        )


@dataclass(frozen=True)
class TensorInfo:
    """One tensor by its canonical name; all experts of a projection are one tensor [E, N, K]."""

    name: str
    kind: str
    code: Code
    shape: tuple[int, ...]
    nbytes: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def summary(self) -> TensorSummary:
        return TensorSummary(self.name, self.kind, **asdict(self.code), shape=self.shape, nbytes=self.nbytes)


@dataclass(frozen=True)
class ClassInfo:
    """The tensors of one class and code."""

    kind: str
    code: Code
    tensors: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def weights(self) -> int:
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.nbytes / max(self.weights, 1)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The different shapes."""
        return tuple(dict.fromkeys(tensor.shape for tensor in self.tensors))

    def summary(self) -> ClassSummary:
        return ClassSummary(
            self.kind,
            **asdict(self.code),
            tensors=len(self.tensors),
            weights=self.weights,
            nbytes=self.nbytes,
            bits_per_weight=self.bits_per_weight,
            shapes=self.shapes,
        )


@dataclass(frozen=True)
class Inspection:
    """A model folder's tensors, in the order of the network; `repairs` are the loader's sentences."""

    model: str
    config: ModelConfig
    tensors: tuple[TensorInfo, ...]
    repairs: tuple[str, ...]
    notices: tuple[str, ...]

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """The classes in the order of their first tensors, with the codes of a class together."""
        groups: dict[str, dict[Code, list[TensorInfo]]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.kind, {}).setdefault(tensor.code, []).append(tensor)
        return tuple(
            ClassInfo(kind, code, tuple(tensors))
            for kind, codes in groups.items()
            for code, tensors in codes.items()
        )

    @property
    def total(self) -> ClassInfo:
        return ClassInfo("total", Code("", 0), self.tensors)

    def summary(self, *, tensors: bool = False) -> InspectionSummary:
        """Return what there is to tell of the folder, with every single tensor if `tensors`."""
        config, total = self.config, self.total
        return InspectionSummary(
            model=self.model,
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            attention_layers=config.layer_types.count("full_attention"),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            context=config.max_position_embeddings,
            weights=total.weights,
            total_bytes=total.nbytes,
            bits_per_weight=total.bits_per_weight,
            tensor_count=len(self.tensors),
            classes=tuple(row.summary() for row in self.classes),
            repairs=self.repairs,
            notices=self.notices,
            experts=config.num_experts if config.is_moe else 0,
            experts_per_token=config.num_experts_per_tok if config.is_moe else 0,
            tensors=tuple(tensor.summary() for tensor in self.tensors) if tensors else None,
        )

    def as_json(self, *, tensors: bool = False) -> dict[str, Any]:
        """Return `summary` as values that `json.dumps` takes."""
        return to_builtins(self.summary(tensors=tensors))


def inspect_model(folder: Path) -> Inspection:
    """Describe the model in `folder` from the headers of its files. Raises the same errors as loading it."""
    config = ModelConfig.load(folder)
    checkpoint = open_checkpoint(folder)
    weights = load_weights(checkpoint, config)
    config = weights.settle(config)
    files = _Files()
    for header in checkpoint.headers:
        for entry in header.entries.values():
            files.add(entry, mtp_file=header.path == checkpoint.shards.mtp)
    order = {name: place for place, name in enumerate(body_specs(config) | mtp_specs(config))}
    names = sorted(weights.tensors, key=lambda name: order[name])
    tensors = [_tensor_info(name, weights.tensors[name], files) for name in names]
    return Inspection(
        model=str(folder),
        config=config,
        tensors=(*tensors, *files.vision, *files.ignored(names)),
        repairs=weights.repairs,
        notices=(_template_notice(folder),),
    )


class _Files:
    """Stored bytes and weight entry of each canonical tensor, and the tensors that belong to none."""

    def __init__(self) -> None:
        self.nbytes: dict[str, int] = {}
        self.weights: dict[str, Entry] = {}
        self.vision: list[TensorInfo] = []

    def add(self, entry: Entry, *, mtp_file: bool) -> None:
        """Count one stored tensor for the canonical tensors that it is a part of."""
        if is_vision(entry.name):
            self.vision.append(_stored_info("vision", entry))
            return
        module, part = split_part(entry.name, mtp_file=mtp_file)
        homes = canonical_names(module)
        for home in homes:
            self.nbytes[home] = self.nbytes.get(home, 0) + _nbytes(entry) // len(homes)
            if part == "weight":
                self.weights[home] = entry

    def ignored(self, used: Sequence[str]) -> list[TensorInfo]:
        """Tensors that the loader does not use: the head of a tied model, buffers that it computes itself."""
        left = self.weights.keys() - set(used)
        return [_stored_info("ignored", entry) for name, entry in self.weights.items() if name in left]


def canonical_names(module: str) -> list[str]:
    """The canonical tensors that a stored module is part of: two for stacked gate and up projections."""
    match = EXPERTS.fullmatch(module)
    if match is None:
        return [module]
    projections = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else (match[2],)
    return [f"{match[1]}switch_mlp.{projection}" for projection in projections]


def _tensor_info(name: str, tensor: Tensor, files: _Files) -> TensorInfo:
    """Describe a tensor as the loader has it, but with the stored dtype if it is not packed."""
    if isinstance(tensor, Packed):
        code = Code(tensor.mode, tensor.bits, tensor.group_size)
    else:
        dtype = files.weights[name].dtype
        # anything but a float is FP8 in blocks, which some files call U8
        code = _code(dtype) if dtype in DTYPE_NAMES else Code("fp8", 8, FP8_BLOCK)
    return TensorInfo(name, tensor_class(name), code, tensor.shape, files.nbytes[name])


def _stored_info(kind: str, entry: Entry) -> TensorInfo:
    return TensorInfo(printable(entry.name), kind, _code(entry.dtype), entry.shape, _nbytes(entry))


def _code(dtype: str) -> Code:
    return Code(DTYPE_NAMES.get(dtype, dtype.lower()), 8 * ITEM_NBYTES[dtype])


def _nbytes(entry: Entry) -> int:
    return entry.end - entry.begin


def _template_notice(folder: Path) -> str:
    """A sentence on where the chat template comes from, or why it cannot be used."""
    try:
        template = Template.load(folder)
    except TemplateError as error:
        return str(error)
    return template.notice or f"the chat template is in {template.origin}"
