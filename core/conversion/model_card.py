"""The card of a model folder, made anew from what the folder holds; what others wrote in it stays.

Owns the front matter's defaults, the line with the size, the sections Tensors and Notes. Publishes nothing.
"""

import re
from pathlib import Path

from ..errors import ModelError, UsageError
from ..hub.cache import FOLDER
from ..machine.files import read_json, read_text, write_whole
from .card import FENCE, GB, MAX_CARD_NBYTES, MB, model_name
from .inspection import ClassInfo, Inspection, inspect_model
from .staging import REPORT_NAME

CARD_NAME = "README.md"
SIZE_LINE = re.compile(r"^.*: [0-9.]+ GB, [0-9.]+ bits per weight\..*$", re.MULTILINE)


def make_card(folder: Path) -> str:
    """The whole text of the card. Raises ModelError for a folder that could not be loaded."""
    inspection = inspect_model(folder)
    front, head, sections = _parts(_old(folder))
    line = _size_line(inspection)
    if SIZE_LINE.search(head):
        head = SIZE_LINE.sub(lambda _: line, head, count=1)
    else:
        title, _, rest = (head or f"# {model_name(folder)}").partition("\n")
        head = "\n\n".join(part for part in (title, line, rest.strip()) if part)
    sections["Tensors"] = _table(inspection)
    if inspection.repairs and "What the source needed" not in sections:
        sections["Notes"] = "\n".join(f"- {sentence}" for sentence in inspection.repairs)
    front = front or _front_matter(folder, inspection)
    return "\n\n".join([front, head, *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


def write_card(folder: Path) -> Path:
    """Put the card into the folder. Raises UsageError for one in the hub's cache, whose files are shared."""
    path = folder / CARD_NAME
    if path.is_symlink() or any(FOLDER.fullmatch(parent.name) for parent in folder.absolute().parents):
        raise UsageError(f"{folder} is in the cache that other tools share: copy it first, or print the card")
    text = make_card(folder)
    try:
        write_whole(path, text)
    except OSError as error:
        raise ModelError(f"the card cannot be written to {path}: {error.strerror}") from error
    return path


def _old(folder: Path) -> str:
    path = folder / CARD_NAME
    return read_text(path, ModelError, MAX_CARD_NBYTES) if path.exists() else ""


def _parts(card: str) -> tuple[str, str, dict[str, str]]:
    """Front matter, what comes before the first section, and the sections by their headings."""
    front = ""
    if card.startswith(FENCE) and f"\n{FENCE}" in card:
        front, _, card = card.removeprefix(FENCE).partition(f"\n{FENCE}")
        front = f"{FENCE}{front}\n{FENCE.strip()}"
    head, *rest = re.split(r"^## +", card, flags=re.MULTILINE)
    pairs = (part.partition("\n") for part in rest)
    return front, head.strip(), {name.strip(): text.strip() for name, _, text in pairs}


def _front_matter(folder: Path, inspection: Inspection) -> str:
    pipeline = (
        "image-text-to-text" if any(row.kind == "vision" for row in inspection.classes) else "text-generation"
    )
    fields = ["library_name: mlx", f"pipeline_tag: {pipeline}", "tags:\n- mlx\n- qchat"]
    report = folder / REPORT_NAME
    source = read_json(report, ModelError).get("source") if report.exists() else None
    if isinstance(source, str) and re.fullmatch(r"[A-Za-z0-9][\w./-]*", source):
        fields += [f"base_model: {source}", "base_model_relation: quantized"]
    return "\n".join((FENCE.strip(), *fields, FENCE.strip()))


def _size_line(inspection: Inspection) -> str:
    total, config = inspection.total, inspection.config
    kind = f"{config.model_type} with {config.num_hidden_layers} layers"
    return (
        f"{kind}: {total.nbytes / GB:.2f} GB, {total.bits_per_weight:.2f} bits per weight. Runs with qchat."
    )


def _table(inspection: Inspection) -> str:
    lines = ["| class | code | tensors | MB | bits per weight |", "|---|---|---:|---:|---:|"]
    return "\n".join((*lines, *map(_line, inspection.classes), _line(inspection.total)))


def _line(row: ClassInfo) -> str:
    code = str(row.code) if row.kind != "total" else ""
    figures = f"{len(row.tensors)} | {row.nbytes / MB:,.1f} | {row.bits_per_weight:.2f}"
    return f"| {row.kind} | {code} | {figures} |"
