"""Themes: the shipped ones can be read everywhere, the user's are checked, both are found by name."""

import tomllib
from pathlib import Path

import pytest
from pygments.styles import get_style_by_name
from pygments.token import Error, Generic
from rich.color import Color as RichColor
from rich.color import ColorSystem
from textual.color import Color

from qchat.core.errors import UsageError
from qchat.tui.user import themes
from qchat.tui.user.themes import EXTRA, SHIPPED, Shelf, extra_defaults, load, suited

FILES = sorted(SHIPPED.glob("*.toml"))
NAMES = [path.stem for path in FILES]
COLOURED = [path.stem for path in FILES if path.stem != "terminal"]
PALETTE = {
    f"ansi_{name}" for name in ("default", "black", "red", "green", "yellow", "blue", "magenta", "cyan")
}
TEXTS = (
    "foreground",
    "text-muted",
    "primary",
    "secondary",
    "accent",
    "warning",
    "error",
    "success",
    "think-fg",
)
FIGURES = ("gauge-ok", "gauge-warn", "gauge-hot", "tok-fast", "tok-slow", "user-bar")
# text and what it is written on
PAIRS = [
    *((text, ground) for text in TEXTS for ground in ("background", "surface", "panel")),
    *((figure, ground) for figure in FIGURES for ground in ("background", "surface")),
    ("foreground", "code-bg"),
    ("primary", "key-bg"),
    ("foreground", "question-bg"),
    ("text-muted", "question-bg"),
    ("block-cursor-foreground", "block-cursor-background"),
    ("block-cursor-blurred-foreground", "block-cursor-blurred-background"),
    ("input-selection-foreground", "input-selection-background"),
    ("screen-selection-foreground", "screen-selection-background"),
    ("input-cursor-foreground", "input-cursor-background"),
]  # fmt: skip
GOOD = """
description = "mine"
[colors]
primary = "#ff0000"
foreground = "white"
background = "rgb(1, 2, 3)"
"""


def colours(name: str) -> dict[str, str]:
    return tomllib.loads((SHIPPED / f"{name}.toml").read_text())["colors"]


