"""Personas: a system prompt and settings of replies in a TOML file each, in the settings folder `personas`.

A persona may set what shapes replies and nothing else. Refuses, in one sentence, a file that cannot be read,
an unknown setting and a bad value.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import UsageError
from .paths import config_dir
from .prompts import check_name, find_file, make_folder, named_files
from .settings import KEYS, Settings, key_of
from .toml_file import edit_toml, read_toml

# in this order they take effect
PERSONAL = (
    "system",
    *(key.name for key in KEYS.values() if key.reply and key.name != "system"),
    "history",
    "show_thinking",
)


def personas_dir() -> Path:
    return config_dir() / "personas"


def persona_files() -> Mapping[str, Path]:
    """Return the files of the personas by name, in order."""
    return named_files(personas_dir(), (".toml",))


def read_persona(name: str) -> dict[str, Any]:
    """Return the settings of a persona, in the order in which they take effect. Raises UsageError."""
    path = find_file(name, persona_files(), "persona", personas_dir())
    given: dict[str, Any] = {}
    for word, value in read_toml(path).items():
        key = key_of(word, str(path))
        if key.name not in PERSONAL:
            raise UsageError(f"{path}: a persona cannot set {key.name}, only {', '.join(PERSONAL)}")
        given[key.name] = key.check(value, str(path))
    return {key: given[key] for key in PERSONAL if key in given}


def save_persona(name: str, settings: Settings) -> Path:
    """Write the settings that the user gave as a persona; return its path. Raises UsageError."""
    path = personas_dir() / f"{check_name(name, 'persona')}.toml"
    given = {key: settings[key] for key in PERSONAL if settings.given(key) and settings[key] is not None}
    written = {key: KEYS[key].written(value) for key, value in given.items()}
    make_folder(path.parent)

    def replace(table: Any) -> None:
        for old in [key for key in table if key not in written]:
            del table[old]
        table.update(written)

    edit_toml(path, replace)
    return path
