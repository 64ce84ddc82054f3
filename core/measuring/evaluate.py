"""Quality of models by kind of text: perplexity, and divergence from a reference model.

Owns the packaged evaluation texts. The reference reads them first and its hidden states go to a cache on
disk, so that only one model and the head of the reference are in memory at a time. Refuses pairs with
different vocabularies, texts that are too short to be meaningful, and those that a model was calibrated on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path

from ..checkpoint.config import ModelConfig
from ..checkpoint.shards import find_shards
from ..engine.followers import load_model
from ..engine.loading import load_head
from ..errors import GenerationError, QchatError, TokenizerError, UsageError
from ..machine.backend import mx
from ..machine.files import read_text
from ..model.network import Model
from ..ops.linear import Linear
from ..text.tokenizer import Tokenizer
from .bootstrap import difference_interval
from .held_out import check_held_out
from .hidden_cache import HiddenCache
from .results import Evaluation, Evaluations, Flip, Interval
from .scores import MOST_FLIPS, FlippedId, ScoreCollector, Window, WindowOutputs

# each kind has a text file of its name
KINDS = ("prose", "chat", "code", "lists", "reasoning", "tools", "languages")
TEXTS_FOLDER = Path(__file__).parent / "texts"
OVERALL = "all"
MAX_TEXT_NBYTES = 16 << 20
MIN_TOKENS = 16
MIN_CONTEXT = 8
CHUNK = 512  # prefill chunk
FLIPS = 5
FLIP_CONTEXT = 12  # tokens shown before a flipped one
LOGITS_NBYTES = 64 << 20  # most memory for one model's logits

# receives the current stage, tokens done and total tokens
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ModelFolder:
    """A model's config and tokenizer, without its weights."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, folder: Path) -> "ModelFolder":
        """Read the config and tokenizer in `folder`. Raises ConfigError and TokenizerError."""
        config, tokenizer = ModelConfig.load(folder), Tokenizer.load(folder)
        tokenizer.check_vocabulary(config.vocab_size)
        return cls(folder, config, tokenizer)

    def encode(self, text: str) -> list[int]:
        """Encode `text`, special tokens included."""
        return self.tokenizer.encode(text)


def packaged_texts() -> dict[str, str]:
    """Return the packaged evaluation texts by kind; calibration must not use them."""
    return {kind: (TEXTS_FOLDER / f"{kind}.txt").read_text(encoding="utf-8") for kind in KINDS}


def evaluate_model(
    model: Path,
    reference: Path | None = None,
    *,
    data: Path | None = None,
    context: int = 512,
    flips: int = FLIPS,
    report: Report = lambda *_: None,
) -> Evaluation:
    """Return `evaluate_models` of a single model."""
    return evaluate_models([model], reference, data=data, context=context, flips=flips, report=report).rows[0]


def evaluate_models(
    models: Sequence[Path],
    reference: Path | None = None,
    *,
    data: Path | None = None,
    context: int = 512,
    flips: int = FLIPS,
    report: Report = lambda *_: None,
) -> Evaluations:
    """Score the predictions of each model in windows of `context` tokens, each read with an empty cache.

    Compares them with those of `reference`, if given, whose hidden states may come from the cache on disk.
    Reads the text file `data`, by default the packaged texts. All models run as in a chat on this machine.
    Returns at most `flips` tokens of each where another one is likeliest.
    Raises UsageError for an invalid context or number of flips and for a text that is too short or that a
    model was calibrated on, TokenizerError for different vocabularies, DoesNotFit for a full disk,
    GenerationError for logits that are not finite, and ModelError.
    """
    if not 0 <= flips <= MOST_FLIPS:
        raise UsageError(f"--flips is {flips}, wanted 0 to {MOST_FLIPS}")
    students = [ModelFolder.open(model) for model in models]
    teacher = ModelFolder.open(reference) if reference is not None else None
    texts = packaged_texts() if data is None else {data.stem: read_text(data, UsageError, MAX_TEXT_NBYTES)}
    readings = [_read_texts(student, teacher, texts, context) for student in students]
    if teacher is not None:
        _fill_cache(teacher, [window for windows in readings for window in windows], report)
    head = load_head(teacher.folder, teacher.config) if teacher is not None else None
    rows, divergences = [], []
    for student, windows in zip(students, readings, strict=True):
        collectors = _measure(student, teacher, head, windows, report)
        whole = sum(collectors.values(), ScoreCollector())
        divergences.append(whole.divergences)
        rows.append(
            Evaluation(
                model=str(student.folder),
                reference=None if teacher is None else str(teacher.folder),
                context=context,
                scores=tuple(collector.score(kind) for kind, collector in collectors.items()),
                overall=whole.score(OVERALL),
                nbytes=sum(path.stat().st_size for path in find_shards(student.folder).paths),
                flips=tuple(_describe_flip(flip, student.tokenizer) for flip in whole.flips[:flips]),
            )
        )
    return Evaluations(tuple(rows), _behind(rows, divergences))


def _read_texts(
    student: ModelFolder, teacher: ModelFolder | None, texts: Mapping[str, str], context: int
) -> list[Window]:
    """Return the windows that a model reads. Raises UsageError and TokenizerError."""
    for side in (student, teacher):
        _check_context(context, side)
    for name, text in texts.items():
        check_held_out(student.folder, name, text, student.encode)
    ids = {kind: student.encode(text) for kind, text in texts.items()}
    for kind, tokens in ids.items():
        if len(tokens) < MIN_TOKENS:
            raise UsageError(
                f"the text {kind} has {len(tokens)} tokens: an evaluation needs at least {MIN_TOKENS}"
            )
    if teacher is not None:
        _check_vocabularies(student, teacher, texts, ids)
    return [window for kind, tokens in ids.items() for window in _windows(kind, tokens, context)]


