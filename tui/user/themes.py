"""Themes: small TOML files, the shipped ones and the user's own, as Textual themes.

Owns the colours that a theme may name and the defaults of those it does not name. Refuses unknown keys and
invalid colours, naming file and key; a bad file does not affect the others.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textual.color import Color, ColorParseError
from textual.theme import BUILTIN_THEMES, Theme

from ...core.errors import UsageError
from ...core.quoting import quote_value
from .paths import SHIPPED_THEMES as SHIPPED
from .paths import config_dir
from .settings import closest
from .toml_file import read_toml

MAX_THEMES = 200
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
# colours of Textual's own, each with a meaning everywhere
BASE = (
    "primary", "secondary", "accent", "foreground", "background", "surface", "panel", "boost",
    "success", "warning", "error",
)  # fmt: skip
# colours of ours, and the base colour that stands in for each
EXTRA = {
    "user-bar": "primary",
    "think-fg": "secondary",
    "code-bg": "surface",
    "key-bg": "panel",
    "question-bg": "surface",
    "gauge-ok": "success",
    "gauge-warn": "warning",
    "gauge-hot": "error",
    "tok-fast": "success",
    "tok-slow": "warning",
}
# further ones of Textual's that a theme may want to choose itself
VARIABLES = (
    "text", "text-muted", "text-disabled", "border", "border-blurred",
    "block-cursor-foreground", "block-cursor-background",
    "block-cursor-blurred-foreground", "block-cursor-blurred-background", "block-hover-background",
    "input-cursor-foreground", "input-cursor-background",
    "input-selection-foreground", "input-selection-background",
    "screen-selection-foreground", "screen-selection-background",
    "scrollbar", "scrollbar-hover", "scrollbar-active", "scrollbar-background",
    "scrollbar-background-hover", "scrollbar-background-active", "scrollbar-corner-color",
    "link-color", "link-color-hover",
)  # fmt: skip
COLOURS = (*BASE, *EXTRA, *VARIABLES)
HEADER = {"description": str, "dark": bool, "ansi": bool, "pygments": str}
DEFAULT_PYGMENTS = {True: "monokai", False: "default"}


@dataclass(frozen=True)
class Look:
    """A theme with its description and its file."""

    theme: Theme
    description: str
    path: Path

    @property
    def name(self) -> str:
        return self.theme.name


@dataclass
class Shelf:
    """The themes in some folders; a later folder replaces an earlier one's theme of the same name."""

    folders: tuple[Path, ...] = ()
    looks: dict[str, Look] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    _seen: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def open(cls) -> "Shelf":
        """Return the shipped themes and those in the user's config folder."""
        shelf = cls((SHIPPED, config_dir() / "themes"))
        shelf.refresh()
        return shelf

    def refresh(self) -> bool:
        """Read changed files again; return whether any had changed."""
        files = {path: stamp for folder in self.folders for path, stamp in _files(folder)}
        if files == self._seen:
            return False
        self._seen = files
        self.looks, self.problems = {}, []
        for path in files:
            try:
                self.looks[path.stem] = load(path)
            except UsageError as problem:
                self.problems.append(str(problem))
        return True

    def find(self, name: str, env: Mapping[str, str] | None = None) -> Look:
        """Return a theme by name; `auto` matches the terminal. Raises UsageError with the nearest name."""
        if name == "auto":
            name = suited(os.environ if env is None else env)
        if name not in self.looks:
            near = closest(name, self.looks)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(self.looks)}"
            raise UsageError(f"there is no theme {name:.60}; {hint}")
        return self.looks[name]


def suited(env: Mapping[str, str]) -> str:
    """Name the shipped theme that matches the terminal; with few colours its own palette."""
    if env.get("COLORTERM", "").lower() not in ("truecolor", "24bit"):
        return "terminal"
    # rxvt's convention, which others follow: "foreground;background" by palette number
    return "day" if env.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15") else "night"


def load(path: Path) -> Look:
    """Load one theme file. Raises UsageError naming the file and the key."""
    if not NAME.fullmatch(path.stem):
        raise UsageError(f"{path}: a theme's name has small letters, digits and dashes only")
    content = read_toml(path)
    header = {name: value for name, value in content.items() if name != "colors"}
    for name, value in header.items():
        if name not in HEADER:
            raise UsageError(f"{path}: there is no key {name:.60}{_hint(name, (*HEADER, 'colors'))}")
        if not isinstance(value, HEADER[name]):
            kind = "true or false" if HEADER[name] is bool else "a text"
            raise UsageError(f"{path}: {name} is {quote_value(value)}, wanted {kind}")
    colours = _colours(path, content.get("colors"))
    return Look(_theme(path.stem, header, colours), header.get("description", ""), path)


def _colours(path: Path, table: Any) -> dict[str, str]:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: [colors] is missing, wanted a table of colours")
    for name, value in table.items():
        if name not in COLOURS:
            raise UsageError(f"{path}: there is no colour {name:.60}{_hint(name, COLOURS)}")
        try:
            Color.parse(value if isinstance(value, str) else "")
        except ColorParseError:
            raise UsageError(
                f"{path}: {name} is {quote_value(value)}, wanted a colour such as #20a0ff"
            ) from None
    for name in ("primary", "foreground", "background"):
        if name not in table:
            raise UsageError(f"{path}: the colour {name} is missing")
    return table


def _hint(name: str, known: tuple[str, ...]) -> str:
    near = closest(name, known)
    return f"; did you mean {near}?" if near else ""


def _theme(name: str, header: Mapping[str, Any], colours: Mapping[str, str]) -> Theme:
    base: dict[str, Any] = {part: colours[part] for part in BASE if part in colours}
    variables = {
        extra: colours.get(stand_in, colours["background" if extra.endswith("-bg") else "foreground"])
        for extra, stand_in in EXTRA.items()
    }
    variables |= {part: colour for part, colour in colours.items() if part not in BASE}
    dark, ansi = header.get("dark", True), header.get("ansi", False)
    if ansi:  # Textual's own style sheets name variables that only its two ansi themes have
        variables = BUILTIN_THEMES["ansi-dark" if dark else "ansi-light"].variables | variables
    variables["pygments"] = header.get("pygments", DEFAULT_PYGMENTS[dark])
    return Theme(name=name, dark=dark, ansi=ansi, variables=variables, **base)


def extra_defaults() -> dict[str, str]:
    """Return our variables for an app whose theme is not set yet."""
    variables = load(SHIPPED / "night.toml").theme.variables
    return {name: variables[name] for name in (*EXTRA, "pygments")}


def _files(folder: Path) -> list[tuple[Path, tuple[int, int]]]:
    """Return theme files with modification time in nanoseconds and size in bytes, which reveal a change."""
    try:
        paths = sorted(folder.glob("*.toml"))[:MAX_THEMES]
        return [(path, (path.stat().st_mtime_ns, path.stat().st_size)) for path in paths]
    except OSError:  # removed or replaced just now; the next look finds out
        return []
