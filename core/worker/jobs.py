"""Jobs of an engine process: long operations that take parameters and send events.

Jobs send the events `progress`, `row` and `notice`. Sending raises Cancelled once the job is cancelled, so a
job must send often; it cleans up its output as after any other error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

from ..allocation.allocate import Budget, allocate, predict_folder
from ..allocation.places import default_place
from ..conversion.convert import Conversion, Progress, convert, plan_json
from ..conversion.inspection import inspect_model
from ..errors import QchatError, UsageError
from ..events import Notice
from ..machine.backend import mx
from ..machine.device import copy_bandwidth
from ..machine.eta import TimeEstimate
from ..measuring.bench import RUNS, BenchRun, measure, measure_random
from ..measuring.calibrate import CHUNK_SIZE, calibrate_model
from ..measuring.comparison import compare_models
from ..measuring.evaluate import evaluate_models
from ..measuring.measurements import Measurements
from ..measuring.peers import PEERS, measure_peer
from ..measuring.results import BenchResult
from ..model.memory_plan import plan_folder
from ..quant.allocated import Allocation
from ..quant.plan import GB, load_config
from ..quant.recipe_file import RoundingMethod
from ..quant.recipes import Options
from ..quoting import quote_value
from ..vision.memory import with_pictures
from .protocol import JOB_METHODS

Params = Mapping[str, Any]
EventSink = Callable[[dict[str, Any]], None]
BANDWIDTH_GB_S = 400.0
VARIANT = "UD-Q4_K_XL"


class ProgressReporter:
    """Sends progress events in `unit`, with the seconds left at an even pace."""

    def __init__(self, send_event: EventSink, unit: str):
        self._send_event, self._unit = send_event, unit
        self._estimate: TimeEstimate | None = None

    def report(self, done: int, total: int, detail: str) -> None:
        """Send the progress; `done` and `total` are counts of the unit."""
        self._estimate = self._estimate or TimeEstimate(done)  # ignore work done before the first report
        left = self._estimate.seconds_left(done, total - done)
        self._send_event(
            {
                "event": "progress",
                "done": done,
                "total": total,
                "unit": self._unit,
                "detail": detail,
                "seconds_left": left,
            }
        )


def _convert(params: Params, send_event: EventSink) -> dict[str, Any]:
    def listener(event: Notice | Progress) -> None:
        if isinstance(event, Notice):
            send_event({"event": "notice", "text": event.text})
            return
        module = event.module.removeprefix("language_model.").removeprefix("model.")
        own = {"event": "progress", "unit": "bytes", "detail": f"{event.stage} {module}"}
        send_event(own | {"done": event.done, "total": event.total, "seconds_left": event.seconds_left})

    conversion = Conversion(
        source=Path(params["source"]),
        target=Path(params["target"]),
        options=_options(params["options"]),
        imatrix=_optional_path(params["imatrix"]),
        calibration=_optional_path(params["calibration"]),
        dequantize=bool(params["dequantize"]),
        force=bool(params["force"]),
        flags=tuple(map(str, params["flags"] or ())),
        allocation=_allocation(params, send_event),
    )
    if params["awq"] is not None:
        conversion = replace(conversion, awq=_check_choice("awq", params["awq"], ("off", "fixed", "search")))
    if params["rounding"] is not None:
        method = _check_choice("rounding", params["rounding"], get_args(RoundingMethod))
        conversion = replace(conversion, rounding=method)
    return convert(conversion, listener).as_json() | {"folder": str(conversion.target)}


def _options(given: Mapping[str, Any] | None) -> Options:
    """Convert to recipe options. Raises UsageError for unknown names and values of a wrong type."""
    defaults = {field.name: getattr(Options(), field.name) for field in fields(Options)}
    for name, value in (given or {}).items():
        if name not in defaults:
            raise UsageError(f"unknown option {quote_value(name)}, wanted one of {', '.join(defaults)}")
        kind = int if defaults[name] is None else type(defaults[name])
        if type(value) is not kind and value != defaults[name]:
            raise UsageError(f"the option {name} is {quote_value(value)}, wanted {kind.__name__}")
    return Options(**(given or {}))


def _allocation(params: Params, send_event: EventSink, *, measure: bool = True) -> Allocation | None:
    """Choose bits under the budget, if there is one; measures sensitivities that are missing."""
    if params["budget"] is None:
        return None
    folder = Path(params["source"])
    path = _optional_path(params["sensitivity"]) or default_place(folder)
    known = path.exists()
    allocation = allocate(
        folder,
        _options(params["options"]),
        _budget(params["budget"]),
        sensitivity=path,
        text=_optional_path(params["calibration"]),
        measure=measure,
        report=ProgressReporter(send_event, "steps").report,
    )
    if path.exists() and not known:
        text = f"the sensitivities are in {path}: other sizes of this model take them from there"
        send_event({"event": "notice", "text": text})
    return allocation


def _budget(given: Mapping[str, Any]) -> Budget:
    """Convert to a budget; a speed without a bandwidth is meant for this machine. Raises UsageError."""
    known = {field.name for field in fields(Budget)}
    for name, value in given.items():
        if name not in known or type(value) not in (int, float):
            raise UsageError(f"the budget {quote_value(dict(given))} is not one, wanted {', '.join(known)}")
    if "tokens_per_s" in given and "bandwidth_gb_s" not in given:
        return Budget(**given, bandwidth_gb_s=round(copy_bandwidth() / GB, 1))
    return Budget(**given)


def _calibrate(params: Params, send_event: EventSink) -> dict[str, Any]:
    progress = ProgressReporter(send_event, "chunks")
    made = calibrate_model(
        Path(params["model"]),
        Path(params["output"]),
        data=_optional_path(params["data"]),
        chunk_size=params["chunk_size"] or CHUNK_SIZE,
        chunks=params["chunks"],
        progress=lambda done, total: progress.report(done, total, "calibrating"),
    )
    return asdict(made) | {"path": str(made.path)}


def _eval(params: Params, send_event: EventSink) -> dict[str, Any]:
    progress, current_step = ProgressReporter(send_event, "tokens"), ""

    def report(step: str, done: int, total: int) -> None:
        nonlocal progress, current_step
        if step != current_step:
            progress, current_step = ProgressReporter(send_event, "tokens"), step
        progress.report(done, total, step)

    given = {name: params[name] for name in ("context", "flips") if params[name] is not None}
    evaluations = evaluate_models(
        [Path(model) for model in _check_models(params["models"])],
        _optional_path(params["reference"]),
        data=_optional_path(params["data"]),
        report=report,
        **given,
    )
    if params["data"] is None and params["context"] is None:  # figures of other texts compare with nothing
        for row in evaluations.rows:
            if row.overall.kl_mean is not None:
                figures = {"reference": row.reference, **asdict(row.overall)}
                _store_measurements(params["measurements"], Path(row.model), figures, send_event)
    return evaluations.as_json()


def _bench(params: Params, send_event: EventSink) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []

    def add(result: BenchResult) -> None:
        rows.append({"event": "row", "place": len(rows), **result.as_json()})
        send_event(rows[-1])
        mx.clear_cache()

    if params["against"] is not None:
        _check_choice("against", params["against"], PEERS)
    models = [] if params["random"] and not params["models"] else _check_models(params["models"])
    runs, count = params["runs"] or RUNS, len(models) + bool(params["random"])
    progress = ProgressReporter(send_event, "steps")
    if params["random"]:
        variant = params["variant"] or VARIANT
        config = load_config(Path(params["random"]))
        add(_follow_bench(measure_random(config, variant, runs), variant, progress, 0, count))
    for place, model in enumerate(map(Path, models), count - len(models)):
        result = _follow_bench(measure(model, runs), model.name, progress, place, count)
        _store_measurements(params["measurements"], model, result.as_json(), send_event)
        if params["against"]:
            mx.clear_cache()
            detail = f"{model.name}: {params['against']}"
            peer = measure_peer(model, runs, lambda detail=detail: _announce(detail, send_event))
            result = replace(result, against=peer)
        add(result)
    return {"rows": rows}


def _follow_bench(
    steps: BenchRun, name: str, progress: ProgressReporter, place: int, count: int
) -> BenchResult:
    """Run the benchmark of one model, the one at `place` of `count`; the progress is that of all of them."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        progress.report(place * step.total + step.done, count * step.total, f"{name}: {step.detail}")


