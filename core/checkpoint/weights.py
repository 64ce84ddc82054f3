"""A model folder's weights as named, checked, lazy arrays, the same from whatever layout they are stored in.

The shape of the conv1d tells the raw layout from the converted one; the values of the norms confirm it.
Refuses a contradiction between the two, and names tensors that are missing, unknown or misshapen.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import WeightsError
from ..machine.backend import mx
from .assemble import Assembler, Tensor
from .config import ModelConfig
from .layouts import MTP_PREFIX, body_specs, mtp_specs
from .packed import Packed, read_hints
from .reader import LazyReader
from .stored import Checkpoint, Stored, are_equal, open_checkpoint

__all__ = ["Packed", "Progress", "Tensor", "Weights", "load_weights"]

# bytes read, bytes in all, the tensor that is read next
Progress = Callable[[int, int, str], None]

Layout = Literal["raw", "converted"]
PROBED_NORMS = 32
MTP_LAYER = f"{MTP_PREFIX}layers."
# Trained raw norms have medians of -0.5 to 0.4, converted ones 0.5 to 1.4. An AWQ fold may make the median of
# a converted norm small, but it keeps the signs: hence the share of raw weights that are not positive.
NEAR = 0.25
RAW_NONPOSITIVE_SHARE = 0.1


@dataclass(frozen=True)
class Weights:
    """The lazy tensors of one model by canonical name; `repairs` lists what had to be interpreted.

    Norm weights are float32 factors of x (1 + w if the checkpoint stores w). `A_log` and `dt_bias` are
    float32, `conv1d` is [C, K]. The rest is as stored, or bfloat16 if stored in FP8.
    """

    tensors: Mapping[str, Tensor]
    repairs: tuple[str, ...]
    has_mtp: bool

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def settle(self, config: ModelConfig) -> ModelConfig:
        """The config of these weights: `config`, with the flag of tied embeddings as the files have it."""
        return replace(config, tie_word_embeddings="lm_head" not in self.tensors)

    @property
    def parameters(self) -> int:
        """The number of weights, packed or not."""
        return sum(
            tensor.scales.size * tensor.group_size if isinstance(tensor, Packed) else tensor.size
            for tensor in self.tensors.values()
        )


class Watched(Mapping[str, Tensor]):
    """The same tensors; asking for one tells `progress` that those asked for before have been read."""

    def __init__(self, weights: Weights, progress: Progress):
        self._tensors, self._progress = weights.tensors, progress
        self._done, self._total = 0, weights.nbytes

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self._progress(self._done, self._total, name)
        self._done += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_weights(model: Path | Checkpoint, config: ModelConfig) -> Weights:
    """Find, check and name every tensor that `config` asks for. Reads no values but those of a few norms.

    `model` is a folder or an opened checkpoint.

    Raises ModelError if there is no such folder, WeightsError naming the file and the tensor, and ConfigError
    for the quantization of another program.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    hints = read_hints(config.quantization, config.source)
    assembler = Assembler(checkpoint.folder, checkpoint.modules, LazyReader().read, hints)
    config = _settle_tie(config, checkpoint, assembler)
    specs = body_specs(config) | (mtp_specs(config) if checkpoint.has_mtp else {})
    tensors = {name: assembler.build(name, spec) for name, spec in specs.items() if spec.kind != "norm"}
    norms = {name: assembler.norm(name, spec) for name, spec in specs.items() if spec.kind == "norm"}
    assembler.refuse_leftovers()
    convs = [checkpoint.modules[name]["weight"] for name, spec in specs.items() if spec.kind == "conv"]
    body = _body_layout(checkpoint, convs, norms)
    head = _head_layouts(checkpoint, body, norms)
    for name, norm in norms.items():
        tensors[name] = 1 + norm if head.get(name, body) == "raw" else norm
    layouts = _layout_repairs(body, head, _odd_norms(body, head, norms))
    repairs = (*config.notes, *layouts, *_file_repairs(checkpoint, config))
    fp8 = any("scale_inv" in module for module in checkpoint.modules.values())
    repairs += (*_hint_repairs(config, tensors, fp8), *_note_sentences(assembler))
    return Weights(tensors, repairs, checkpoint.has_mtp)


def _settle_tie(config: ModelConfig, checkpoint: Checkpoint, assembler: Assembler) -> ModelConfig:
    """The config, untied if the files hold a head that differs from the embedding, whatever the flags say."""
    head, embedding = (checkpoint.modules.get(name) for name in ("lm_head", "embed_tokens"))
    if not config.tie_word_embeddings or head is None or embedding is None:
        return config
    if any(not _may_be_embedding(stored, config) for stored in embedding.values()):
        return config  # another shape than the model's is refused, and not read before
    if are_equal(head, embedding):
        assembler.ignore("lm_head", "the embedding is tied, so a stored copy of it was ignored")
        return config
    assembler.note("config.json ties the embedding, but another head is stored, which is used", "lm_head")
    return replace(config, tie_word_embeddings=False)


def _may_be_embedding(stored: Stored, config: ModelConfig) -> bool:
    """Whether a part of the embedding, packed or not, is no larger than the config says."""
    shape = stored.entry.shape
    return len(shape) == 2 and shape[0] <= config.vocab_size and shape[1] <= config.hidden_size


