"""The published variants of 27B, 9B and 35B-A3B, and estimates of whether a model fits into memory.

The sizes of a family follow from the recipes; `python -m qchat.core.quant.plan` computes them. Models that
were published with another mix of formats stand in `OTHERS`, with the sizes that their owner names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig
from ..machine.memory import model_limit_nbytes

# the small model in the package, the default
BUILT_IN_MODEL = Path(__file__).parents[1] / "embedded"
GB = 10**9
WORKING_NBYTES = 1 << 30  # activations, recurrent states, MLX's own buffers
ROOMY_CONTEXT = 100_000  # tokens
USEFUL_CONTEXT = 4096  # tokens; a model with less room is not worth downloading
OWNER = "Brooooooklyn"


@dataclass(frozen=True)
class Fit:
    """An estimate of memory: bytes for weights and a short context, the limit, and the longest context."""

    needed_nbytes: int
    limit_nbytes: int
    context: int

    @property
    def fits(self) -> bool:
        return self.needed_nbytes <= self.limit_nbytes

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "fits": self.fits}

    @property
    def summary(self) -> str:
        needed, limit = self.needed_nbytes / GB, self.limit_nbytes / GB
        if not self.fits:
            return f"does not fit: needs {needed:.1f} GB of memory, {limit:.1f} GB are available"
        return f"fits: {needed:.1f} of {limit:.1f} GB of memory, context up to {self.context:,} tokens"


@dataclass(frozen=True)
class PublishedModel:
    """A published variant; `token_nbytes` is the KV cache per token, `context` the longest context."""

    id: str
    nbytes: int
    vision_nbytes: int
    bits_per_weight: float
    token_nbytes: int
    context: int = 262144

    @property
    def fit(self) -> Fit:
        return estimate_fit(self.nbytes - self.vision_nbytes, self.token_nbytes, self.context)


@dataclass(frozen=True)
class _Family:
    base: str
    token_nbytes: int
    vision_nbytes: int
    # recipe name, bytes, bits per weight
    variants: tuple[tuple[str, int, float], ...]

    def published(self) -> list[PublishedModel]:
        return [
            PublishedModel(
                f"{OWNER}/{self.base}-{_HUB_NAMES.get(name, name)}-mlx",
                nbytes,
                self.vision_nbytes,
                bits,
                self.token_nbytes,
            )
            for name, nbytes, bits in self.variants
        ]


# recipe names that differ on the hub
_HUB_NAMES = {"NVFP4_K_XL": "NVFP4", "MXFP4_K_XL": "UD-MXFP4_K_XL", "MXFP8_K_XL": "UD-MXFP8_K_XL"}
FAMILIES = (
    _Family(
        "Qwen3.6-27B",
        65536,
        921460192,
        (
            ("UD-Q2_K_XL", 15576022496, 4.555),
            ("UD-Q3_K_XL", 18683084256, 5.464),
            ("NVFP4_K_XL", 21949070816, 6.419),
            ("MXFP4_K_XL", 21592554976, 6.314),
            ("UD-Q4_K_XL", 21949070816, 6.419),
            ("UD-Q5_K_XL", 25706249696, 7.517),
            ("UD-Q6_K_XL", 28558376416, 8.351),
            ("MXFP8_K_XL", 30713200096, 8.982),
            ("UD-Q8_K_XL", 31410503136, 9.185),
        ),
    ),
    _Family(
        "Qwen3.5-9B",
        32768,
        912020960,
        (
            ("UD-Q2_K_XL", 5851366880, 4.975),
            ("UD-Q3_K_XL", 6902564320, 5.868),
            ("UD-Q4_K_XL", 8080901600, 6.87),
            ("UD-Q5_K_XL", 9325037024, 7.928),
            ("UD-Q6_K_XL", 10130343392, 8.613),
            ("UD-Q8_K_XL", 10935649760, 9.297),
        ),
    ),
    _Family(
        "Qwen3.6-35B-A3B",
        20480,
        893142496,
        (
            ("UD-Q2_K_XL", 14216400352, 3.24),
            ("UD-Q3_K_XL", 18503765472, 4.217),
            ("MXFP4_K_XL", 22180990432, 5.054),
            ("UD-Q4_K_XL", 22854700512, 5.208),
            ("UD-Q5_K_XL", 27260030432, 6.212),
            ("UD-Q6_K_XL", 32649711072, 7.44),
            ("MXFP8_K_XL", 36999335392, 8.431),
            ("UD-Q8_K_XL", 38039391712, 8.668),
        ),
    ),
)
# Qwen3.8-27B has the sizes of Qwen3.6-27B: 168 modules in MXFP4, 233 in MXFP8, the rest in bfloat16
OTHERS = (PublishedModel(f"{OWNER}/Qwen3.8-27B-MXFP4-mlx", 23277610464, 921460192, 6.807, 65536),)
PUBLISHED: tuple[PublishedModel, ...] = (
    *(one for family in FAMILIES for one in family.published()),
    *OTHERS,
)


def token_nbytes(config: ModelConfig) -> int:
    """Return the bytes of one token in a 16-bit KV cache."""
    layers = config.layer_types.count("full_attention")
    return layers * 2 * config.num_key_value_heads * config.head_dim * 2


def estimate_fit(weights_nbytes: int, token_nbytes: int, max_context: int) -> Fit:
    """Estimate the memory for these weights and a conversation of at most `max_context` tokens."""
    limit = model_limit_nbytes()
    room = max(limit - weights_nbytes - WORKING_NBYTES, 0)
    needed = weights_nbytes + WORKING_NBYTES + min(USEFUL_CONTEXT, max_context) * token_nbytes
    return Fit(needed, limit, min(room // max(token_nbytes, 1), max_context))


def rank_models(models: Sequence[PublishedModel]) -> list[PublishedModel]:
    """Return `models` with the most useful on this machine first.

    Those that fit come first, of these those with room for a long conversation, of these the largest; of
    those that do not fit the smallest.
    """

    def usefulness(model: PublishedModel) -> tuple[int, int]:
        fit = model.fit
        return (min(fit.context, ROOMY_CONTEXT), model.nbytes) if fit.fits else (0, -model.nbytes)

    return sorted(models, key=usefulness, reverse=True)
