"""tui/README.md: its tables are those of the code, and its options those of the command line."""

import re
from itertools import takewhile

from qchat.tui.cli.arguments import parser
from qchat.tui.user.settings import KEYS
from qchat.tui.user.themes import SHIPPED
from tests.make_tables import PAGE, rewritten, tables

README = PAGE.read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return the text below a heading, up to the next one of its level."""
    lines = README.partition(f"\n## {title}\n")[2].splitlines()
    return "\n".join(takewhile(lambda line: not line.startswith("## "), lines))


def test_every_table_is_as_the_code_has_it():
    """`python tests/make_tables.py` writes them."""
    for table in tables():
        assert table in README
    assert rewritten(README) == README


def test_the_settings_are_all_there():
    listed = re.findall(r"^\| `(\w+)` \|", section("Settings"), re.MULTILINE)
    assert listed == list(KEYS)


def test_every_option_is_listed_and_no_other():
    rows = [line.split(" | ")[0] for line in section("Options").splitlines() if line.startswith("| `-")]
    listed = re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(rows))
    assert sorted(listed) == sorted(flag for action in parser()._actions for flag in action.option_strings)


def test_every_shipped_theme_is_named():
    shipped = {path.stem for path in SHIPPED.glob("*.toml")}
    assert shipped == set(re.findall(r"`([a-z]+)`", section("Themes")))
