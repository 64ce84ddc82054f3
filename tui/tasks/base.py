"""What a task is: its options, its work, and its result in words, all the same for both of its doors.

`qchat NAME` and `/NAME` are the doors. Each parses words with the task's one parser, does the work, and shows
the task's one report. A task's docstring is its help: the first line stands in lists, all of it on its page.
"""

import argparse
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from ...core.errors import QchatError, UsageError
from ..text.report import Lines, Plot, Report
from ..user.paths import user_path
from .parsers import PageParser, Parser, action_names
from .progress import Events, running_report, with_notices
from .words import words

if TYPE_CHECKING:
    from ...core import Store
    from ...core.hub.library import Locations
    from .variants import Variant

Result = TypeVar("Result")


@dataclass(frozen=True)
class Door:
    """Where a task was asked for, and what that place provides: the command line has none but the first two.

    `prefix` stands before the task's name. `model` is the loaded folder, `question` the last one asked.
    """

    prefix: str
    models_dir: Sequence[str]
    in_chat: bool = False
    model: Path | None = None
    conversation: int | None = None
    question: str = ""
    system: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    store: "Store | None" = None

    @property
    def places(self) -> "Locations":
        """Where models are looked for."""
        from ...core.hub.library import Locations

        return Locations.from_setting(self.models_dir)

    def new_model_folder(self) -> Path:
        """Return the first of the user's models folders, and make it if it is missing. Raises UsageError."""
        folder = user_path(self.models_dir[0])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be made: {error.strerror}; name a destination") from error
        return folder


@dataclass(frozen=True)
class Outcome:
    """What a finished task has to show, to say beside that, and to give as JSON."""

    report: Report
    notes: Sequence[str] = ()
    value: Any = None


@dataclass(frozen=True)
class JobRequest:
    """A method of the engine and its parameters; `result` is the type of what it returns.

    Plots are part of the report if it is `plotted`.
    """

    title: str
    method: str
    params: Mapping[str, Any]
    result: type
    plotted: bool = True


class Task:
    """One task. `name` is the word after qchat or /; `usage` what follows it, in short.

    `most_models`: so many words can name models, which completion offers. `screen`: the screen that the app
    opens where there are no words.
    """

    name: ClassVar[str]
    usage: ClassVar[str] = "[OPTIONS]"
    most_models: ClassVar[int] = 1
    screen: ClassVar[Literal["", "models", "sessions", "convert"]] = ""

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the task's options and words."""
        raise NotImplementedError

    def parser(self, door_prefix: str, kind: type[Parser] = Parser) -> Parser:
        """Return the one parser of both doors."""
        prog, description = f"{door_prefix}{self.name}", inspect.getdoc(self)
        parser = kind(prog=prog, allow_abbrev=False, description=description)
        self.arguments(parser)
        return parser

    def parse(self, given: Sequence[str], door: Door) -> argparse.Namespace:
        """Read and check the words. Raises UsageError, and in the chat HelpRequested."""
        parser = self.parser(door.prefix, PageParser if door.in_chat else Parser)
        # words may stand between options, unless the first one is an action
        args = parser.parse_args(given) if action_names(parser) else parser.parse_intermixed_args(given)
        self.check(args, door)
        return args

    def check(self, args: argparse.Namespace, door: Door) -> None:
        """Raise UsageError for words that contradict each other, would change nothing, or are missing."""

    def chat_words(self, argument: str) -> list[str]:
        """Return the words that the chat's line `argument` stands for. Raises UsageError."""
        return words(argument)

    def wrong(self, sentence: str, door: Door) -> UsageError:
        """Return an error that ends with how the task is used."""
        command = f"{door.prefix}{self.name}"
        return UsageError(f"{sentence}: {command} {self.usage}; {command} --help lists the options")


class EngineTask(Task, Generic[Result]):
    """A task that the engine does, as one of its jobs.

    `memory`: what it takes of it; "none" reads files alone, "model" loads models, "all" wants to be alone, as
    nothing may run beside a measurement of speed. `interrupted` says what becomes of a stopped run.
    """

    memory: ClassVar[Literal["none", "model", "all"]] = "none"
    interrupted: ClassVar[str] = ""

    def models(self, args: argparse.Namespace) -> Sequence[str]:
        """Return the names of models to find; the empty name is the loaded one's."""
        return (args.model,)

    def request(self, args: argparse.Namespace, folders: Sequence[Path], door: Door) -> JobRequest:
        """Return what to ask of the engine; `folders` are those of `models`. Raises UsageError."""
        raise NotImplementedError

    def report(self, result: Result) -> Report:
        """Say the result in words."""
        raise NotImplementedError

    def report_after(
        self, result: Result, earlier: Sequence[Result], known: Sequence["Variant"] = ()
    ) -> Report:
        """Say the result, beside `earlier` ones of the same task in this chat and `known` other models."""
        del earlier, known
        return self.report(result)

    def compares(self, args: argparse.Namespace) -> bool:
        """Whether the result is shown beside the models that were measured before."""
        del args
        return False

    def running(self, events: Events) -> Report:
        """Say how far the job is."""
        return running_report(events)

    def json_value(self, value: Mapping[str, Any]) -> Any:
        """Return what --json prints of the engine's result."""
        return value

    def show(
        self,
        events: Events,
        value: Mapping[str, Any] | None,
        request: JobRequest,
        *,
        as_json: bool = False,
        earlier: Sequence[Mapping[str, Any]] = (),
        known: Sequence["Variant"] = (),
    ) -> Report:
        """Return what both doors show: how far the job is, or its result once there is one."""
        if value is None:
            return self.running(events)
        if as_json:
            return json_report(self.json_value(value))
        try:
            result = decode(value, request.result)
            before = [decode(one, request.result) for one in earlier]
            report = self.report_after(result, before, known)
            return with_notices(report if request.plotted else without_plots(report), events)
        except QchatError as error:
            return Report("", (Lines((str(error),), "bad"),))


class LocalTask(Task):
    """A task that this process does itself; with `needs_store` on the stored conversations."""

    needs_store: ClassVar[bool] = False

    def question(self, args: argparse.Namespace, door: Door) -> str:
        """Return what the user has to agree to first; empty where that is nothing. Raises QchatError."""
        del args, door
        return ""

    def perform(self, args: argparse.Namespace, door: Door) -> Outcome:
        """Do it. Raises QchatError."""
        raise NotImplementedError


def decode(value: Mapping[str, Any], kind: type[Result]) -> Result:
    """Check and convert what came through the pipe. Raises QchatError for anything else."""
    import msgspec

    try:
        return msgspec.convert(value, kind, str_keys=True, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        raise QchatError(f"the engine's result cannot be read: {error}") from error


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"no {kind}")


def without_plots(report: Report) -> Report:
    return replace(report, parts=[part for part in report.parts if not isinstance(part, Plot)])


def json_text(value: Any) -> str:
    """Return `value` as --json prints it."""
    import json

    return json.dumps(value, ensure_ascii=False, indent=2)


def json_report(value: Any) -> Report:
    """Return `value` as --json shows it in a chat."""
    return Report("", (Lines(json_text(value).split("\n")),))


def add_json(parser: Any, default: Any = False) -> None:
    """Add --json, which every task with figures has."""
    parser.add_argument("--json", action="store_true", default=default, help="print it as JSON")


def optional_path(text: str | None) -> str | None:
    """Return an option's path made absolute, for a process in another folder."""
    return str(user_path(text)) if text else None


def folder_nbytes(folder: Path) -> int:
    """Return the bytes of a model folder's weight files; 0 where it is gone."""
    try:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    except OSError:
        return 0
