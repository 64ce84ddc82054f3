"""How jobs look: a gauge while they run, then their figures as a table with a picture. Pure functions.

Each takes the job's events so far and its result, None while there is none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..text.report import Bar, Bars, Gauge, Lines, Markdown, Part, Plot, Point, Report, Spark, Table

GB, MB = 10**9, 10**6
GIB = 2**30
Events = Sequence[Mapping[str, Any]]
Result = Mapping[str, Any] | None


def converted(events: Events, result: Result, target: Path) -> Report:
    """What became of a conversion, and how to go on with it."""
    if result is None:
        return Report("", (*_notices(events), *_progress(events)))
    check = result["check"]
    rows = [
        ("size", f"{result['nbytes'] / GB:,.3f} GB, {result['bits_per_weight']:.2f} bits per weight"),
        ("time", f"{_clock(result['total_seconds'])} with all checks"),
        ("against the source", f"KL {check['kl_divergence']:.2e} nats over {check['tokens']:,} tokens"),
        ("same first choice", f"{check['same_top']:.0%} of the tokens"),
    ]
    errors = [Bar(code, error, f"{error:.2e}") for code, error in check["weights"].items()]
    pictured = (Lines(("relative error of the weights, by code:",), "dim"), Bars(errors)) if errors else ()
    said = (*result.get("warnings", ()), *result.get("notes", ()), f"/load {_quoted(target)} goes on with it")
    return Report("", (Table(("", ""), rows), *pictured, Lines(said, "dim")))


def downloaded(events: Events, result: Result, id: str) -> Report:
    """How far a download is."""
    done = Lines((f"{id} is in {result['path']}",), "dim") if result is not None else None
    return Report("", (done,) if done else _progress(events))


def calibrated(events: Events, result: Result) -> Report:
    """Where the importances are."""
    if result is None:
        return Report("", _progress(events))
    rows = [
        ("file", str(result["path"])),
        ("matrices", f"{result['modules']:,}"),
        ("read", f"{result['chunks']:,} chunks of {result['chunk_size']:,} tokens"),
    ]
    if result.get("experts"):
        rows.append(("experts no token reached", f"{result['unreached']:,} of {result['experts']:,}"))
    used = (f"/convert SRC -q --imatrix-path {result['path']} uses it",)
    return Report("", (Table(("", ""), rows), Lines(used, "dim")))


def evaluated(events: Events, result: Result, earlier: Sequence[Mapping[str, Any]]) -> Report:
    """Figures by kind of text, bars of them, and size against quality of all models measured alike."""
    if result is None:
        return Report("", _progress(events))
    compared = result["reference"] is not None
    scores = [*result["scores"], result["overall"]] if len(result["scores"]) > 1 else result["scores"]
    columns = (
        "text",
        "tokens",
        "perplexity",
        *(("reference", "mean KL", "99 % KL", "top-1") if compared else ()),
    )
    table = Table(columns, [_score(score) for score in scores], "<" + ">" * (len(columns) - 1))
    figure = "kl_mean" if compared else "perplexity"
    bars = [Bar(score["kind"], score[figure], f"{score[figure]:.4g}") for score in result["scores"]]
    said = Lines((f"{'mean KL in nats' if compared else 'perplexity'} by kind of text:",), "dim")
    return Report("", (table, said, Bars(bars), *size_against_quality([*earlier, result])))


def _score(score: Mapping[str, Any]) -> tuple[str, ...]:
    cells = (score["kind"], f"{score['tokens']:,}", f"{score['perplexity']:,.4g}")
    if score["kl_mean"] is None:
        return cells
    return (
        *cells,
        f"{score['reference_perplexity']:,.4g}",
        f"{score['kl_mean']:.6f}",
        f"{score['kl_p99']:.5f}",
        f"{100 * score['top1_agreement']:.2f} %",
    )


def size_against_quality(results: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    """One point for each model that was measured like the last one; nothing to draw for a single one."""
    last = results[-1]
    like = [
        one for one in results if (one["reference"], one["context"]) == (last["reference"], last["context"])
    ]
    figure = "perplexity" if last["reference"] is None else "kl_mean"
    places = {one["model"]: one["overall"][figure] for one in like}
    if last["reference"] is not None:
        places.setdefault(last["reference"], 0.0)
    points = [
        Point(folder_nbytes(Path(model)) / GB, value, Path(model).name) for model, value in places.items()
    ]
    label = "perplexity" if last["reference"] is None else "mean KL (nats)"
    return (Plot(points, "GB", label),) if len(points) > 1 else ()


def folder_nbytes(folder: Path) -> int:
    """What the weight files of a model folder hold; 0 where it is gone."""
    try:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    except OSError:
        return 0


def benched(events: Events, result: Result) -> Report:
    """A bar for each model as soon as it was measured."""
    rows = _rows(events, result)
    table = [
        (
            row["model"],
            f"{row['capitals_tokens_per_s']:,.1f}",
            f"{row['decode_tokens_per_s']:,.1f}",
            f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['peak_nbytes'] / GIB:,.2f}",
            _share(row.get("bandwidth_share")),
        )
        for row in rows
    ]
    columns = ("model", "capitals tok/s", "sustained tok/s", "prefill tok/s", "peak GiB", "bandwidth")
    bars = [
        Bar(row["model"], row["decode_tokens_per_s"], f"{row['decode_tokens_per_s']:,.1f} tok/s")
        for row in rows
    ]
    sparks = [
        Spark(row["speeds"], f"{row['model']}: tok/s over one reply") for row in rows if row.get("speeds")
    ]
    parts = (Bars(bars), *sparks, Table(columns, table, "<>>>>>")) if rows else ()
    return Report("", (*parts, *(() if result is not None else _progress(events))))


def compared(events: Events, result: Result) -> Report:
    """Both answers as they come, then what they cost and how far apart the models are."""
    if result is None:
        answers = [_so_far(events, side) for side in (0, 1)]
        parts = [part for answer in answers for part in answer]
        return Report("", (*_notices(events), *(parts or (Lines(("loading",), "dim"),))))
    rows = _rows(events, result)
    parts = [part for row in rows for part in _answer(row["model"], row["text"])]
    speeds = [
        Bar(row["model"], row["decode_tokens_per_s"], f"{row['decode_tokens_per_s']:,.1f} tok/s")
        for row in rows
    ]
    return Report("", (*parts, Bars(speeds), *_distance(rows, result), *_notices(events)))


def _so_far(events: Events, side: int) -> tuple[Part, ...]:
    """What one of two models has said; nothing before it begins."""
    own = [one for one in events if one.get("side") == side]
    row = next((one for one in own if one["event"] == "row"), None)
    if row is not None:
        return _answer(row["model"], row["text"])
    text = "".join(str(one["text"]) for one in own if one["event"] == "text")
    thought = sum(one["event"] == "thought" for one in own)
    name = ("the first model", "the second model")[side]
    return _answer(f"{name} thinks" if thought and not text else name, text) if own else ()


def _answer(model: str, text: str) -> tuple[Part, ...]:
    return (Lines((model,), "title"), Markdown(text), Lines(("",)))


def _distance(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> tuple[Part, ...]:
    if result.get("kl_mean") is None:
        return ()
    first, second = (row["model"] for row in rows[:2])
    said = (
        f"KL divergence of {second} from {first}: {result['kl_mean']:.4g} nats on average over the answer; "
        f"{result['top1_agreement']:.0%} of the tokens are the first choice of both"
    )
    return (Lines((said,)),)


def inspected(events: Events, result: Result) -> Report:
    """The classes, or the tensors, with a bar for what each class takes."""
    if result is None:
        return Report("", _progress(events))
    if result.get("tensors"):
        rows = [
            (one["name"], _code(one), "x".join(map(str, one["shape"])), f"{one['bytes']:,}")
            for one in result["tensors"]
        ]
        return Report("", (Table(("tensor", "code", "shape", "bytes"), rows, "<<>>"), *_repairs(result)))
    rows = [
        (
            one["class"],
            _code(one),
            f"{one['tensors']:,}",
            f"{one['bytes'] / MB:,.1f}",
            f"{one['bits_per_weight']:.2f}",
        )
        for one in result["classes"]
    ]
    bars = [
        Bar(f"{one['class']} {_code(one)}", one["bytes"], f"{one['bytes'] / MB:,.1f} MB")
        for one in result["classes"]
    ]
    columns = ("class", "code", "tensors", "MB", "bits/weight")
    return Report("", (Table(columns, rows, "<<>>>"), Bars(bars), *_repairs(result)))


def _code(one: Mapping[str, Any]) -> str:
    return (
        one["mode"] if one["group_size"] is None else f"{one['mode']} {one['bits']}-bit g{one['group_size']}"
    )


def _repairs(result: Mapping[str, Any]) -> tuple[Part, ...]:
    said = [f"- {one}" for one in (*result.get("repairs", ()), *result.get("notices", ()))]
    return (Lines(said, "dim"),) if said else ()


def _rows(events: Events, result: Result) -> list[Mapping[str, Any]]:
    return list(result["rows"]) if result is not None else [one for one in events if one["event"] == "row"]


def _progress(events: Events) -> tuple[Part, ...]:
    """How far the job is, in the words of its last event."""
    last = next((one for one in reversed(events) if one["event"] == "progress"), None)
    if last is None:
        return (Lines(("starting",), "dim"),)
    left = last.get("seconds_left")
    text = " · ".join(
        part
        for part in (_amount(last), last.get("detail") or "", "" if left is None else f"{_clock(left)} left")
        if part
    )
    return (Gauge(last["done"], last["total"], text),)


def _amount(event: Mapping[str, Any]) -> str:
    if event.get("unit") == "bytes":
        return f"{event['done'] / GB:,.2f} of {event['total'] / GB:,.2f} GB"
    return f"{event['done']:,} of {event['total']:,} {event.get('unit') or ''}".rstrip()


def _notices(events: Events) -> tuple[Part, ...]:
    said = [str(one["text"]) for one in events if one["event"] == "notice"]
    return (Lines(said, "warn"),) if said else ()


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes else f"{seconds:.1f} s"


def _quoted(path: Path) -> str:
    return f'"{path}"' if " " in str(path) else str(path)
