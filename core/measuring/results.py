"""The results of measurements, as frozen values that JSON can carry. Imports no MLX."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# the ends of a 95 % confidence interval
Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """Figures of one kind of text over `tokens` predictions; None where there is no reference.

    perplexity: exp of the mean negative log-likelihood. kl_mean, kl_p99: mean and 99th percentile of
    KL(reference || model) = sum p log(p / q) in nats, over the whole vocabulary. kl_interval: where the mean
    is with 95 % confidence, by bootstrap over stretches of text. top1_agreement: the share of tokens where
    both models have the same likeliest id.
    """

    kind: str
    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    kl_interval: Interval | None = None


@dataclass(frozen=True)
class Flip:
    """A token where the likeliest one is another than the reference's; `kl` is the divergence there in nats.

    `before` is the text that comes before it.
    """

    kind: str
    before: str
    reference: str
    model: str
    kl: float


@dataclass(frozen=True)
class Evaluation:
    """The `scores` of each kind of text, and the `overall` score of all their tokens.

    `flips`: the tokens with another likeliest one than the reference's, those of the greatest divergence.
    `nbytes` is the size of the model's weight files.
    """

    model: str
    reference: str | None
    context: int
    scores: tuple[Score, ...]
    overall: Score
    nbytes: int = 0
    flips: tuple[Flip, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return values that `json.dumps` accepts."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluations:
    """Models evaluated with the same text.

    `behind` has for each the 95 % interval of its mean KL less that of the closest one, over the same
    stretches of text; None for that one itself, and for all where there is no reference.
    """

    rows: tuple[Evaluation, ...]
    behind: tuple[Interval | None, ...]

    def as_json(self) -> dict[str, Any]:
        """Return values that `json.dumps` accepts."""
        return asdict(self)


@dataclass(frozen=True)
class PeerFigures:
    """Another runtime's speeds with the same model."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_nbytes: int


@dataclass(frozen=True)
class BenchResult:
    """One model's figures; None for prompts longer than its context, and for a random model's conversation.

    `capitals_tokens_per_s` is the speed of the fastest of turns 2 to 4, the median of all runs;
    `decode_tokens_per_s` that of a sustained reply. `bandwidth` is that of a copy on this device, in bytes/s;
    `bandwidth_share` is the share of it that decoding uses to read weights. `against` has mlx-lm's figures.
    """

    model: str
    path: str
    nbytes: int
    load_seconds: float
    capitals_tokens_per_s: float | None
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    prefills: dict[int, float | None]
    first_token_seconds: float | None
    cached_first_token_seconds: float | None
    peak_nbytes: int
    step_nbytes: int
    bandwidth: float
    speeds: list[float] = field(default_factory=list)
    against: PeerFigures | None = None

    @property
    def bandwidth_share(self) -> float:
        """The bytes of weights read per second, as a share of the bandwidth."""
        return self.step_nbytes * self.decode_tokens_per_s / self.bandwidth

    def as_json(self) -> dict[str, Any]:
        """Return values that `json.dumps` accepts."""
        return asdict(self) | {"bandwidth_share": self.bandwidth_share}


@dataclass(frozen=True)
class Bench:
    """A row for each measured model."""

    rows: tuple[BenchResult, ...]


@dataclass(frozen=True)
class Calibration:
    """The result of one run: `chunks` of `chunk_size` tokens, `resumed` of them read by an earlier run.

    `experts` counts those of all layers, `unreached` those of them that received no token.
    """

    path: Path
    chunks: int
    chunk_size: int
    resumed: int
    modules: int
    experts: int
    unreached: int


@dataclass(frozen=True)
class Answer:
    """One of two models' replies to the same prompt."""

    model: str
    text: str
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Comparison:
    """Both models' replies, and the divergence of their predictions; None where their tokens differ."""

    rows: tuple[Answer, ...]
    kl_mean: float | None = None
    top1_agreement: float | None = None