def _announce(detail: str, send_event: EventSink) -> None:
    """Tell what is being done where nothing can be counted; raises Cancelled as every event does."""
    send_event({"event": "progress", "done": 0, "total": 0, "unit": "", "detail": detail})


def _store_measurements(
    measurements: str | None, model: Path, figures: Mapping[str, Any], send_event: EventSink
) -> None:
    """Keep the figures for other runs to show; a file that cannot be written is a notice."""
    if measurements is None:
        return
    try:
        Measurements(Path(measurements)).add(model, figures)
    except QchatError as error:
        send_event({"event": "notice", "text": str(error)})


def _compare(params: Params, send_event: EventSink) -> dict[str, Any]:
    first, second = _check_models(params["models"], 2)
    settings = params["settings"] or {}
    return compare_models(Path(first), Path(second), params["text"], params["system"], settings, send_event)


def _inspect(params: Params, send_event: EventSink) -> dict[str, Any]:
    _announce("reading the headers", send_event)
    return inspect_model(Path(params["model"])).as_json(tensors=bool(params["tensors"]))


def _plan(params: Params, send_event: EventSink) -> dict[str, Any]:
    _announce("reading config.json", send_event)
    bandwidth = BANDWIDTH_GB_S if params["bandwidth"] is None else params["bandwidth"]
    source, options = Path(params["source"]), _options(params["options"])
    allocation = _allocation(params, send_event, measure=params["measure"] is not False)
    predicted = None if allocation else predict_folder(source, options)
    return plan_json(source, options, bandwidth, allocation, predicted)


