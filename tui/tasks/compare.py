"""The task `compare`: two models on one prompt."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..text.report import Bar, Bars, Lines, Markdown, Part, Report
from .base import Door, EngineTask, JobRequest, add_json
from .progress import Events, notices
from .words import first_word

if TYPE_CHECKING:
    from ...core.measuring.results import Comparison

SIDES = ("the first model", "the second model")


class Compare(EngineTask["Comparison"]):
    """Have models A and B answer TEXT; show speeds and divergence.

    In a chat TEXT is the last question by default, and both answer with the chat's settings.
    """

    name = "compare"
    usage = "[OPTIONS] A B [TEXT]"
    memory = "model"
    most_models = 2

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("first", nargs="?", default="", metavar="A", help="a model's folder or name")
        parser.add_argument("second", nargs="?", default="", metavar="B", help="the other model's")
        parser.add_argument("text", nargs="*", metavar="TEXT", help="what both are to answer")
        add_json(parser)

    def chat_words(self, argument: str) -> list[str]:
        """Return options and models as words, and TEXT as it is written: it may hold quotes of any kind."""
        given, models = [], 0
        while argument and (models < self.most_models or argument.startswith("--json")):
            word, argument = first_word(argument)
            given.append(word)
            models += not word.startswith("-")
        return [*given, "--", argument] if argument else given

    def check(self, args: argparse.Namespace, door: Door) -> None:
        if not args.second:
            raise self.wrong("say which two models", door)
        args.text = " ".join(args.text) or door.question
        if not args.text.strip():
            why = "there is no question yet: " if door.in_chat else ""
            raise self.wrong(f"{why}say what both are to answer", door)

    def models(self, args: argparse.Namespace) -> Sequence[str]:
        return (args.first, args.second)

    def request(self, args: argparse.Namespace, folders: Sequence[Path], door: Door) -> JobRequest:
        from ...core.measuring.results import Comparison

        params = {
            "models": [str(folder) for folder in folders],
            "text": args.text,
            "system": door.system,
            "settings": dict(door.settings),
        }
        return JobRequest(f"compare {folders[0].name} and {folders[1].name}", "compare", params, Comparison)

    def running(self, events: Events) -> Report:
        """Show both answers as they come."""
        parts = [part for side in range(len(SIDES)) for part in _answer_so_far(events, side)]
        said = notices(events)
        warnings = (Lines(said, "warn"),) if said else ()
        return Report("", (*warnings, *(parts or (Lines(("loading",), "dim"),))))

    def report(self, result: "Comparison") -> Report:
        answers = [part for row in result.rows for part in _answer(row.model, row.text)]
        speeds = [
            Bar(row.model, row.decode_tokens_per_s, f"{row.decode_tokens_per_s:,.1f} tok/s")
            for row in result.rows
        ]
        return Report("", (*answers, Bars(speeds), Lines((_distance(result),))))


def _answer_so_far(events: Events, side: int) -> tuple[Part, ...]:
    """Return what one of the models has said; nothing before it begins."""
    own = [one for one in events if one.get("side") == side]
    row = next((one for one in own if one["event"] == "row"), None)
    if row is not None:
        return _answer(row["model"], row["text"])
    text = "".join(str(one["text"]) for one in own if one["event"] == "text")
    thinks = any(one["event"] == "thought" for one in own) and not text
    return _answer(f"{SIDES[side]} thinks" if thinks else SIDES[side], text) if own else ()


def _answer(model: str, text: str) -> tuple[Part, ...]:
    return (Lines((model,), "title"), Markdown(text), Lines(("",)))


def _distance(result: "Comparison") -> str:
    if result.kl_mean is None:
        return "the models have different tokens: nothing can be compared"
    first, second = (row.model for row in result.rows[:2])
    return (
        f"KL divergence of {second} from {first}: {result.kl_mean:.4g} nats on average over the answer; "
        f"{result.top1_agreement or 0:.0%} of the tokens are the first choice of both"
    )


TASK = Compare()
