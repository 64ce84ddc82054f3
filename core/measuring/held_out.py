"""Whether a text may measure a model: one that the model was calibrated on would flatter it.

Knows the texts that the report of a conversion names, by their hashes. The packaged calibration text is also
recognised in parts, by runs of tokens. Refuses what is known.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..conversion.layer_rounding import CALIBRATION_TEXT
from ..conversion.staging import REPORT_NAME
from ..errors import ModelError, UsageError
from ..machine.files import read_json

RUN = 13  # tokens in a row that two texts share only where one quotes the other


def check_held_out(folder: Path, name: str, text: str, encode: Callable[[str], Sequence[int]]) -> None:
    """Raise UsageError if the model in `folder` was calibrated on `text`, or on a part of it."""
    known = set(_calibration_digests(folder))
    packaged = CALIBRATION_TEXT.read_text(encoding="utf-8") if known else ""
    if _digest(text) in known:
        found = "is"
    elif _digest(packaged) in known and _share_a_run(encode(text), encode(packaged)):
        found = "repeats parts of"
    else:
        return
    raise UsageError(
        f"{name} {found} the text that {folder.name} was calibrated on, and would make it look better than "
        "it is: measure it on another text"
    )


def _calibration_digests(folder: Path) -> Iterator[str]:
    """Yield the hashes of the texts by which bits were chosen, and by which errors were compensated."""
    try:
        report: dict[str, Any] = read_json(folder / REPORT_NAME, ModelError)
    except ModelError:  # not ours, or older
        return
    for part, field in (("allocation", "text"), ("rounding", "digest")):
        found = report.get(part)
        if isinstance(found, dict) and isinstance(found.get(field), str) and found[field]:
            yield found[field]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _share_a_run(one: Sequence[int], other: Sequence[int]) -> bool:
    return not set(_runs(one)).isdisjoint(_runs(other))


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return zip(*(ids[place:] for place in range(RUN)), strict=False)
