"""How well a model predicts text, and how far its predictions are from a reference's, by kind of text.

Owns the packaged evaluation texts. The reference reads them first and leaves its hidden states in a cache on
disk, so that of two models only one, and the other's head, are in memory at a time. Refuses pairs with
different vocabularies, and texts too short to say anything.
"""

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from filecmp import cmp
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig
from ..engine.followers import load_model
from ..engine.loading import load_head
from ..errors import GenerationError, QchatError, TokenizerError, UsageError
from ..machine.backend import mx
from ..machine.files import read_text
from ..model.network import Model
from ..ops.linear import Linear
from ..text.tokenizer import Tokenizer
from .hidden_cache import HiddenCache

# what each kind of text is made of stands in the file of its name
KINDS = ("prose", "chat", "code", "lists", "reasoning", "tools", "languages")
TEXTS = Path(__file__).parent / "texts"
OVERALL = "all"
MAX_TEXT_NBYTES = 16 << 20
MIN_TOKENS = 16
MIN_CONTEXT = 8
CHUNK = 512  # tokens that the model reads at once
LOGITS_NBYTES = 64 << 20  # of one model's logits in memory at a time
PART = 256  # of a row of the vocabulary, summed by itself
TOP_SHARE = 0.99

# what is being done, tokens done, tokens in all
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Score:
    """Of one kind of text, over `tokens` predictions; divergences in nats; None without a reference.

    perplexity: exp of the mean negative log-likelihood. kl_mean, kl_p99: of sum p log(p / q) over the whole
    vocabulary, p the reference's. top1_agreement: the share of tokens where both have the same favourite.
    """

    kind: str
    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """`scores` by kind of text; `overall` is over all their tokens."""

    model: str
    reference: str | None
    context: int
    scores: tuple[Score, ...]
    overall: Score

    def as_json(self) -> dict[str, Any]:
        """Values that `json.dumps` takes."""
        return asdict(self)

    def as_table(self) -> str:
        """Lines of text for a terminal of 80 columns."""
        width = max(len(score.kind) for score in (*self.scores, self.overall)) + 1
        compared = self.reference is not None
        more = f"{'reference':>12}{'mean KL':>11}{'99 % KL':>11}{'top-1':>10}" if compared else ""
        lines = [f"{'text':<{width}}{'tokens':>9}{'perplexity':>12}{more}"]
        rows = self.scores if len(self.scores) == 1 else (*self.scores, self.overall)
        lines += [f"{row.kind:<{width}}{_cells(row)}" for row in rows]
        return "\n".join(lines)


def _cells(score: Score) -> str:
    cells = f"{score.tokens:>9,}{score.perplexity:>12,.4g}"
    if score.kl_mean is None:
        return cells
    agreement = f"{100 * (score.top1_agreement or 0):.2f} %"
    divergences = f"{score.kl_mean:>11.6f}{score.kl_p99:>11.5f}"
    return f"{cells}{score.reference_perplexity:>12,.4g}{divergences}{agreement:>10}"


@dataclass(frozen=True)
class Window:
    """Consecutive ids of one text; every id but the first is predicted from those before it here."""

    kind: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A model folder of which no weights have been read."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, folder: Path) -> "Source":
        """Raises ConfigError and TokenizerError."""
        return cls(folder, ModelConfig.load(folder), Tokenizer.load(folder))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, special tokens recognised. Raises TokenizerError for one the model lacks."""
        ids = self.tokenizer.encode(text)
        if max(ids, default=0) >= self.config.vocab_size:
            raise TokenizerError(
                f"{self.folder}: the tokenizer gives the id {max(ids):,}, and the model's vocabulary has "
                f"{self.config.vocab_size:,}: they do not belong together"
            )
        return ids


def packaged_texts() -> dict[str, str]:
    """The package's own evaluation texts by kind; no calibration reads them."""
    return {kind: (TEXTS / f"{kind}.txt").read_text(encoding="utf-8") for kind in KINDS}


