"""Statistics of the replies: as a table and a picture, as files for other programs, and live.

Every reply's counts and speeds are kept with it. What `/bench live` adds is a line after each reply, the
speed over it, and the replies of other branches, so that models can be compared on the same question.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.conversation.summary import Turn
from ...core.errors import UsageError
from ...core.events import Performance
from ...core.worker.wire import RepliesResult
from ..chat.live_bench import cached_share
from ..text.report import Lines, Report, Spark, Table
from ..text.trend import Series, Trend
from ..user.attachments import complete as complete_path
from ..user.paths import user_path
from ..user.toml_file import write_text
from .base import Command, Front, choice, starting, switch
from .parameters import change
from .task_command import TaskCommand

if TYPE_CHECKING:
    from ..chat.controller import Chat

GIB = 2**30
DRAFTS = ("drafts", "gain", "cost")
FORMS = ("json", "csv")
LIVE = "live"
LIVE_ON, LIVE_OFF = "live benchmarking is on: each reply ends with its figures", "live benchmarking is off"


class Stats(Command):
    """Show what each reply cost, as a table and a picture; json and csv are for other programs.

    With FILE they are written there. While /bench live is on, the replies of all branches are shown.
    """

    names = ("stats", "status", "tokens", "usage")
    usage = "[json|csv [FILE]]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        del chat
        form, space, path = argument.partition(" ")
        if not space:
            return starting(argument, FORMS)
        return [f"{form} {one}" for one in complete_path(path, Path.cwd())]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        await gather_replies(chat)
        form, _, path = argument.partition(" ")
        if form:
            await self._write(chat, front, choice(form, "the form", FORMS), path.strip())
        elif not front.screen("stats"):
            front.report(stats_report(chat))

    async def _write(self, chat: "Chat", front: Front, form: str, path: str) -> None:
        text = (
            stats_csv(chat) if form == "csv" else json.dumps(stats_json(chat), indent=2, ensure_ascii=False)
        )
        if not path:
            front.report(Report("", (Lines(text.rstrip().split("\n")),)))
            return
        target = user_path(path)
        if target.exists() and not await front.confirm(f"{target} exists already. Replace it?"):
            front.note("nothing was written")
            return
        write_text(target, text.rstrip() + "\n")
        front.note(f"written to {target}")


class Bench(TaskCommand):
    """The task `bench`, and figures after each reply of the chat: /bench live on."""

    def __init__(self) -> None:
        super().__init__("bench")

    @property
    def usage(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{super().usage} | live [on|off]"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        word, space, last = argument.partition(" ")
        if word == LIVE and space:
            return [f"{LIVE} {one}" for one in starting(last, ("on", "off"))]
        return [*(starting(argument, (LIVE,)) if argument else ()), *super().complete(chat, argument)]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        word, _, last = argument.partition(" ")
        if word != LIVE:
            await super().run(chat, front, argument)
            return
        on = switch(last.strip(), "/bench live") if last.strip() else not chat.settings["live_bench"]
        await change(chat, front, "live_bench", on, "/bench live")
        front.note(LIVE_ON if on else LIVE_OFF)


async def gather_replies(chat: "Chat") -> None:
    """Ask the engine for the replies of all branches, if they are to be shown and it is free to tell."""
    if chat.settings["live_bench"] and chat.model is not None and not chat.busy:
        found: RepliesResult = await chat.request("replies")
        chat.live_bench.hold(chat.state.conversation, found.turns)


def shown_replies(chat: "Chat") -> Sequence[Turn]:
    """Return the replies that statistics show, oldest first."""
    return chat.live_bench.replies(chat.state) if chat.settings["live_bench"] else chat.state.turns


def stats_json(chat: "Chat") -> dict[str, Any]:
    """Return the figures of every reply as plain values."""
    return {
        "model": chat.model.name if chat.model else None,
        "tokens": chat.state.tokens,
        "context_limit": chat.state.context_limit,
        "turns": [
            {**_values(chat, turn), "speeds": chat.live_bench.speeds(turn)} for turn in shown_replies(chat)
        ],
    }


def _values(chat: "Chat", turn: Turn) -> dict[str, Any]:
    return {
        "turn": turn.number,
        "model": turn.model_name,
        "on_branch": any(one.node == turn.node for one in chat.state.turns),
        "created": datetime.fromtimestamp(turn.created, UTC).isoformat(timespec="seconds"),
        "finish_reason": turn.finish_reason,
        "cached_share": round(cached_share(turn), 4),
        **asdict(turn.stats),
    }


def stats_csv(chat: "Chat") -> str:
    """Return a row for every reply, under the names of `stats_json`."""
    rows = [_flat(_values(chat, turn)) for turn in shown_replies(chat)]
    if not rows:
        raise UsageError("there is no reply yet")
    written = io.StringIO()
    table = csv.DictWriter(written, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return written.getvalue()


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without nesting; several of them become words, and those that are unknown nothing."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value)
        else:
            flat[name] = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return flat


def stats_report(chat: "Chat") -> Report:
    """Return a row for each reply, and the speeds as a picture, a colour for each model."""
    state, replies = chat.state, shown_replies(chat)
    drafted = any(turn.stats.performance.draft_cost for turn in replies)
    columns = (
        "turn",
        "prompt",
        "reused",
        "first token",
        "read/s",
        "thought",
        "generated",
        "tok/s",
        "peak GiB",
        *(DRAFTS if drafted else ()),
    )
    rows = [_row(turn, drafted=drafted) for turn in replies]
    models = [turn.model_name for turn in replies]
    if set(models) - {"", chat.model.name if chat.model else ""}:  # not all of the model in the title
        columns, rows = (
            ("model", *columns),
            [(name or "–", *row) for name, row in zip(models, rows, strict=True)],
        )
    named = columns[0] == "model"
    table = Table(columns, rows, "<" * named + ">" * (len(columns) - named))
    used = f"context {state.tokens:,} of {state.context_limit:,} tokens"
    title = f"{chat.model.name if chat.model else 'no model'} · {used}"
    if not replies:
        return Report(title, (Lines(("there is no reply yet",)),))
    return Report(title, (table, _picture(replies), *_within(chat, replies)))


def _picture(replies: Sequence[Turn]) -> Trend | Spark:
    """Return the speeds in the order of the replies, a series for each model; of few a sparkline."""
    speeds = [turn.stats.performance.decode_tokens_per_s for turn in replies]
    series: dict[str, list[tuple[float, float]]] = {}
    for place, turn in enumerate(replies, 1):
        series.setdefault(turn.model_name or "–", []).append((place, speeds[place - 1]))
    if len(replies) < 3 and len(series) == 1:
        return Spark(speeds, f"tokens/s by reply, at most {max(speeds):,.1f}")
    return Trend([Series(name, points) for name, points in series.items()], "replies", "tokens/s")


def _within(chat: "Chat", replies: Sequence[Turn]) -> Sequence[Spark]:
    """Return the speed over the last reply, where it was recorded."""
    speeds = chat.live_bench.speeds(replies[-1])
    return [Spark(speeds, f"tokens/s over the last reply, at most {max(speeds):,.1f}")] if speeds else []


def _row(turn: Turn, *, drafted: bool) -> tuple[str, ...]:
    stats, speed = turn.stats, turn.stats.performance
    return (
        str(turn.number),
        f"{stats.prompt_tokens:,}",
        f"{cached_share(turn):.0%}",
        f"{speed.seconds_to_first_token:.2f} s",
        f"{speed.prefill_tokens_per_s:,.0f}",
        f"{stats.reasoning_tokens:,}",
        f"{stats.generated_tokens:,}",
        f"{speed.decode_tokens_per_s:,.1f}",
        f"{speed.peak_nbytes / GIB:.2f}",
        *(_draft_columns(speed) if drafted else ()),
    )


def _draft_columns(speed: Performance) -> tuple[str, str, str]:
    """Return the share of accepted drafts, and their gain and cost relative to steps without."""
    if not speed.draft_cost:
        return "–", "–", "–"
    return f"{speed.drafts_accepted or 0:.0%}", f"×{speed.draft_gain or 0:.2f}", f"×{speed.draft_cost:.2f}"
