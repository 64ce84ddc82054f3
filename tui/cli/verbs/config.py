"""Show every setting and where its value comes from; get, set or unset one; print or edit the settings file.

`qchat config set` and `unset` change one setting in the file and keep all comments."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ....core import BUILT_IN_MODEL
from ....core.errors import UsageError
from ....core.machine.files import read_json
from ...text.columns import columns
from ...text.output import note, write
from ...user.editor import open_file
from ...user.paths import config_file, make_config_dir
from ...user.settings import KEYS, Settings, key_of, save, unsave
from ...user.toml_file import MAX_FILE_NBYTES, read_toml, write_text

MODEL_FILE = "generation_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        choices=tuple(ACTIONS),
        default="show",
        help="show (the default) [NAME ...], get NAME, set NAME VALUE, unset NAME, path, or edit in $EDITOR",
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="the settings, and for set the value")
    parser.add_argument("--model", metavar="MODEL", help="include what this model's authors recommend")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the action says; returns the exit code. Raises UsageError."""
    wanted, action = ACTIONS[args.action]
    if len(args.keys) != len(wanted) and args.action != "show":
        usage = " ".join((f"qchat config {args.action}", *wanted))
        raise UsageError(f"{len(args.keys)} words follow `qchat config {args.action}`, wanted `{usage}`")
    action(args)
    return 0


def _show(args: argparse.Namespace) -> None:
    names = [key_of(name, "qchat config show").name for name in args.keys] or list(KEYS)
    settings = _with_model(Settings.load(), args.model)
    if args.json:
        values = {name: {"value": settings[name], "origin": settings.origin(name)} for name in names}
        write(sys.stdout, json.dumps(values, ensure_ascii=False, indent=2, default=str) + "\n")
    else:
        rows = [
            (name, _summary(settings[name]), short_origin(settings.origin(name)), KEYS[name].meaning)
            for name in names
        ]
        write(sys.stdout, columns([("setting", "value", "from", "meaning"), *rows]))


def _get(args: argparse.Namespace) -> None:
    """Print the value in force, a list one item a line, nothing where there is none."""
    name = key_of(args.keys[0], "qchat config get").name
    value = _with_model(Settings.load(), args.model)[name]
    if args.json:
        write(sys.stdout, json.dumps(value, ensure_ascii=False, default=str) + "\n")
        return
    match value:
        case None:
            lines = []
        case bool() | dict():
            lines = [json.dumps(value, ensure_ascii=False)]
        case list():
            lines = value
        case _:
            lines = [value]
    write(sys.stdout, "".join(f"{line}\n" for line in lines))


def _set(args: argparse.Namespace) -> None:
    name, text = args.keys
    key = key_of(name, "qchat config set")
    path = save(key.name, key.parse(text, "qchat config set"))
    try:
        origin = Settings.load().origin(key.name)
    except UsageError as error:  # something else that was wrong before
        note(f"{key.name} is saved in {path}, but {error}")
        return
    if origin != str(path):
        note(f"{key.name} is saved in {path}, but here {origin} takes precedence")


def _unset(args: argparse.Namespace) -> None:
    """Remove a name from the file, also one that no setting has."""
    name = args.keys[0]
    known = name in read_toml(config_file())
    name = name if known else key_of(name, "qchat config unset").name
    if not unsave(name):
        raise UsageError(f"{config_file()} does not set {name}")


def short_origin(origin: str) -> str:
    """Return where a value comes from in few words: a model's file by its name, others with ~."""
    if Path(origin).name == MODEL_FILE:
        return f"the model's {MODEL_FILE}"
    home = str(Path("~").expanduser())
    return f"~{origin.removeprefix(home)}" if origin.startswith(f"{home}/") else origin


def _path(_: argparse.Namespace) -> None:
    write(sys.stdout, f"{config_file()}\n")


def _with_model(settings: Settings, model: str | None) -> Settings:
    """Add the recommendations of the model that would be loaded, if it is a folder."""
    folder = Path(model or settings["model"] or BUILT_IN_MODEL).expanduser()
    path = folder / MODEL_FILE
    if model and not folder.is_dir():
        raise UsageError(f"--model: there is no model folder at {model}")
    return settings.with_model(_recommended(path), str(path)) if path.is_file() else settings


def _recommended(path: Path) -> Mapping[str, Any]:
    return read_json(path, UsageError, MAX_FILE_NBYTES)


def _summary(value: Any) -> str:
    """Return a value on one short line."""
    match value:
        case None | [] | {}:
            return "–"
        case bool():
            return "true" if value else "false"
        case str():
            line = " ".join(value.split())
            return line if len(line) <= 40 else f"{line[:39]}…"
        case list():
            return ", ".join(map(str, value))
        case dict():
            return f"{len(value)} remapped"
        case _:
            return str(value)


def _edit(_: argparse.Namespace) -> None:
    """Open the settings file, from a template if it is new, in the user's editor, and check the result."""
    path = config_file()
    make_config_dir()
    if not path.exists():
        write_text(path, template())
    if code := open_file(path):
        raise UsageError(f"the editor ended with code {code}")
    Settings.load(flags={}, env={**os.environ})


def template() -> str:
    """Return a settings file that names every key and sets none."""
    lines = ["# qchat's settings: remove the # of a line to set it", ""]
    for key in KEYS.values():
        if key.name != "keys":
            wanted = "" if key.kind.wanted == "a text" else f" ({key.kind.wanted})"
            lines += [f"# {key.meaning}{wanted}", f"# {key.name} ="]
    return "\n".join([*lines, "", "# [keys]", '# stop = "escape"', ""])


# what follows each action, and what it does
ACTIONS: Mapping[str, tuple[tuple[str, ...], Callable[[argparse.Namespace], None]]] = {
    "show": (("[NAME ...]",), _show),
    "get": (("NAME",), _get),
    "set": (("NAME", "VALUE"), _set),
    "unset": (("NAME",), _unset),
    "path": ((), _path),
    "edit": ((), _edit),
}