def evaluate_model(
    model: Path,
    reference: Path | None = None,
    *,
    data: Path | None = None,
    context: int = 512,
    report: Report = lambda *_: None,
) -> Evaluation:
    """Read the texts with `model`, in windows of `context` tokens that each begin from nothing.

    With `reference`, its predictions are compared; they come from the cache where it has them. Without
    `data`, a text file, the packaged texts are read. Both models run as this machine runs them in a chat.
    Raises UsageError for a bad context and a text that is too short, TokenizerError for vocabularies that
    differ, DoesNotFit for a full disk, GenerationError for logits that are no numbers, and ModelError.
    """
    student = Source.open(model)
    teacher = Source.open(reference) if reference is not None else None
    for source in (student, teacher):
        _check_context(context, source)
    texts = packaged_texts() if data is None else {data.stem: read_text(data, UsageError, MAX_TEXT_NBYTES)}
    ids = {kind: student.encode(text) for kind, text in texts.items()}
    for kind, tokens in ids.items():
        if len(tokens) < MIN_TOKENS:
            raise UsageError(
                f"the text {kind} has {len(tokens)} tokens: an evaluation needs at least {MIN_TOKENS}"
            )
    if teacher is not None:
        _check_vocabularies(student, teacher, texts, ids)
    windows = [window for kind, tokens in ids.items() for window in _windows(kind, tokens, context)]
    tallies = _measure(student, teacher, windows, report)
    return Evaluation(
        model=str(model),
        reference=None if reference is None else str(reference),
        context=context,
        scores=tuple(tally.score(kind) for kind, tally in tallies.items()),
        overall=sum(tallies.values(), Tally()).score(OVERALL),
    )


def _check_context(context: int, source: Source | None) -> None:
    limit = source.config.max_position_embeddings if source is not None else context
    if not MIN_CONTEXT <= context <= limit:
        raise UsageError(f"--context is {context}, wanted {MIN_CONTEXT} to {limit:,} tokens")


def _windows(kind: str, ids: Sequence[int], context: int) -> Iterator[Window]:
    for begin in range(0, len(ids) - 1, context):
        window = Window(kind, tuple(ids[begin : begin + context]))
        if len(window.ids) > 1:
            yield window


def _check_vocabularies(
    student: Source, teacher: Source, texts: Mapping[str, str], ids: Mapping[str, list[int]]
) -> None:
    """Raises TokenizerError unless every id means the same to both."""
    pair = f"{student.folder} and {teacher.folder} cannot be compared"
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise TokenizerError(f"{pair}: their vocabularies have {sizes[0]:,} and {sizes[1]:,} entries")
    if not cmp(student.folder / "tokenizer.json", teacher.folder / "tokenizer.json", shallow=False):
        for id in range(max(student.tokenizer.vocab_size, teacher.tokenizer.vocab_size)):
            mine, theirs = (source.tokenizer.decode([id]) for source in (student, teacher))
            if mine != theirs:
                raise TokenizerError(
                    f"{pair}: token {id:,} is {mine!r:.40} to one and {theirs!r:.40} to the other"
                )
    for kind, text in texts.items():
        if teacher.encode(text) != ids[kind]:
            raise TokenizerError(f"{pair}: their tokenizers cut the text {kind} into different tokens")


@dataclass(frozen=True)
class Outputs:
    """What a model made of one window: hidden states [T, hidden]; the head makes logits [T, V] of them."""

    head: Linear
    hidden: mx.array

    def predict(self, begin: int, end: int) -> "Predictions":
        return Predictions(self.head(self.hidden[None, begin:end])[0])


class Predictions:
    """The distributions that logits [T, V] of any float dtype stand for, in float32.

    Kept as x - max x, its exponential, and the sum of that [T, 1]. Losses and divergences have an absolute
    error of about 1e-6 nats at 250,000 entries.
    """

    def __init__(self, logits: mx.array):
        logits = logits.astype(mx.float32)
        self._shifted = logits - logits.max(axis=-1, keepdims=True)
        self._exps = mx.exp(self._shifted)
        self._total = _row_sums(self._exps)

    def losses(self, targets: mx.array) -> mx.array:
        """The negative log-likelihood [T] of the ids `targets` [T], in nats."""
        chosen = mx.take_along_axis(self._shifted, targets[:, None], axis=-1)
        return (mx.log(self._total) - chosen)[:, 0]

    def divergence(self, other: "Predictions") -> mx.array:
        """KL(self || other) = sum p (log p - log q) [T], in nats; never negative."""
        differences = _row_sums(self._exps * (self._shifted - other._shifted)) / self._total
        return mx.maximum(differences - mx.log(self._total / other._total), 0.0)[:, 0]

    def favourites(self) -> mx.array:
        """The likeliest id of each row [T]."""
        return self._shifted.argmax(axis=-1)


def _row_sums(values: mx.array) -> mx.array:
    """Sums [T, 1] over rows [T, V], of sums of parts: adding V numbers one by one loses four digits."""
    rows, width = values.shape
    if width % PART:
        values = mx.pad(values, [(0, 0), (0, -width % PART)])
    return values.reshape(rows, -1, PART).sum(axis=-1).sum(axis=-1, keepdims=True)


