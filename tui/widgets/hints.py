"""Key hints, the one way to write them: the key as a cap on its own ground, a blank, and what it does."""

from collections.abc import Sequence

from textual.content import Content

Hint = tuple[str, str]  # a key and its label
GAP = 3  # cells between two hints
CAP, LABEL = "bold $primary on $key-bg", "$text-muted"


def hint_line(hints: Sequence[Hint], width: int | None = None) -> Content:
    """Return the hints that fit into `width` cells; the last one, which usually closes something, stays."""
    kept = [Content.assemble((key, CAP), (f" {label}", LABEL)) for key, label in hints]
    gap = Content(" " * GAP)
    while width is not None and len(kept) > 1 and gap.join(kept).cell_length > width:
        del kept[-2]
    return gap.join(kept)
