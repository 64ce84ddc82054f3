"""How far a job is, in words: the gauge of the chat and the line on stderr say the same."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..text.report import Gauge, Lines, Part, Report, report_text

if TYPE_CHECKING:
    from ..chat.jobs import Job

GB = 10**9
MAX_DETAIL = 36  # characters
STARTING = Lines(("starting",), "dim")
Events = Sequence[Mapping[str, Any]]


def progress_text(event: Mapping[str, Any]) -> str:
    """Say what a progress event has, in less than 80 columns with its share."""
    left = event.get("seconds_left")
    parts = (
        _amount(event) if event["total"] else "",
        f"{event.get('detail') or '':.{MAX_DETAIL}}",
        "" if left is None else f"{format_seconds(left)} left",
    )
    return " · ".join(part for part in parts if part)


def progress_line(event: Mapping[str, Any]) -> str:
    """Return the same as a line of its own, with the share that is done."""
    share = f"{event['done'] / event['total']:4.0%}  " if event["total"] else ""
    return f"{share}{progress_text(event)}"


def _amount(event: Mapping[str, Any]) -> str:
    if event.get("unit") == "bytes":
        return f"{event['done'] / GB:,.2f} of {event['total'] / GB:,.2f} GB"
    return f"{event['done']:,} of {event['total']:,} {event.get('unit') or ''}".rstrip()


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes else f"{seconds:.1f} s"


def format_age(seconds: float) -> str:
    """Format how long something has run, briefly: 12 s, 12 min, 3 h 5 min."""
    minutes = int(seconds) // 60
    if not minutes:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def running_report(events: Events) -> Report:
    """Return the notices so far and the gauge of the last progress event."""
    return Report("", (*_notices(notices(events)), *gauge(events)))


def gauge(events: Events) -> tuple[Part, ...]:
    last = next((one for one in reversed(events) if one["event"] == "progress"), None)
    if last is None:
        return (STARTING,)
    return (Gauge(last["done"], last["total"], progress_text(last)),)


def is_progress(part: Part) -> bool:
    return isinstance(part, Gauge) or part == STARTING


def job_parts(job: "Job") -> tuple[Part, ...]:
    """Return what a job has found so far: after its end without progress, after a failure with the reason."""
    if job.waits_for:
        return (Lines((f"waits for {job.waits_for}",), "dim"),)
    parts = (*job.report().parts, *([Lines((job.warning,), "warn")] if job.warning else ()))
    if job.state == "running":
        return parts
    reason = (Lines((job.error,), "bad"),) if job.error else ()
    return (*reason, *(part for part in parts if not is_progress(part)))


def notices(events: Events) -> list[str]:
    return [str(one["text"]) for one in events if one["event"] == "notice"]


def with_notices(report: Report, events: Events) -> Report:
    """Add the notices that the report does not repeat."""
    said = report_text(report)
    return Report(
        report.title, (*report.parts, *_notices([one for one in notices(events) if one not in said]))
    )


def _notices(said: Sequence[str]) -> tuple[Part, ...]:
    return (Lines(said, "warn"),) if said else ()


def rows(events: Events) -> list[Mapping[str, Any]]:
    """Return the rows that a running job has sent."""
    return [one for one in events if one["event"] == "row"]
