"""Two models' replies to the same prompt, and the divergence of their predictions.

They run one after the other, so that only one is in memory at a time. The divergence is measured over the
first model's reply, which both then read; models with different tokens have none.
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
from .evaluate import LOGITS_NBYTES, hidden_states
from .scores import ScoreCollector, Window, WindowOutputs

EmitEvent = Callable[[dict[str, Any]], None]
FIGURES = ("kl_mean", "kl_p99", "top1_agreement")


def compare_models(
    first: Path,
    second: Path,
    text: str,
    system: str | None,
    settings: Mapping[str, Any],
    emit: EmitEvent,
) -> dict[str, Any]:
    """Ask both models; emits the events of each reply with its `side`, 0 or 1, and a `row` at its end.

    Returns the `rows`, and the FIGURES of `scores.Score`, None where the models' tokens differ.
    Raises ModelError for a folder, UsageError for a setting, ContextLengthExceeded, GenerationError.
    """
    ReplySettings.parse(settings)
    engine = _load(first, emit)
    row, ids, start = _reply(engine, 0, text, system, settings, emit)
    reference, texts = _predict_reply(engine, ids, start), _token_texts(engine, ids)
    vocab_size = engine.config.vocab_size
    del engine
    mx.clear_cache()  # frees the memory of the first model's weights except its head
    engine = _load(second, emit)
    other, _, _ = _reply(engine, 1, text, system, settings, emit)
    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    if vocab_size == engine.config.vocab_size and _token_texts(engine, ids) == texts:
        figures = _compare_reply(engine, ids, start, reference)
    else:
        emit({"event": "notice", "text": "the models have different tokens: nothing can be compared"})
    return {"rows": [row, other], **figures}


def _load(folder: Path, emit: EmitEvent) -> Engine:
    def progress(done: int, total: int, name: str) -> None:
        detail = f"loading {folder.name}: {name}"
        emit({"event": "progress", "unit": "bytes", "done": done, "total": total, "detail": detail})

    return Engine.load(folder, progress)


def _reply(
    engine: Engine,
    side: int,
    text: str,
    system: str | None,
    settings: Mapping[str, Any],
    emit: EmitEvent,
) -> tuple[dict[str, Any], list[int], int]:
    """Return the reply's row, the ids of prompt and reply, and the position of the prompt's last id."""
    session, done = Session(engine, system), None
    for event in session.stream(text, **settings):
        emit(to_json(event) | {"side": side})
        done = event if isinstance(event, Done) else done
    if done is None or done.finish_reason == "error":
        raise GenerationError(f"{engine.name} failed to reply: {done.detail if done else 'no output'}")
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
    emit(row)
    return row, session.ids, done.prompt_tokens - 1


def _predict_reply(engine: Engine, ids: Sequence[int], start: int) -> WindowOutputs:
    """Compute the model's predictions from position `start` on."""
    hidden = mx.contiguous(hidden_states(engine.model, ids)[start:])
    mx.eval(hidden)
    return WindowOutputs(engine.model.head, hidden)


def _token_texts(engine: Engine, ids: Sequence[int]) -> list[str]:
    return [engine.tokenizer.decode([id]) for id in ids]


def _compare_reply(
    engine: Engine, ids: Sequence[int], start: int, reference: WindowOutputs
) -> dict[str, Any]:
    """Compute the FIGURES of the reply, whose first id is predicted at `start`."""
    rows = max(1, LOGITS_NBYTES // (4 * engine.config.vocab_size))
    collector = ScoreCollector()
    if not collector.add(
        Window("answer", tuple(ids[start:])), _predict_reply(engine, ids, start), reference, rows
    ):
        raise GenerationError(f"{engine.folder} computes logits that are not finite numbers")
    score = collector.score("answer")
    return {name: getattr(score, name) for name in FIGURES}
