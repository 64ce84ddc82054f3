"""Show every setting with its value and where it comes from, tell where the settings file is, or edit it."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....core import BUILT_IN_MODEL
from ....core.errors import UsageError
from ....core.machine.files import read_json
from ...text.columns import columns
from ...text.output import write
from ...user.editor import open_file
from ...user.paths import config_file, make_config_dir
from ...user.settings import KEYS, Settings, key_of
from ...user.toml_file import MAX_FILE_NBYTES

MODEL_FILE = "generation_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        choices=("show", "path", "edit"),
        default="show",
        help="show (the default), path, or edit in $EDITOR",
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="show only these")
    parser.add_argument("--model", metavar="MODEL", help="with what this model's authors recommend")
    parser.add_argument("--json", action="store_true", help="print them as JSON")


def run(args: argparse.Namespace) -> int:
    """Print or edit; returns the exit code. Raises UsageError."""
    if args.action != "show" and args.keys:
        raise UsageError(f"`qchat config {args.action}` takes no KEY")
    match args.action:
        case "path":
            write(sys.stdout, f"{config_file()}\n")
            return 0
        case "edit":
            return _edit()
        case _:
            return _show(args)


def _show(args: argparse.Namespace) -> int:
    names = [key_of(name, "qchat config show").name for name in args.keys] or list(KEYS)
    settings = _with_model(Settings.load(), args.model)
    if args.json:
        values = {name: {"value": settings[name], "origin": settings.origin(name)} for name in names}
        write(sys.stdout, json.dumps(values, ensure_ascii=False, indent=2) + "\n")
    else:
        rows = [(name, _shown(settings[name]), settings.origin(name), KEYS[name].meaning) for name in names]
        write(sys.stdout, columns([("setting", "value", "from", "meaning"), *rows]))
    return 0


def _with_model(settings: Settings, model: str | None) -> Settings:
    """Add the recommendations of the model that would be loaded, if it is a folder."""
    folder = Path(model or settings["model"] or BUILT_IN_MODEL).expanduser()
    path = folder / MODEL_FILE
    if model and not folder.is_dir():
        raise UsageError(f"--model: there is no model folder at {model}")
    return settings.with_model(_recommended(path), str(path)) if path.is_file() else settings


def _recommended(path: Path) -> Mapping[str, Any]:
    return read_json(path, UsageError, MAX_FILE_NBYTES)


def _shown(value: Any) -> str:
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


def _edit() -> int:
    """Open the file in the user's editor, then say whether it holds."""
    path = config_file()
    make_config_dir()
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(template(), encoding="utf-8")
    if code := open_file(path):
        raise UsageError(f"the editor ended with code {code}")
    Settings.load(flags={}, env={**os.environ})
    return 0


def template() -> str:
    """A settings file in which every key is there and none is set."""
    lines = ["# qchat's settings; a line counts once its # is gone", ""]
    for key in KEYS.values():
        if key.name != "keys":
            wanted = "" if key.kind.wanted == "a text" else f" ({key.kind.wanted})"
            lines += [f"# {key.meaning}{wanted}", f"# {key.name} ="]
    return "\n".join([*lines, "", "# [keys]", '# stop = "escape"', ""])
