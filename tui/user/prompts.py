"""Prompt templates: text files in the folder `prompts` of the settings, filled in with words.

`$1` to `$9` are the words, `$ARGUMENTS` all of them as they were typed, `$$` a dollar sign. Refuses names
that are no file's in that folder.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...core.errors import UsageError
from ...core.machine.files import read_text
from .paths import config_dir, make_config_dir
from .settings import closest
from .toml_file import write_text

SUFFIXES = (".md", ".txt")
MAX_NBYTES = 1 << 20
NAME = re.compile(r"[\w-]{1,60}")
_PLACE = re.compile(r"\$(\$|[1-9]|ARGUMENTS\b)")


def prompts_dir() -> Path:
    return config_dir() / "prompts"


def prompt_files() -> Mapping[str, Path]:
    """Return the files of the templates by name, in order; Markdown before text of the same name."""
    return named_files(prompts_dir(), SUFFIXES)


def named_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the files in `folder` with one of `suffixes`, by name, the first suffix before the others."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    except OSError:
        return {}
    found.sort(key=lambda path: suffixes.index(path.suffix), reverse=True)
    files = {path.stem: path for path in found if NAME.fullmatch(path.stem)}
    return dict(sorted(files.items()))


def check_name(name: str, what: str) -> str:
    """Return `name` if a file may be called so. Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r:.60} cannot be the name of a {what}: use letters, digits, - and _")
    return name


def find_file(name: str, files: Mapping[str, Path], what: str, folder: Path) -> Path:
    """Return the file called `name`. Raises UsageError that names the nearest one."""
    if name in files:
        return files[name]
    near = closest(name, files)
    known = f"did you mean {near}?" if near else f"{folder} has {', '.join(files) or 'none'}"
    raise UsageError(f"there is no {what} {name!r:.60}; {known}")


def read_prompt(name: str) -> str:
    """Return the text of a template. Raises UsageError."""
    path = find_file(name, prompt_files(), "prompt", prompts_dir())
    return read_text(path, UsageError, MAX_NBYTES).strip()


def save_prompt(name: str, text: str) -> Path:
    """Write a template, a new one as Markdown; return its path. Raises UsageError."""
    path = prompt_files().get(name) or prompts_dir() / f"{check_name(name, 'prompt')}.md"
    make_folder(path.parent)
    write_text(path, text.rstrip() + "\n")
    return path


def make_folder(folder: Path) -> None:
    """Make a folder of the settings. Raises UsageError."""
    make_config_dir()
    try:
        folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made: {error.strerror}") from error


def places(template: str) -> list[str]:
    """Return what a template asks for: `$1`, `$2` and `$ARGUMENTS`, each once, in that order."""
    return sorted({f"${found}" for found in _PLACE.findall(template) if found != "$"})


def wants_words(template: str) -> bool:
    """Whether the template has places for single words."""
    return any(place[1:].isdecimal() for place in places(template))


def fill(template: str, arguments: str, words: Sequence[str] = ()) -> str:
    """Return the template with `words` and all of the `arguments` in their places.

    Without places, arguments follow the template as a paragraph. Raises UsageError where words are missing.
    """
    numbers = [int(place[1:]) for place in places(template) if place[1:].isdecimal()]
    if numbers and max(numbers) > len(words):
        raise UsageError(f"the prompt wants {max(numbers)} words, and {len(words)} were given")

    def value(match: re.Match[str]) -> str:
        found = match[1]
        return "$" if found == "$" else arguments if found == "ARGUMENTS" else words[int(found) - 1]

    filled = _PLACE.sub(value, template)
    return filled if places(template) or not arguments else f"{filled}\n\n{arguments}"
