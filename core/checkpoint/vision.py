"""The vision tower of a checkpoint: its config, its tensors by name and shape, and where they are stored.

Raw checkpoints call it `model.visual`, converted ones `vision_tower`; the names after that are the same.
Refuses bad sizes by field, and packed tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .assemble import FLOATS
from .config import MAX_LAYERS, MAX_WIDTH, ModelConfig
from .fields import Fields
from .layouts import VISION_PREFIXES
from .stored import Stored

PATCHES = "patch_embed.proj.weight"
DEFAULT_HEADS = 16  # transformers' default


@dataclass(frozen=True)
class VisionConfig:
    """The sizes of one tower; `deepstack_visual_indexes` are the blocks with a merger of their own."""

    where: str
    depth: int
    hidden_size: int
    intermediate_size: int
    out_hidden_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    hidden_act: str

    @classmethod
    def of(cls, config: ModelConfig) -> "VisionConfig | None":
        """Return the tower that `config` describes; None without one. Raises ConfigError."""
        if not isinstance(config.raw.get("vision_config"), Mapping):
            return None
        if config.raw.get("language_model_only") is True:
            return None
        fields = Fields(config.raw, config.source).section("vision_config")
        depth = fields.integer("depth", 1, MAX_LAYERS)
        widths = (
            *("hidden_size", "intermediate_size", "out_hidden_size", "in_channels", "patch_size"),
            *("temporal_patch_size", "spatial_merge_size", "num_position_embeddings"),
        )
        return cls(
            where=fields.where,
            depth=depth,
            num_heads=fields.integer("num_heads", 1, MAX_WIDTH, default=DEFAULT_HEADS),
            deepstack_visual_indexes=_block_numbers(fields, "deepstack_visual_indexes", depth),
            hidden_act=str(fields.values.get("hidden_act") or "gelu_pytorch_tanh"),
            **{name: fields.integer(name, 1, MAX_WIDTH) for name in widths},
        )

    @property
    def patch_values(self) -> int:
        """The values of one patch: channels, frames, rows and columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def joined_size(self) -> int:
        """The width of the patches that a merger joins."""
        return self.hidden_size * self.spatial_merge_size**2

    def check_supported(self) -> None:
        """Raise ConfigError for what the tower's network cannot compute."""
        side = round(self.num_position_embeddings**0.5)
        wrong = {
            f"num_heads is {self.num_heads}, wanted heads of a width that 4 divides": self.hidden_size
            % (4 * self.num_heads),
            f"num_position_embeddings is {self.num_position_embeddings}, wanted a square number": side**2
            - self.num_position_embeddings,
            f"hidden_act is {self.hidden_act!r:.40}, wanted gelu_pytorch_tanh": self.hidden_act
            != "gelu_pytorch_tanh",
            f"in_channels is {self.in_channels}, wanted 3": self.in_channels - 3,
        }
        for sentence, is_wrong in wrong.items():
            if is_wrong:
                raise ConfigError(f"{self.where}: {sentence}")


def _block_numbers(fields: Fields, name: str, depth: int) -> tuple[int, ...]:
    found = fields.values.get(name) or []
    known = isinstance(found, list | tuple) and all(type(one) is int and 0 <= one < depth for one in found)
    if not known or len(set(found)) < len(found):
        raise fields.refuse(name, "a list of layers")
    return tuple(found)


def vision_specs(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the tower by name; patches are [N, T, H, W, C], as MLX has them.

    As in Hugging Face's Qwen3_5VisionModel, with the mergers of Qwen3VLVisionModel after `deepstack` blocks.
    """
    width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        PATCHES: (width, config.temporal_patch_size, patch, patch, config.in_channels),
        "patch_embed.proj.bias": (width,),
        "pos_embed.weight": (config.num_position_embeddings, width),
    }
    for block in range(config.depth):
        prefix = f"blocks.{block}."
        for norm in ("norm1", "norm2"):
            shapes |= _pair(f"{prefix}{norm}", width)
        shapes |= _pair(f"{prefix}attn.qkv", 3 * width, width) | _pair(f"{prefix}attn.proj", width, width)
        shapes |= _pair(f"{prefix}mlp.linear_fc1", inner, width)
        shapes |= _pair(f"{prefix}mlp.linear_fc2", width, inner)
    shapes |= _merger("merger.", config, config.hidden_size)
    for place in range(len(config.deepstack_visual_indexes)):
        shapes |= _merger(f"deepstack_merger_list.{place}.", config, config.joined_size)
    return shapes


def _merger(prefix: str, config: VisionConfig, norm: int) -> dict[str, tuple[int, ...]]:
    joined = config.joined_size
    project = _pair(f"{prefix}linear_fc2", config.out_hidden_size, joined)
    return _pair(f"{prefix}norm", norm) | _pair(f"{prefix}linear_fc1", joined, joined) | project


def _pair(name: str, rows: int, *columns: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a weight and its bias."""
    return {f"{name}.weight": (rows, *columns), f"{name}.bias": (rows,)}


@dataclass(frozen=True)
class VisionTensor:
    """A stored tensor of the vision tower.

    A patch embedding may be in Hugging Face's order [N, C, T, H, W]; MLX has [N, T, H, W, C].
    """

    stored: Stored
    is_channels_first: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in MLX's order."""
        shape = self.stored.entry.shape
        return (shape[0], *shape[2:], shape[1]) if self.is_channels_first else shape


def find_vision(tensors: Sequence[Stored], config: ModelConfig) -> dict[str, VisionTensor]:
    """Return the tensors of the tower by name, without a prefix. Raises WeightsError if one is packed."""
    fields = config.raw.get("vision_config")
    channels = fields.get("in_channels", 3) if isinstance(fields, Mapping) else 3
    found: dict[str, VisionTensor] = {}
    for stored in tensors:
        entry = stored.entry
        if entry.dtype not in FLOATS:
            raise stored.refuse(f"is {entry.dtype}, and a vision tower is used in floating point only")
        prefix = next(prefix for prefix in VISION_PREFIXES if entry.name.startswith(prefix))
        first = len(entry.shape) == 5 and entry.shape[1] == channels and "visual." in prefix
        found[entry.name.removeprefix(prefix)] = VisionTensor(stored, first)
    return found
