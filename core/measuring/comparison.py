"""Two models answer one prompt, and how far the second one's predictions are from the first one's.

One after the other, so that only one of them is in memory at a time. The divergence is taken over the first
model's answer, which both then read; where their tokens differ there is none.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..conversation.session import Session
from ..engine.engine import Engine
from ..errors import GenerationError
from ..events import Done, to_json
from ..generation.reply_settings import ReplySettings
from ..machine.backend import mx
from .evaluate import LOGITS_NBYTES, Outputs, Tally, Window, hidden_states

Reporter = Callable[[dict[str, Any]], None]
FIGURES = ("kl_mean", "kl_p99", "top1_agreement")


def compare_models(
    first: Path,
    second: Path,
    text: str,
    system: str | None,
    settings: Mapping[str, Any],
    report: Reporter,
) -> dict[str, Any]:
    """Ask both; tells the events of the replies with their `side`, 0 or 1, and a `row` at the end of each.

    The result has the `rows` and the FIGURES of `evaluate.Score`, None where the models' tokens differ.
    Raises ModelError for a folder, UsageError for a setting, ContextLengthExceeded, GenerationError.
    """
    ReplySettings.parse(settings)
    engine = _load(first, report)
    row, ids, start = _answer(engine, 0, text, system, settings, report)
    wanted, decoded, entries = _outputs(engine, ids, start), _decoded(engine, ids), engine.config.vocab_size
    del engine
    mx.clear_cache()  # what the first model's weights took, but for its head
    engine = _load(second, report)
    other, _, _ = _answer(engine, 1, text, system, settings, report)
    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    if entries == engine.config.vocab_size and _decoded(engine, ids) == decoded:
        figures = _divergence(engine, ids, start, wanted)
    else:
        report({"event": "notice", "text": "the models have different tokens: nothing to compare them by"})
    return {"rows": [row, other], **figures}


def _load(folder: Path, report: Reporter) -> Engine:
    def progress(done: int, total: int, name: str) -> None:
        detail = f"loading {folder.name}: {name}"
        report({"event": "progress", "unit": "bytes", "done": done, "total": total, "detail": detail})

    return Engine.load(folder, progress)


def _answer(
    engine: Engine,
    side: int,
    text: str,
    system: str | None,
    settings: Mapping[str, Any],
    report: Reporter,
) -> tuple[dict[str, Any], list[int], int]:
    """The reply's row, the ids of prompt and reply, and the place of the last id of the prompt."""
    session, done = Session(engine, system), None
    for event in session.stream(text, **settings):
        report(to_json(event) | {"side": side})
        done = event if isinstance(event, Done) else done
    if done is None or done.finish_reason == "error":
        raise GenerationError(f"{engine.name} could not answer: {done.detail if done else 'it said nothing'}")
    row = {
        "event": "row",
        "side": side,
        "model": engine.name,
        "path": str(engine.folder),
        "nbytes": engine.model.nbytes,
        "text": done.text,
        "thinking": done.thinking,
        "finish_reason": done.finish_reason,
        "generated_tokens": done.generated_tokens,
        "reasoning_tokens": done.reasoning_tokens,
        **to_json(done)["performance"],
    }
    report(row)
    return row, session.ids, done.prompt_tokens - 1


def _outputs(engine: Engine, ids: Sequence[int], start: int) -> Outputs:
    """What the model predicts from place `start` on."""
    hidden = mx.contiguous(hidden_states(engine.model, ids)[start:])
    mx.eval(hidden)
    return Outputs(engine.model.head, hidden)


def _decoded(engine: Engine, ids: Sequence[int]) -> list[str]:
    return [engine.tokenizer.decode([id]) for id in ids]


def _divergence(engine: Engine, ids: Sequence[int], start: int, wanted: Outputs) -> dict[str, Any]:
    """How far `engine` is from the `wanted` predictions over the answer, whose first id `start` predicts."""
    rows = max(1, LOGITS_NBYTES // (4 * engine.config.vocab_size))
    tally = Tally()
    if not tally.add(Window("answer", tuple(ids[start:])), _outputs(engine, ids, start), wanted, rows):
        raise GenerationError(f"{engine.folder} gives logits that are not finite numbers")
    score = tally.score("answer")
    return {name: getattr(score, name) for name in FIGURES}