def _memory_plan(params: Params, send_event: EventSink) -> dict[str, Any]:
    _announce("reading the headers", send_event)
    folder = Path(params["model"])
    plan = plan_folder(folder, context=params["context"], kv_bits=params["kv_bits"])
    return with_pictures(plan, folder, params["image_tokens"]).as_json()


def _download(params: Params, send_event: EventSink) -> dict[str, Any]:
    from ..hub.download import DownloadProgress, download_model
    from ..hub.listing import plan_download

    def cancelled() -> bool:
        """Send a progress event, which raises Cancelled if the job was cancelled."""
        send_event(DownloadProgress(0, 0, "reading the file list").as_json())
        return False

    plan = plan_download(params["id"], params["revision"], cancelled=cancelled)
    folder = download_model(plan, lambda progress: send_event(progress.as_json()))
    return {"path": str(folder), "nbytes": plan.nbytes}


def _check_models(given: Sequence[Any], count: int | None = None) -> list[str]:
    wrong = next((model for model in given if not isinstance(model, str)), None)
    if wrong is not None or not given or len(given) != (count or len(given)):
        raise UsageError(f"models is {quote_value(given)}, wanted a list of {count or 'one or more'} folders")
    return list(given)


def _optional_path(given: str | None) -> Path | None:
    return None if given is None else Path(given)


def _check_choice(name: str, given: str, known: Sequence[str]) -> Any:
    if given not in known:
        raise UsageError(f"{name} is {quote_value(given)}, wanted {', '.join(known)}")
    return given


_JOBS: Mapping[str, Callable[[Params, EventSink], dict[str, Any]]] = {
    "convert": _convert,
    "calibrate": _calibrate,
    "eval": _eval,
    "bench": _bench,
    "compare": _compare,
    "inspect": _inspect,
    "plan": _plan,
    "memory_plan": _memory_plan,
    "fetch": _download,
}


def run_job(method: str, params: Params, send_event: EventSink) -> dict[str, Any]:
    """Run one of `protocol.JOB_METHODS` and return its result; parameters not given are None.

    Raises QchatError and MLX errors.
    """
    return _JOBS[method]({**dict.fromkeys(JOB_METHODS[method]), **params}, send_event)