def _body_layout(checkpoint: Checkpoint, convs: list[Stored], norms: dict[str, mx.array]) -> Layout:
    """The layout by the shape of every conv1d, [C, 1, K] or [C, K, 1]; the norms' values must agree."""
    values = _layout_by_values(checkpoint, [name for name in norms if not name.startswith(MTP_PREFIX)], norms)
    if not convs:
        if values is None:
            raise WeightsError(f"{checkpoint.folder}: neither a conv1d nor the norms tell raw from converted")
        return values
    shape = _conv_layout(convs[0])
    for conv in convs:
        if _conv_layout(conv) != shape:
            raise conv.refuse(f"is in the {_conv_layout(conv)} layout, and the first conv1d is {shape}")
    if values not in (None, shape):
        raise convs[0].refuse(f"is in the {shape} layout, but the norm weights have {values} values")
    return shape


def _conv_layout(conv: Stored) -> Layout:
    return "raw" if conv.entry.shape[-1] != 1 else "converted"


def _head_layouts(checkpoint: Checkpoint, body: Layout, norms: dict[str, mx.array]) -> dict[str, Layout]:
    """The layout of each norm of the MTP head, which has no conv1d: raw in a raw model, else by values.

    Some converters copied a raw head into a converted model, or shifted only the norms whose names they knew,
    and a separate file may come from anywhere. A norm whose own values do not tell is as those beside it.
    """
    names = [name for name in norms if name.startswith(MTP_PREFIX)]
    if not names or (body == "raw" and checkpoint.shards.mtp is None):
        return dict.fromkeys(names, body)
    whole = _layout_by_values(checkpoint, names, norms) or body
    layouts: dict[str, Layout] = {}
    for in_layer in (True, False):  # what converters know are the names of a layer's norms
        group = [name for name in names if name.startswith(MTP_LAYER) == in_layer]
        beside = _layout_by_values(checkpoint, group, norms) or whole
        layouts |= {name: _layout_by_values(checkpoint, [name], norms) or beside for name in group}
    return layouts


def _odd_norms(body: Layout, head: Mapping[str, Layout], norms: Mapping[str, mx.array]) -> list[str]:
    """Norms of the MTP head that were taken as raw, although their values are those of converted ones."""
    values = {name: norms[name] for name, layout in head.items() if layout == body == "raw"}
    return [name for name, norm in values.items() if mx.abs(mx.median(norm) - 1) < NEAR and mx.min(norm) > 0]


def _layout_by_values(checkpoint: Checkpoint, names: list[str], norms: dict[str, mx.array]) -> Layout | None:
    """The layout that the norms' values suggest: a median near 0 is raw, near 1 converted, else unknown."""
    sample = mx.concatenate([norms[name] for name in names[:PROBED_NORMS]])
    median = mx.median(sample)
    if not mx.isfinite(median):
        name = next(name for name in names if not mx.isfinite(norms[name]).all())
        raise WeightsError(f"{checkpoint.folder}: the norm weights ({name}, ...) are not finite numbers")
    if mx.abs(median) < NEAR and mx.mean(sample <= 0) >= RAW_NONPOSITIVE_SHARE:
        return "raw"
    return "converted" if mx.abs(median - 1) < NEAR else None


def _layout_repairs(body: Layout, head: Mapping[str, Layout], odd: list[str]) -> tuple[str, ...]:
    repairs = []
    if body == "raw":
        repairs.append("raw Hugging Face layout: 1 was added to the zero-centred norm weights")
    found = set(head.values())
    if len(found) > 1:
        raw = [name for name, layout in head.items() if layout == "raw"]
        repairs.append(f"1 was added to some norms of the MTP head, which are raw: {', '.join(raw)}")
    elif found - {body}:
        repairs.append(f"the MTP head is in the {found.pop()} layout although the model is {body}")
    if odd:
        repairs.append(
            f"norms of the MTP head look converted in a raw model, so it may draft badly: {', '.join(odd)}"
        )
    return tuple(repairs)


def _file_repairs(checkpoint: Checkpoint, config: ModelConfig) -> tuple[str, ...]:
    repairs = []
    if checkpoint.vision and "vision_config" not in config.raw:
        repairs.append(f"the vision tower was ignored ({len(checkpoint.vision)} tensors)")
    if checkpoint.shards.has_stale_index:
        names = ", ".join(path.name for path in checkpoint.shards.paths[:3])
        repairs.append(f"the index names files that are not in the folder, so {names} is read without it")
    mtp_file = checkpoint.shards.mtp
    if mtp_file is not None:
        repairs.append(f"the MTP head was found in {mtp_file.relative_to(checkpoint.folder)}")
    if checkpoint.has_mtp and not config.mtp_num_hidden_layers:
        repairs.append("an MTP head was found that config.json does not mention")
    if config.mtp_num_hidden_layers and not checkpoint.has_mtp:
        repairs.append("config.json mentions an MTP head that the files do not hold")
    return tuple(repairs)


def _hint_repairs(config: ModelConfig, tensors: Mapping[str, Tensor], fp8: bool) -> tuple[str, ...]:
    if not config.quantization or fp8 or any(isinstance(tensor, Packed) for tensor in tensors.values()):
        return ()
    return ("config.json speaks of a quantization, and no tensor is packed",)


def _note_sentences(assembler: Assembler) -> tuple[str, ...]:
    """One sentence for each kind of note, however many tensors it is about."""
    sentences = []
    for sentence, names in assembler.notes.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        sentences.append(f"{sentence}: {names[0]}{more}")
    return tuple(sentences)


class WeightScope:
    """The weights whose names begin with `prefix`, looked up by what follows it."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = ""):
        self.tensors = tensors
        self.prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
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