def _behind(
    rows: Sequence[Evaluation], divergences: Sequence[Sequence[float]]
) -> tuple[Interval | None, ...]:
    """Return the interval of each model's mean KL less that of the closest one."""
    if rows[0].reference is None:
        return (None,) * len(rows)
    best = min(range(len(rows)), key=lambda place: rows[place].overall.kl_mean or 0.0)
    return tuple(
        None if place == best else difference_interval(found, divergences[best])
        for place, found in enumerate(divergences)
    )


def _describe_flip(flip: FlippedId, tokenizer: Tokenizer) -> Flip:
    ids = flip.window.ids[max(0, flip.place + 1 - FLIP_CONTEXT) : flip.place + 1]
    return Flip(
        kind=flip.window.kind,
        before=tokenizer.decode(list(ids)),
        reference=tokenizer.decode([flip.reference]),
        model=tokenizer.decode([flip.model]),
        kl=flip.divergence,
    )


def _check_context(context: int, model: ModelFolder | None) -> None:
    limit = model.config.max_position_embeddings if model is not None else context
    if not MIN_CONTEXT <= context <= limit:
        raise UsageError(f"--context is {context}, wanted {MIN_CONTEXT} to {limit:,} tokens")


def _windows(kind: str, ids: Sequence[int], context: int) -> Iterator[Window]:
    for begin in range(0, len(ids) - 1, context):
        window = Window(kind, tuple(ids[begin : begin + context]))
        if len(window.ids) > 1:
            yield window


def _check_vocabularies(
    student: ModelFolder, teacher: ModelFolder, texts: Mapping[str, str], ids: Mapping[str, list[int]]
) -> None:
    """Raise TokenizerError unless every id means the same to both models."""
    pair = f"{student.folder} and {teacher.folder} cannot be compared"
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise TokenizerError(f"{pair}: their vocabularies have {sizes[0]:,} and {sizes[1]:,} entries")
    if not cmp(student.folder / "tokenizer.json", teacher.folder / "tokenizer.json", shallow=False):
        for id in range(max(student.tokenizer.vocab_size, teacher.tokenizer.vocab_size)):
            mine, theirs = (side.tokenizer.decode([id]) for side in (student, teacher))
            if mine != theirs:
                raise TokenizerError(
                    f"{pair}: token {id:,} is {mine!r:.40} in one and {theirs!r:.40} in the other"
                )
    for kind, text in texts.items():
        if teacher.encode(text) != ids[kind]:
            raise TokenizerError(f"{pair}: their tokenizers split the text {kind} into different tokens")


def _measure(
    student: ModelFolder,
    teacher: ModelFolder | None,
    head: Linear | None,
    windows: Sequence[Window],
    report: Report,
) -> dict[str, ScoreCollector]:
    """Collect the scores of each kind of text; `head` is the reference's."""
    mx.clear_cache()  # what the weights before took
    cache = HiddenCache.open(teacher.folder, teacher.config) if teacher is not None else None
    model = load_model(student.folder, student.config)
    rows = max(1, LOGITS_NBYTES // (4 * student.config.vocab_size))
    collectors = {window.kind: ScoreCollector() for window in windows}
    for window in _report_progress(windows, f"reading with {student.folder.name}", report):
        outputs = WindowOutputs(model.head, hidden_states(model, window.ids))
        reference = None
        if cache is not None and head is not None:
            reference = WindowOutputs(head, _read_cached(cache, window))
        if not collectors[window.kind].add(window, outputs, reference, rows):
            folders = " or ".join(str(side.folder) for side in (student, teacher) if side is not None)
            raise GenerationError(f"{folders} computes logits that are not finite numbers")
    return collectors


def _fill_cache(teacher: ModelFolder, windows: Sequence[Window], report: Report) -> None:
    """Compute the reference's hidden states that are not cached yet. Raises DoesNotFit and ModelError."""
    cache = HiddenCache.open(teacher.folder, teacher.config)
    missing = [window for window in dict.fromkeys(windows) if cache.read(window.ids) is None]
    if missing:
        cache.check_room(sum(len(window.ids) for window in missing))
        model = load_model(teacher.folder, teacher.config)
        for window in _report_progress(missing, f"reading with the reference {teacher.folder.name}", report):
            cache.write(window.ids, hidden_states(model, window.ids))
        cache.delete_oldest()


def _read_cached(cache: HiddenCache, window: Window) -> mx.array:
    hidden = cache.read(window.ids)
    if hidden is None:
        raise QchatError(f"the cache {cache.folder} changed during the evaluation: run it again")
    return hidden


def _report_progress(windows: Sequence[Window], stage: str, report: Report) -> Iterator[Window]:
    """Yield `windows`, reporting the progress before each and at the end."""
    total, done = sum(len(window.ids) for window in windows), 0
    for window in windows:
        report(stage, done, total)
        yield window
        done += len(window.ids)
    report(stage, total, total)


def hidden_states(model: Model, ids: Sequence[int]) -> mx.array:
    """Compute the states [T, hidden] after the final norm for ids [T], with an empty cache."""
    cache, parts = model.new_cache(), []
    for begin in range(0, len(ids), CHUNK):
        part = model.hidden(ids[begin : begin + CHUNK], cache)[0]
        mx.eval(part, cache.arrays())
        parts.append(part)
    whole = mx.concatenate(parts)
    mx.eval(whole)
    mx.clear_cache()
    return whole
