"""Long work that a front end may ask an engine process for: functions of parameters and a reporter.

A reporter takes events (`progress`, `row`, `notice`) and raises Cancelled when the job is to stop, so a job
that reports often stops soon; what it was writing is then cleaned up as after any error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..conversion.convert import Conversion, Progress, convert, plan_json
from ..conversion.inspection import inspect_model
from ..errors import UsageError
from ..events import Notice
from ..machine.backend import mx
from ..machine.eta import TimeEstimate
from ..measuring.bench import RUNS, measure
from ..measuring.calibrate import CHUNK_SIZE, calibrate_model
from ..measuring.comparison import compare_models
from ..measuring.evaluate import evaluate_model
from ..measuring.measurements import Measurements
from ..quant.recipes import Options

Params = Mapping[str, Any]
Reporter = Callable[[dict[str, Any]], None]
BANDWIDTH_GB_S = 400.0


class Clock:
    """Progress events of `unit`, with an estimate of the seconds left at an even pace."""

    def __init__(self, report: Reporter, unit: str):
        self._report, self._unit = report, unit
        self._estimate: TimeEstimate | None = None

    def tell(self, done: int, total: int, detail: str) -> None:
        self._estimate = self._estimate or TimeEstimate(done)  # earlier work says nothing about speed
        left = self._estimate.seconds_left(done, total - done)
        self._report(
            {
                "event": "progress",
                "done": done,
                "total": total,
                "unit": self._unit,
                "detail": detail,
                "seconds_left": left,
            }
        )


def _convert(params: Params, report: Reporter) -> dict[str, Any]:
    def listener(event: Notice | Progress) -> None:
        if isinstance(event, Notice):
            report({"event": "notice", "text": event.text})
            return
        own = {"event": "progress", "unit": "bytes", "detail": f"{event.stage} {event.module}"}
        report(own | {"done": event.done, "total": event.total, "seconds_left": event.seconds_left})

    conversion = Conversion(
        source=Path(params["source"]),
        target=Path(params["target"]),
        options=_options(params["options"]),
        imatrix=_path(params["imatrix"]),
        dequantize=bool(params["dequantize"]),
        force=bool(params["force"]),
        flags=tuple(map(str, params["flags"] or ())),
    )
    if params["awq"] is not None:
        conversion = replace(conversion, awq=_choice("awq", params["awq"], ("off", "fixed", "search")))
    return convert(conversion, listener).as_json()


def _options(given: Mapping[str, Any] | None) -> Options:
    """Raises UsageError for names that a recipe has no use for, and values of another type."""
    usual = {field.name: getattr(Options(), field.name) for field in fields(Options)}
    for name, value in (given or {}).items():
        if name not in usual:
            raise UsageError(f"there is no option {name!r:.40}; known are {', '.join(usual)}")
        kind = int if usual[name] is None else type(usual[name])
        if type(value) is not kind and value != usual[name]:
            raise UsageError(f"the option {name} is {value!r:.40}, wanted {kind.__name__}")
    return Options(**(given or {}))


def _calibrate(params: Params, report: Reporter) -> dict[str, Any]:
    clock = Clock(report, "chunks")
    made = calibrate_model(
        Path(params["model"]),
        Path(params["output"]),
        data=_path(params["data"]),
        chunk_size=params["chunk_size"] or CHUNK_SIZE,
        chunks=params["chunks"],
        progress=lambda done, total: clock.tell(done, total, "calibrating"),
    )
    return asdict(made) | {"path": str(made.path)}


def _eval(params: Params, report: Reporter) -> dict[str, Any]:
    clock, doing = Clock(report, "tokens"), ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal clock, doing
        if what != doing:
            clock, doing = Clock(report, "tokens"), what
        clock.tell(done, total, what)

    context = {} if params["context"] is None else {"context": params["context"]}
    evaluation = evaluate_model(
        Path(params["model"]),
        _path(params["reference"]),
        data=_path(params["data"]),
        report=progress,
        **context,
    )
    if evaluation.overall.kl_mean is not None:
        figures = {"kl_mean": evaluation.overall.kl_mean, "reference": evaluation.reference}
        _keep(params["measurements"], Path(params["model"]), figures)
    return evaluation.as_json()


def _bench(params: Params, report: Reporter) -> dict[str, Any]:
    rows = []
    for place, model in enumerate(_models(params["models"])):
        figures = _measured(Path(model), params["runs"], report)
        _keep(params["measurements"], Path(model), figures)
        rows.append({"event": "row", "place": place, **figures})
        report(rows[-1])
        mx.clear_cache()
    return {"rows": rows}


def _measured(model: Path, runs: int | None, report: Reporter) -> dict[str, Any]:
    clock, steps = Clock(report, "steps"), measure(model, runs or RUNS)
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value.as_json()
        clock.tell(step.done, step.total, f"{model.name}: {step.detail}")


def _keep(measurements: str | None, model: Path, figures: Mapping[str, Any]) -> None:
    if measurements is not None:
        Measurements(Path(measurements)).add(model, figures)


def _compare(params: Params, report: Reporter) -> dict[str, Any]:
    first, second = _models(params["models"], 2)
    settings = params["settings"] or {}
    return compare_models(Path(first), Path(second), params["text"], params["system"], settings, report)


def _inspect(params: Params, report: Reporter) -> dict[str, Any]:
    report({"event": "notice", "text": "reading the headers"})
    return inspect_model(Path(params["model"])).as_json(tensors=bool(params["tensors"]))


def _plan(params: Params, report: Reporter) -> dict[str, Any]:
    report({"event": "notice", "text": "planning from config.json"})
    bandwidth = BANDWIDTH_GB_S if params["bandwidth"] is None else params["bandwidth"]
    return plan_json(Path(params["source"]), _options(params["options"]), bandwidth)


def _fetch(params: Params, report: Reporter) -> dict[str, Any]:
    from ..hub.fetch import Progress as Fetched
    from ..hub.fetch import fetch, plan

    def asking() -> bool:
        """Raises Cancelled through the reporter."""
        report(Fetched(0, 0, "asking what it consists of").as_json())
        return False

    wanted = plan(params["id"], params["revision"], cancelled=asking)
    folder = fetch(wanted, lambda progress: report(progress.as_json()))
    return {"path": str(folder), "nbytes": wanted.nbytes}


def _models(given: Sequence[Any], count: int | None = None) -> list[str]:
    wrong = next((model for model in given if not isinstance(model, str)), None)
    if wrong is not None or not given or len(given) != (count or len(given)):
        raise UsageError(f"models is {given!r:.80}, wanted a list of {count or 'one or more'} folders")
    return list(given)


def _path(given: str | None) -> Path | None:
    return None if given is None else Path(given)


def _choice(name: str, given: str, known: Sequence[str]) -> Any:
    if given not in known:
        raise UsageError(f"{name} is {given!r:.40}, wanted {', '.join(known)}")
    return given


_JOBS: Mapping[str, Callable[[Params, Reporter], dict[str, Any]]] = {
    "convert": _convert,
    "calibrate": _calibrate,
    "eval": _eval,
    "bench": _bench,
    "compare": _compare,
    "inspect": _inspect,
    "plan": _plan,
    "fetch": _fetch,
}


def run_job(method: str, params: Params, report: Reporter) -> dict[str, Any]:
    """Do one of `protocol.JOB_METHODS`. Raises QchatError, Cancelled among them, and what MLX raises."""
    return _JOBS[method](params, report)