@dataclass
class Tally:
    """What was measured of each token so far: float64 values in nats, and whether the favourites agree."""

    losses: array = field(default_factory=lambda: array("d"))
    reference_losses: array = field(default_factory=lambda: array("d"))
    divergences: array = field(default_factory=lambda: array("d"))
    agreed: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.losses + other.losses,
            self.reference_losses + other.reference_losses,
            self.divergences + other.divergences,
            self.agreed + other.agreed,
        )

    def add(self, window: Window, outputs: Outputs, wanted: Outputs | None, rows: int) -> bool:
        """Measure one window, `rows` rows of logits at a time; False if a figure is no finite number."""
        last = len(window.ids) - 1
        for begin in range(0, last, rows):
            end = min(begin + rows, last)
            targets = mx.array(window.ids[begin + 1 : end + 1])
            predicted = outputs.predict(begin, end)
            measured = _values(predicted.losses(targets))
            self.losses.extend(measured)
            if wanted is not None:
                measured += self._compare(wanted.predict(begin, end), predicted, targets)
            if not all(map(math.isfinite, measured)):
                return False
        return True

    def _compare(self, wanted: Predictions, predicted: Predictions, targets: mx.array) -> list[float]:
        """Returns the divergences."""
        divergences = _values(wanted.divergence(predicted))
        self.reference_losses.extend(_values(wanted.losses(targets)))
        self.divergences.extend(divergences)
        self.agreed += int((wanted.favourites() == predicted.favourites()).sum())
        return divergences

    def score(self, kind: str) -> Score:
        score = Score(kind, len(self.losses), _perplexity(self.losses))
        if not self.divergences:
            return score
        return replace(
            score,
            reference_perplexity=_perplexity(self.reference_losses),
            kl_mean=math.fsum(self.divergences) / len(self.divergences),
            kl_p99=percentile(self.divergences, TOP_SHARE),
            top1_agreement=self.agreed / len(self.divergences),
        )


def _perplexity(losses: array) -> float:
    # the largest exponent that a float has room for: a broken model gets an absurd figure, not an error
    return math.exp(min(math.fsum(losses) / len(losses), 709.0))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, interpolated linearly between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _values(row: mx.array) -> list[float]:
    return row.tolist()  # pyright: ignore[reportReturnType]


def _measure(
    student: Source, teacher: Source | None, windows: Sequence[Window], report: Report
) -> dict[str, Tally]:
    """Tallies by kind. The reference reads first, if it has to, and is gone before the model comes."""
    cache = _fill_cache(teacher, windows, report) if teacher is not None else None
    mx.clear_cache()  # what the reference's weights took
    head = load_head(teacher.folder, teacher.config) if teacher is not None else None
    model = load_model(student.folder, student.config)
    rows = max(1, LOGITS_NBYTES // (4 * student.config.vocab_size))
    tallies = {window.kind: Tally() for window in windows}
    for window in _reported(windows, f"reading with {student.folder.name}", report):
        outputs = Outputs(model.head, hidden_states(model, window.ids))
        wanted = None if cache is None or head is None else Outputs(head, _recalled(cache, window))
        if not tallies[window.kind].add(window, outputs, wanted, rows):
            folders = " or ".join(str(source.folder) for source in (student, teacher) if source is not None)
            raise GenerationError(f"{folders} gives logits that are not finite numbers")
    return tallies


def _fill_cache(teacher: Source, windows: Sequence[Window], report: Report) -> HiddenCache:
    """Have the reference read every window that is not in its cache. Raises DoesNotFit and ModelError."""
    cache = HiddenCache.open(teacher.folder, teacher.config)
    missing = [window for window in windows if cache.read(window.ids) is None]
    if missing:
        cache.check_room(sum(len(window.ids) for window in missing))
        model = load_model(teacher.folder, teacher.config)
        for window in _reported(missing, f"reading with the reference {teacher.folder.name}", report):
            cache.write(window.ids, hidden_states(model, window.ids))
        cache.forget_others()
    return cache


def _recalled(cache: HiddenCache, window: Window) -> mx.array:
    hidden = cache.read(window.ids)
    if hidden is None:
        raise QchatError(
            f"the cache {cache.folder} was changed while it was in use: run the evaluation again"
        )
    return hidden


def _reported(windows: Sequence[Window], doing: str, report: Report) -> Iterator[Window]:
    """`windows`, with a report before each and at the end."""
    total, done = sum(len(window.ids) for window in windows), 0
    for window in windows:
        report(doing, done, total)
        yield window
        done += len(window.ids)
    report(doing, total, total)


def hidden_states(model: Model, ids: Sequence[int]) -> mx.array:
    """The states [T, hidden] after the final norm for ids [T] read from nothing, evaluated."""
    cache, parts = model.new_cache(), []
    for begin in range(0, len(ids), CHUNK):
        part = model.hidden(ids[begin : begin + CHUNK], cache)[0]
        mx.eval(part, cache.arrays())
        parts.append(part)
    whole = mx.concatenate(parts)
    mx.eval(whole)
    mx.clear_cache()
    return whole
