"""Writes the tables of tui/README.md that the code decides: commands, keys, verbs, settings.

    PYTHONPATH=.dev:. python tests/make_tables.py

`tests/tui/test_readme.py` checks that the page has them as they are.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qchat.tui.cli.verbs import VERBS
from qchat.tui.commands import markdown_table
from qchat.tui.user.keymap import ACTIONS, Keymap, show
from qchat.tui.user.settings import KEYS
from tests.paths import ROOT

PAGE = ROOT / "tui/README.md"


def tables() -> list[str]:
    """Return every table, each with a header row of its own."""
    keymap = Keymap()
    keys = {
        scope: [
            (" ".join(f"`{show(key)}`" for key in keymap.keys(action.id)), action.help)
            for action in ACTIONS
            if (action.scope == "transcript") == (scope == "transcript")
        ]
        for scope in ("chat", "transcript")
    }
    return [
        markdown_table(),
        table("| key | what it does |", keys["chat"]),
        table("| key | what it does to a block |", keys["transcript"]),
        table("| verb | what it does |", ((f"`qchat {verb}`", what) for verb, what in VERBS.items())),
        table("| setting | takes | default | in a project | what it does |", setting_rows(KEYS)),
    ]


def table(header: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table with this header row."""
    line = "|" + "---|" * (header.count("|") - 1)
    return "".join(f"{row}\n" for row in (header, line, *(f"| {' | '.join(row)} |" for row in rows)))


def setting_rows(keys: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for key in keys.values():
        project = "yes" if key.project else "no"
        yield f"`{key.name}`", key.kind.wanted, shown(key.default), project, key.meaning


def shown(default: Any) -> str:
    """Return a default as a settings file has it; a dash for those that the model or the machine decides."""
    if default in (None, {}):
        return "–"
    values = default if isinstance(default, list) else [default]
    return " ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in values)


def rewritten(page: str) -> str:
    """Return the page with its tables replaced, each found by its header row."""
    for new in tables():
        header = re.escape(new.partition("\n")[0])
        page, count = re.subn(rf"^{header}\n(?:\|.*\n)*", lambda _, new=new: new, page, flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} tables with the header {new.partition(chr(10))[0]}")
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