def luminance(rgb: tuple[int, int, int]) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """WCAG 2.2, contrast ratio, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def rgb(colour: str) -> tuple[int, int, int]:
    return Color.parse(colour).rgb


def as_256(colour: str) -> tuple[int, int, int]:
    """What a terminal of 256 colours shows for it."""
    nearest = RichColor.from_rgb(*rgb(colour)).downgrade(ColorSystem.EIGHT_BIT)
    return tuple(nearest.get_truecolor())  # type: ignore[return-value]


def test_black_on_white_has_the_greatest_contrast():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, abs=0.01)


def test_there_are_themes_for_every_taste():
    assert {"night", "day", "contrast", "terminal"} <= set(NAMES)
    assert len(NAMES) >= 6
    assert Shelf.open().problems == []


@pytest.mark.parametrize("name", COLOURED)
@pytest.mark.parametrize("seen", [rgb, as_256])
def test_every_text_stands_out_from_its_ground(name: str, seen):
    given = colours(name)
    ratios = {pair: round(contrast(*(seen(given[part]) for part in pair)), 2) for pair in PAIRS}
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("name", COLOURED)
def test_code_stands_out_in_every_colour_of_its_style(name: str):
    style = get_style_by_name(load(SHIPPED / f"{name}.toml").theme.variables["pygments"])
    code = {
        f"#{look['color']}"
        for token, look in style
        if look["color"] and token not in Generic and token not in Error
    }
    ground = rgb(colours(name)["code-bg"])
    assert {colour for colour in code if contrast(rgb(colour), ground) < 4.5} == set()


def test_the_high_contrast_theme_keeps_its_word():
    given = colours("contrast")
    for text in ("foreground", "text-muted", "primary", "accent", "think-fg"):
        assert contrast(rgb(given[text]), rgb(given["background"])) >= 10, text


@pytest.mark.parametrize("name", COLOURED)
def test_panels_and_cursors_are_still_told_apart_in_256_colours(name: str):
    given = colours(name)
    for part in ("panel", "block-cursor-background", "block-cursor-blurred-background"):
        assert as_256(given[part]) != as_256(given["background"]), part


def test_the_terminal_theme_uses_the_terminals_palette_alone():
    assert set(colours("terminal").values()) <= PALETTE
    assert Shelf.open().find("terminal").theme.ansi


@pytest.mark.parametrize("name", NAMES)
def test_a_theme_names_a_style_for_code_and_all_our_colours(name: str):
    variables = load(SHIPPED / f"{name}.toml").theme.variables
    get_style_by_name(variables["pygments"])
    assert set(EXTRA) <= set(variables)
    assert set(extra_defaults()) == {*EXTRA, "pygments"}


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({}, "terminal"),
        ({"COLORTERM": "truecolor"}, "night"),
        ({"COLORTERM": "24bit", "COLORFGBG": "0;15"}, "day"),
        ({"COLORTERM": "truecolor", "COLORFGBG": "15;default;0"}, "night"),
    ],
)
def test_auto_suits_the_terminal(env: dict[str, str], name: str):
    assert suited(env) == name
    assert Shelf.open().find("auto", env).name == name


# --- the user's own ---


def user_theme(hermetic: Path, name: str, text: str) -> Path:
    path = hermetic / "config" / "qchat" / "themes" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_users_theme_is_found_and_missing_colours_are_stood_in_for(hermetic: Path):
    user_theme(hermetic, "mine", GOOD)
    look = Shelf.open().find("mine")
    assert look.description == "mine"
    assert look.theme.variables["user-bar"] == "#ff0000"
    assert look.theme.variables["gauge-hot"] == "white"
    assert look.theme.variables["key-bg"] == "rgb(1, 2, 3)"
    assert look.theme.to_color_system().generate()["background"] == "#010203"


def test_a_users_theme_takes_the_place_of_a_shipped_one(hermetic: Path):
    path = user_theme(hermetic, "night", GOOD)
    assert Shelf.open().find("night").path == path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + 'primry = "red"', "there is no colour primry; did you mean primary?"),
        (GOOD.replace("#ff0000", "#ff000"), "primary is '#ff000', wanted a colour"),
        (GOOD.replace('"white"', "7"), "foreground is 7, wanted a colour"),
        (GOOD.replace('background = "rgb(1, 2, 3)"', ""), "the colour background is missing"),
        (GOOD.replace("description", "descripton"), "no key descripton; did you mean description?"),
        (GOOD.replace('"mine"', "3"), "description is 3, wanted a text"),
        ('dark = "no"\n' + GOOD, "dark is 'no', wanted true or false"),
        ("description = 'x'", "[colors] is missing"),
        ("[colors", "is not TOML"),
        ("x = '" + "x" * 70000 + "'", "more than 64 KiB"),
        ("a = " + "[" * 3000 + "]" * 3000, ""),
    ],
)
def test_a_wrong_theme_is_named_with_its_key_and_the_others_stay(hermetic: Path, text: str, said: str):
    path = user_theme(hermetic, "mine", text)
    shelf = Shelf.open()
    assert len(shelf.problems) == 1
    assert str(path) in shelf.problems[0]
    assert said in shelf.problems[0]
    assert set(shelf.looks) == set(NAMES)


def test_a_theme_with_a_name_that_nobody_could_type_is_refused(hermetic: Path):
    user_theme(hermetic, "My Theme", GOOD)
    assert "small letters" in Shelf.open().problems[0]


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(hermetic: Path):
    path = user_theme(hermetic, "mine", GOOD)
    shelf = Shelf.open()
    assert not shelf.refresh()
    path.write_text(GOOD.replace("#ff0000", "#00ff0a"))
    assert shelf.refresh()
    assert shelf.find("mine").theme.primary == "#00ff0a"
    path.unlink()
    assert shelf.refresh()
    assert "mine" not in shelf.looks


def test_an_unknown_theme_is_refused_with_the_nearest_one():
    with pytest.raises(UsageError, match="no theme nihgt; did you mean night"):
        Shelf.open().find("nihgt")


def test_textuals_own_names_are_those_we_let_a_theme_choose():
    """A name that Textual no longer knows would be accepted and change nothing."""
    known = load(SHIPPED / "night.toml").theme.to_color_system().generate()
    assert set(themes.VARIABLES) <= set(known)
