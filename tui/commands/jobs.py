"""Commands that make and measure models: live blocks that run beside the chat and can be stopped."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...core import BUILT_IN_MODEL
from ...core.errors import UsageError
from ..cli.verbs import Parser
from ..cli.verbs import convert as verb
from ..user.paths import user_path
from . import job_reports as shown
from .base import Command, Front, first_word, need_model, starting, turns, words
from .models import complete_model, resolve

if TYPE_CHECKING:
    from ..chat.controller import Chat

# what `core.UNQUANTIZED` is, which cannot be imported here without MLX
UNQUANTIZED = str(BUILT_IN_MODEL.parent / "quant" / "builtin" / "dense.toml")
USUAL_FLAGS = ("-q", "--q-bits", "4")
RUNS = 3
ROOM = 0.8  # of the memory, for weights; the rest is for what they compute


class Convert(Command):
    """Make a quantized model of SRC, at DST or in your models folder; FLAGS as of `qchat convert`.

    For example /convert embedded -q --q-bits 2 --q-recipe unsloth; without flags -q --q-bits 4. It runs
    beside the chat; /stop ends it, and the same command goes on where it was.
    """

    names = ("convert",)
    usage = "SRC [DST] [FLAGS]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        before, space, last = argument.rpartition(" ")
        known = _flags() if last.startswith("-") else complete_model(chat, last)
        return [before + space + one for one in starting(last, known)]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        args = _convert_arguments(words(argument) or [""])
        if not args.source:
            raise self.wrong("say which model to convert")
        source = await resolve(chat, front, args.source)
        target = user_path(args.target) if args.target else _target(chat, source, args)
        verb.check_choices(args)
        chat.start_job(
            f"convert {source.name} to {target.name}",
            "convert",
            {
                "source": str(source),
                "target": str(target),
                "options": verb.option_fields(args, UNQUANTIZED),
                "imatrix": None if args.imatrix is None else str(user_path(args.imatrix)),
                "awq": args.awq,
                "dequantize": args.dequantize,
                "force": args.force,
                "flags": verb.flags(args),
            },
            lambda events, result: shown.converted(events, result, target),
        )


def _convert_arguments(given: Sequence[str]) -> Namespace:
    parser = Parser(prog="/convert", add_help=False, allow_abbrev=False)
    parser.add_argument("source", nargs="?", default="")
    parser.add_argument("target", nargs="?", default="")
    verb.add_choices(parser)
    flags = [word for word in given if word.startswith("-")]
    return parser.parse_args([*given, *(() if flags else USUAL_FLAGS)])


def _flags() -> list[str]:
    parser = ArgumentParser(add_help=False)
    verb.add_choices(parser)
    return [option for action in parser._actions for option in action.option_strings]


def _target(chat: "Chat", source: Path, args: Namespace) -> Path:
    """In the user's models folder, named after what is asked for."""
    folder = models_folder(chat)
    bits = f"{args.bits}bit" if args.bits else None
    recipe = None if args.recipe == "none" else args.recipe
    parts = (recipe, args.mode or bits, "mxfp" if args.mxfp else None)
    label = "-".join(part for part in parts if part) or ("quantized" if args.quantize else "bf16")
    return folder / f"{source.name}-{label}"


