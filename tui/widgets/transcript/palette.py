"""The transcript's style names as the rich styles of a theme, each made once from the theme's variables."""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from rich.style import Style
from textual.color import Color, ColorParseError
from textual.theme import Theme

if TYPE_CHECKING:
    from pygments.style import Style as CodeStyle
    from rich.color import Color as RichColor

# style words, `$variable` for the foreground and `@variable` for the background
_LOOKS = {
    "strong": "bold",
    "em": "italic",
    "struck": "strike",
    "code": "$accent",
    "math": "$accent",
    "link": "underline",
    "address": "$primary underline",
    "h1": "bold underline $primary",
    "h2": "bold $primary",
    "h3": "bold $primary",
    "h4": "bold",
    "h5": "bold",
    "h6": "bold",
    "bullet": "$primary",
    "rule": "$text-muted",
    "copy": "bold $primary",
    "ground": "@code-bg",
    "quote": "$text-muted",
    "quoted": "$text-muted",
    "bar": "$user-bar",
    "question": "bold",
    "band": "@question-bg",
    "fact": "$text-muted",
    "button": "$primary",
    "thought": "$think-fg",
    "thought.head": "$think-fg italic",
    "info": "$text-muted",
    "warning": "$warning",
    "error": "$error",
    "title": "bold $primary",
    "card": "$border",
    "cap": "bold $primary @key-bg",
    "dim": "$text-muted",
    "accent": "$accent",
    "good": "$gauge-ok",
    "warn": "$gauge-warn",
    "bad": "$gauge-hot",
    "report.bar": "$primary",
    "pill": "bold $block-cursor-foreground @block-cursor-background",
    "cursor": "bold $accent",
    "found": "reverse $warning",
    "found.here": "bold reverse $accent",
    "selected": "$screen-selection-foreground @screen-selection-background",
}
_STAND_INS = {
    "user-bar": "primary",
    "think-fg": "text-muted",
    "code-bg": "surface",
    "question-bg": "surface",
    "key-bg": "panel",
}
_STAND_INS |= {"gauge-ok": "success", "gauge-warn": "warning", "gauge-hot": "error"}
# lines of a diff, for which few code styles have colours of their own
_DIFF_TOKENS = {"Generic.Deleted": "error", "Generic.Inserted": "success"}
# for themes of the terminal's own sixteen colours
_ANSI_TOKENS = {
    "Keyword": "ansi_blue",
    "String": "ansi_green",
    "Number": "ansi_cyan",
    "Comment": "ansi_bright_black",
}
_ANSI_TOKENS |= {
    "Function": "ansi_yellow",
    "Class": "ansi_yellow",
    "Tag": "ansi_blue",
    "Builtin": "ansi_cyan",
}


class Palette:
    """The styles of one theme."""

    def __init__(self, theme: Theme, variables: Mapping[str, str]) -> None:
        self.theme = theme
        self._variables = variables
        self._pygments = variables.get("pygments") or ("monokai" if theme.dark else "default")
        self._styles: dict[tuple[str, str], Style] = {}
        self._ground = self._parsed(variables.get("background", "")) or Color(0, 0, 0)
        self._base = Style(color=self._rich("foreground"), bgcolor=self._rich("background"))

    def style(self, names: str, action: str = "") -> Style:
        """Return the style of several names joined by spaces; later ones win."""
        key = names, action if action.startswith("link ") else ""
        found = self._styles.get(key)
        if found is None:
            found = self._base
            for name in names.split():
                found += self._token(name[6:]) if name.startswith("token:") else self._look(name)
            if key[1]:
                found += Style(link=action[5:])
            self._styles[key] = found
        return found

    def _look(self, name: str) -> Style:
        if name.startswith("rgb:"):  # two pixels, one above the other
            upper, lower = name[4:].split(":")
            return Style(color=f"#{upper}", bgcolor=f"#{lower}")
        if name.startswith("ink:"):  # a colour that says something, on the theme's background
            return Style(color=f"#{name[4:]}")
        look = Style()
        for word in _LOOKS.get(name, "").split():
            if word[0] == "$":
                look += Style(color=self._rich(word[1:]))
            elif word[0] == "@":
                look += Style(bgcolor=self._rich(word[1:]))
            else:
                look += Style.parse(word)
        return look

    def _rich(self, variable: str) -> "RichColor | None":
        value = self._variables.get(variable) or self._variables.get(_STAND_INS.get(variable, ""), "")
        color = self._parsed(value)
        return None if color is None or color.is_transparent else color.rich_color

    def _parsed(self, value: str) -> Color | None:
        """Return a colour as it appears on the theme's background."""
        if value.startswith("auto"):
            share = value.removeprefix("auto").strip().removesuffix("%")
            fore = self._parsed(self._variables.get("foreground", "")) or Color(255, 255, 255)
            return fore if fore.ansi is not None else self._ground.blend(fore, int(share or 100) / 100)
        try:
            color = Color.parse(value)
        except ColorParseError:
            return None
        solid = color.a == 1 or color.ansi is not None or color.is_transparent
        return color if solid else self._ground.blend(color.with_alpha(1), color.a)

    def _token(self, kind: str) -> Style:
        if kind in _DIFF_TOKENS:
            return Style(color=self._rich(_DIFF_TOKENS[kind]))
        if self.theme.ansi:
            parts = kind.split(".")
            color = next((_ANSI_TOKENS[part] for part in reversed(parts) if part in _ANSI_TOKENS), None)
            return Style(color=Color.parse(color).rich_color) if color else Style()
        from pygments.token import string_to_tokentype

        look = _code_style(self._pygments).style_for_token(string_to_tokentype(kind))
        color = f"#{look['color']}" if look.get("color") else None
        return Style(color=color, bold=look.get("bold") or None, italic=look.get("italic") or None)


@lru_cache(4)
def _code_style(name: str) -> "type[CodeStyle]":
    from pygments.styles import get_style_by_name
    from pygments.util import ClassNotFound

    try:
        return get_style_by_name(name)
    except ClassNotFound:
        return get_style_by_name("default")
