"""Words that complete a command line: argcomplete asks the parsers, and for each argument a completer here.

The shell runs qchat itself with _ARGCOMPLETE set. Imported only then, and never imports what is slow: no MLX,
no terminal library, and no model's weights are opened.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..user.attachments import complete as complete_path
from ..user.kinds import list_words
from ..user.settings import KEYS, TOOL_NAMES, Settings, key_of
from .verbs import VERBS, parser_of

# what a completer returns: words, or words with their descriptions, for zsh and fish
Words = Iterable[str] | Mapping[str, str]
Completer = Callable[..., Words]


def complete() -> NoReturn:
    """Print the words that the shell asks for, and end the process."""
    from argcomplete.completers import SuppressCompleter
    from argcomplete.finders import CompletionFinder
    from argcomplete.lexers import split_line

    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    verb = words[1] if words[1:] and words[1] in VERBS else ""
    if verb:
        parser = parser_of(verb)
        os.environ["_ARGCOMPLETE"] = "2"  # the index of the word that is the program: `qchat VERB` is one
    else:
        from .arguments import parser as main_parser

        parser = main_parser()
    set_completers(parser, words[2:] if verb else words[1:])
    CompletionFinder()(parser, always_complete_options=False, default_completer=SuppressCompleter())
    os._exit(1)  # not reached: the finder ends the process


def set_completers(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Give every argument of a parser, and of its sub-parsers, the completer of its kind.

    `words` are those before the cursor. The kind of an argument is its dest or its metavar.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, part in action.choices.items():
                set_completers(part, words[1:] if words[:1] == [name] else [])
        elif action.choices is None:
            completer = _find_completer(parser, action, words)
            if completer is not None:
                action.completer = completer  # pyright: ignore[reportAttributeAccessIssue]


def _find_completer(
    parser: argparse.ArgumentParser, action: argparse.Action, words: list[str]
) -> Completer | None:
    if action.dest == "model" and not action.option_strings and parser.prog == "qchat":
        return complete_models if words else complete_first
    if action.dest == "id" and parser.prog == "qchat pull":
        return complete_published
    if action.metavar == "KEY":
        return _ConfigWords(words)
    return OF_DEST.get(action.dest) or OF_METAVAR.get(str(action.metavar))


def complete_first(prefix: str, **_: Any) -> Words:
    """Return the verbs with their descriptions, and the models."""
    return {**VERBS, **dict.fromkeys(complete_models(prefix), "")}


def complete_models(prefix: str, **_: Any) -> list[str]:
    """Return the names of the models on this machine, and folders."""
    from ...core.hub.library import Locations, model_names

    names = model_names(Locations.from_setting(Settings.load()["models_dir"]))
    return [*names, *complete_folders(prefix)]


def complete_published(**_: Any) -> list[str]:
    from ...core.hub.catalog import PUBLISHED

    return [model.id for model in PUBLISHED]


def complete_folders(prefix: str, **_: Any) -> list[str]:
    return [path for path in complete_path(prefix, Path.cwd()) if path.endswith("/")]


def complete_files(prefix: str, **_: Any) -> list[str]:
    return complete_path(prefix, Path.cwd())


def complete_themes(**_: Any) -> list[str]:
    from ..user.paths import theme_files

    return ["auto", *dict.fromkeys(path.stem for path in theme_files())]


def complete_personas(**_: Any) -> list[str]:
    from ..user.personas import persona_files

    return list(persona_files())


def complete_recipes(**_: Any) -> Words:
    from ...core import BUILTIN
    from ..tasks.budget import BEST

    return (*BUILTIN, BEST)


def complete_conversations(prefix: str, **_: Any) -> dict[str, str]:
    """Return the numbers of the conversations with their titles; from the first letter on the titles too."""
    from ..chat.conversations import LATEST, SEARCHED, open_store
    from ..text.sanitise import printable
    from ..user.paths import conversations_file

    if not conversations_file().exists():
        return {}
    with open_store() as store:
        kept = store.conversations(SEARCHED)
    titles = {str(one.id): " ".join(printable(one.title).split()) for one in kept}
    by_title = {title: f"number {number}" for number, title in titles.items() if title} if prefix else {}
    return {**titles, LATEST: "the last one", **by_title}


def complete_tools(**_: Any) -> Words:
    return TOOL_NAMES


def complete_options(prefix: str, **_: Any) -> list[str]:
    """Return `KEY=` for -o, or `KEY=VALUE` once the key is there."""
    name, equals, _value = prefix.partition("=")
    if not equals:
        return [f"{name}=" for name in KEYS]
    return [f"{name}={word}" for word in values_of(name)]


def values_of(name: str) -> list[str]:
    """Return the values of a setting, if they can be listed."""
    key = KEYS.get(name.replace("-", "_"))
    match key and key.name:
        case None:
            return []
        case "theme":
            return complete_themes()
        case "model":
            return complete_models("")
    return list(list_words(key_of(name, "").kind))


class _ConfigWords:
    """Completes what follows `qchat config ACTION`: settings, and after `set NAME` its values."""

    def __init__(self, words: list[str]):
        self.given = [word for word in words if not word.startswith("-")]

    def __call__(self, **_: Any) -> Words:
        match self.given:
            case ["set", name]:
                return values_of(name)
            case ["get" | "set" | "unset"] | ["show", *_]:
                return {key.name: key.meaning for key in KEYS.values()}
        return []


OF_DEST: Mapping[str, Completer] = {
    "theme": complete_themes,
    "persona": complete_personas,
    "recipe": complete_recipes,
    "options": complete_options,
    "name": complete_models,
    "yes_tools": complete_tools,
}
OF_METAVAR: Mapping[str, Completer] = {
    "MODEL": complete_models,
    "FOLDER": complete_folders,
    "FILE": complete_files,
    "ID": complete_conversations,
}