def models_folder(chat: "Chat") -> Path:
    """The first of the user's folders, made when missing. Raises UsageError."""
    folder = user_path(chat.settings["models_dir"][0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}; name a destination") from error
    return folder


class Calibrate(Command):
    """Measure on a text which inputs of a model matter, for /convert --imatrix-path."""

    names = ("calibrate",)
    usage = "[MODEL] [-o FILE] [--data FILE] [--chunk-size N] [--chunks N]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return complete_model(chat, argument)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        parser = Parser(prog="/calibrate", add_help=False, allow_abbrev=False)
        parser.add_argument("model", nargs="?", default="")
        parser.add_argument("-o", "--output", default="")
        parser.add_argument("--data")
        parser.add_argument("--chunk-size", type=int)
        parser.add_argument("--chunks", type=int)
        args = parser.parse_args(words(argument))
        model = await chosen(chat, front, args.model)
        output = _path(args.output) or str(models_folder(chat) / f"{model.name}-imatrix.gguf")
        chat.start_job(
            f"calibrate {model.name}",
            "calibrate",
            {
                "model": str(model),
                "output": output,
                "data": _path(args.data),
                "chunk_size": args.chunk_size,
                "chunks": args.chunks,
            },
            shown.calibrated,
            alone=crowded(chat, model),
        )


class Eval(Command):
    """Measure how well a model predicts text; with --reference MODEL how far it is from that one."""

    names = ("eval",)
    usage = "[MODEL] [--reference MODEL] [--data FILE] [--context N]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        before, space, last = argument.rpartition(" ")
        return [before + space + one for one in complete_model(chat, last)]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        parser = Parser(prog="/eval", add_help=False, allow_abbrev=False)
        parser.add_argument("model", nargs="?", default="")
        parser.add_argument("--reference", default="")
        parser.add_argument("--data")
        parser.add_argument("--context", type=int)
        args = parser.parse_args(words(argument))
        model = await chosen(chat, front, args.model)
        reference = await resolve(chat, front, args.reference) if args.reference else None
        against = f" against {reference.name}" if reference else ""
        earlier = [job.result for job in chat.jobs if job.method == "eval" and job.result]
        chat.start_job(
            f"eval {model.name}{against}",
            "eval",
            {
                "model": str(model),
                "reference": None if reference is None else str(reference),
                "data": _path(args.data),
                "context": args.context,
            },
            lambda events, result: shown.evaluated(events, result, earlier),
            alone=crowded(chat, model, *([reference] if reference else [])),
        )


class Bench(Command):
    """Measure the speed of models: the capitals chat and a sustained reply, the best of N runs (3)."""

    names = ("bench",)
    usage = "[MODEL ...] [--runs N]"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        before, space, last = argument.rpartition(" ")
        return [before + space + one for one in complete_model(chat, last)]

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        parser = Parser(prog="/bench", add_help=False, allow_abbrev=False)
        parser.add_argument("models", nargs="*")
        parser.add_argument("--runs", type=int, default=RUNS)
        args = parser.parse_args(words(argument))
        if not 1 <= args.runs <= 100:
            raise UsageError(f"--runs is {args.runs}, wanted 1 to 100")
        models = [await chosen(chat, front, name) for name in args.models or [""]]
        named = ", ".join(model.name for model in models)
        params = {"models": [str(model) for model in models], "runs": args.runs}
        # a model beside it would take memory and bandwidth that are to be measured
        chat.start_job(f"bench {named}", "bench", params, shown.benched, alone=True)


class Compare(Command):
    """Have models A and B answer TEXT, or the last question; shows both answers, speeds and how far apart."""

    names = ("compare",)
    usage = "A B [TEXT]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        before, space, last = argument.rpartition(" ")
        return [before + space + one for one in complete_model(chat, last)] if before.count(" ") < 1 else []

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        first, rest = first_word(argument)
        second, text = first_word(rest)
        if not second:
            raise self.wrong("say which two models")
        text = text or next((turn.question for turn in reversed(turns(chat))), "")
        if not text:
            raise self.wrong("there is no question yet: say what both are to answer")
        models = [await resolve(chat, front, name) for name in (first, second)]
        chat.start_job(
            f"compare {models[0].name} and {models[1].name}",
            "compare",
            {
                "models": [str(model) for model in models],
                "text": text,
                "system": chat.state.system,
                "settings": chat.settings.reply(),
            },
            shown.compared,
            alone=crowded(chat, *models),
        )


class Inspect(Command):
    """Show what a model folder holds: its classes of tensors, or with --tensors every one."""

    names = ("inspect",)
    usage = "[MODEL] [--tensors]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return complete_model(chat, argument)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        parser = Parser(prog="/inspect", add_help=False, allow_abbrev=False)
        parser.add_argument("model", nargs="?", default="")
        parser.add_argument("--tensors", action="store_true")
        args = parser.parse_args(words(argument))
        model = await chosen(chat, front, args.model)
        params = {"model": str(model), "tensors": args.tensors}
        chat.start_job(f"inspect {model.name}", "inspect", params, shown.inspected)


async def chosen(chat: "Chat", front: Front, name: str) -> Path:
    """The model called so, by default the loaded one. Raises UsageError."""
    return await resolve(chat, front, name) if name else Path(need_model(chat).path)


def crowded(chat: "Chat", *models: Path) -> bool:
    """Whether the largest of `models` has no room beside the chat's model, or beside a job that it left."""
    limit = ROOM * chat.status.limit_nbytes
    taken = chat.model.nbytes if chat.model else 0
    return chat.parked or 0 < limit < taken + max(map(shown.folder_nbytes, models))


def _path(text: str | None) -> str | None:
    return str(user_path(text)) if text else None
