"""What the engine gives for each task, as it comes through the pipe."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from qchat.core import BUILT_IN_MODEL, inspect_model, plan_folder
from qchat.core.conversion.convert import plan_json
from qchat.core.measuring.results import BenchResult, Evaluation, Evaluations, PeerFigures, Score
from qchat.core.quant.recipes import Options
from qchat.tui.tasks import load_task
from qchat.tui.tasks.base import Door, EngineTask, JobRequest
from qchat.tui.tasks.progress import Events
from qchat.tui.text.report import Report

CONVERTED = {
    "name": "new",
    "source": "old",
    "command": "qchat convert -i old -o new -q",
    "options": {"recipe": "none", "bits": 4},
    "nbytes": 11_100_000_000,
    "bits_per_weight": 2.7,
    "weights_nbytes": 20_000_000_000,
    "seconds": 100.0,
    "total_seconds": 130.0,
    "kept_shards": 1,
    "warnings": ["quantized twice"],
    "repairs": [],
    "notes": [],
    "awq": [
        {"letter": "A", "layer": "layers.0", "feeder": "norm", "alpha": 0.5, "before": 2.0, "after": 1.0}
    ],
    "check": {
        "weights": {"affine 2": 0.1, "affine 4": 0.01},
        "tokens": 64,
        "logits_error": 0.05,
        "kl_divergence": 0.02,
        "same_top": 0.9,
    },
    "folder": "/models/new",
}
CALIBRATED = {
    "path": "/x.gguf",
    "chunks": 4,
    "chunk_size": 512,
    "resumed": 2,
    "modules": 9,
    "experts": 8,
    "unreached": 1,
}


def bench_row(name: str, speed: float, share: float = 0.7, **more: Any) -> dict[str, Any]:
    """A row of the job `bench`; decoding uses `share` of the bandwidth."""
    result = BenchResult(
        model=name,
        path=f"/models/{name}",
        nbytes=10**9,
        load_seconds=1.5,
        capitals_tokens_per_s=speed - 1,
        decode_tokens_per_s=speed,
        prefill_tokens_per_s=400.0,
        prefills={512: 400.0, 4096: 350.0, 32768: None},
        first_token_seconds=0.5,
        cached_first_token_seconds=0.1,
        peak_nbytes=12 << 30,
        step_nbytes=round(share * 10**9),
        bandwidth=10**9 * speed,
        speeds=[speed, speed + 1],
    )
    return json.loads(json.dumps({"event": "row", "place": 0, **result.as_json(), **more}))


def answer_row(name: str, speed: float, text: str) -> dict[str, Any]:
    """A row of the job `compare`."""
    return {"event": "row", "side": 0, "model": name, "text": text, "decode_tokens_per_s": speed}


def evaluation(model: str, kl: float | None, reference: str | None = "/m/ref") -> dict[str, Any]:
    def score(kind: str) -> Score:
        alone = Score(kind, 100, 8.0)
        return alone if kl is None else Score(kind, 100, 8.0, 7.0, kl, 0.5, 0.97, (kl / 2, 2 * kl))

    row = Evaluation(model, reference, 512, (score("prose"), score("code")), score("all"), 10**9)
    return json.loads(json.dumps(Evaluations((row,), (None,)).as_json()))


@cache
def results() -> Mapping[str, dict[str, Any]]:
    """Return a result for each method of the engine that a task calls."""
    peer = asdict(PeerFigures(300.0, 20.0, 9 << 30))
    answers = [answer_row("a", 20.0, "Paris."), answer_row("b", 30.0, "It is **Paris**.")]
    known = {
        "convert": CONVERTED,
        "plan": plan_json(BUILT_IN_MODEL, Options("unsloth", 4), 400.0),
        "compare": {"rows": answers, "kl_mean": 0.012, "top1_agreement": 0.9},
        "bench": {"rows": [bench_row("fake-4bit", 23.4, against=peer), bench_row("other", 17.0)]},
        "eval": evaluation(str(BUILT_IN_MODEL), 0.02),
        "calibrate": CALIBRATED,
        "inspect": inspect_model(BUILT_IN_MODEL).as_json(),
        "memory_plan": plan_folder(BUILT_IN_MODEL).as_json(),
    }
    return json.loads(json.dumps(known))


def task(name: str) -> EngineTask[Any]:
    """Return a task of the engine."""
    found = load_task(name)
    assert isinstance(found, EngineTask)
    return found


def request(name: str, line: str = "") -> tuple[EngineTask[Any], JobRequest]:
    """Return what the task asks of the engine for these words in a chat."""
    asked = task(name)
    door = Door("/", ["/models"], in_chat=True, model=Path("/models/fake-4bit"), question="Where?")
    args = asked.parse(asked.chat_words(line), door)
    return asked, asked.request(args, [Path(one or "/models/fake-4bit") for one in asked.models(args)], door)


def show(
    name: str,
    events: Events,
    value: Mapping[str, Any] | None,
    line: str = "",
    earlier: tuple[Mapping[str, Any], ...] = (),
) -> Report:
    """Return what both doors show of a job's events and result."""
    asked, wanted = request(name, line)
    return asked.show(events, value, wanted, earlier=earlier)
