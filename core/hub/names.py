"""Model names: that of a folder, matches exact and by prefix, and the closest ones to suggest."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from ..errors import ModelError
from ..quoting import printable

CACHED = re.compile(r"models--([^/]+)--([^/]+)")  # folders of the Hugging Face cache


def model_name(folder: Path) -> str:
    """Return the name of a model's folder; in the Hugging Face cache owner and name of the model."""
    for part in (folder, *folder.parents):
        cached = CACHED.fullmatch(part.name)
        if cached:
            return "/".join(cached.groups())
    return folder.name


def match_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that equal `name` or, if none does, that begin with it.

    Case is ignored, and the owner may be omitted.
    """
    wanted, known = name.casefold(), list(known)
    forms = {full: (full.casefold(), full.casefold().rpartition("/")[2]) for full in known}
    exact = [full for full in known if wanted in forms[full]]
    return exact or [full for full in known if any(form.startswith(wanted) for form in forms[full])]


def closest_names(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known names most similar to `name`, with or without their owners."""
    forms = {form.casefold(): full for full in known for form in (full, full.rpartition("/")[2])}
    wanted = name.casefold() if "/" in name else name.casefold().rpartition("/")[2]
    return list(dict.fromkeys(forms[form] for form in get_close_matches(wanted, forms, limit)))


def ambiguity(name: str, matches: Iterable[str]) -> ModelError:
    """Return the error for a name that matches several models."""
    return ModelError(
        f"{printable(name)} is ambiguous ({', '.join(list(matches)[:5])}): type more of the name"
    )


def suggestion(names: Iterable[str]) -> str:
    """Return "; did you mean A or B?", empty without names."""
    names = list(names)
    return f"; did you mean {' or '.join(names)}?" if names else ""
