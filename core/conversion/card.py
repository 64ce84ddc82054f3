"""Model cards in Markdown, as Hugging Face shows them: for a finished conversion, or remade for any folder.

Owns the front matter, the table of tensors and the line with the size. In a remade card the sections that
others wrote stay. Publishes nothing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError, UsageError
from ..hub.cache import FOLDER
from ..hub.catalog import BUILT_IN_MODEL
from ..hub.names import model_name
from ..machine.files import read_json, read_text
from ..quant.results import AllocationSummary
from .inspection import Inspection, inspect_model
from .report import Report
from .results import DENSE, Check
from .staging import REPORT_NAME
from .writer import write_file

CARD_NAME = "README.md"
MAX_CARD_NBYTES = 4 << 20
FENCE = "---\n"  # around a card's front matter
LICENSE = re.compile(r"^license: *([A-Za-z0-9._-]+) *$", re.MULTILINE)
PLAIN_WORD = re.compile(r"[A-Za-z0-9][\w./-]*")  # what YAML needs no quotes for
GB = 10**9
MB = 10**6
SIZE_LINE = re.compile(r"^.*: [0-9.]+ GB, [0-9.]+ bits per weight\..*$", re.MULTILINE)
# class, code, number of tensors, bytes, bits per weight
TableRow = tuple[str, str, int, int, float]


def read_license(folder: Path) -> str | None:
    """The license that the card in `folder` names."""
    try:
        front, _ = _split_front(read_text(folder / CARD_NAME, ModelError, MAX_CARD_NBYTES))
    except ModelError:
        return None
    found = LICENSE.search(front)
    return found[1] if found else None


def render_report_card(report: Report) -> str:
    """The README.md of a folder that a conversion wrote, front matter included."""
    plan, total = report.plan, report.plan.total
    rows = ((row.name, row.mode, row.tensors, row.nbytes, row.bits_per_weight) for row in (*plan.rows, total))
    size = _size(f"{report.source}, converted for MLX", report.nbytes, total.bits_per_weight)
    sections = [
        _front_matter(report.vision, report.source, report.license),
        f"# {report.name}",
        f"{size} Runs with qchat, mlx-lm and other readers of MLX checkpoints.",
        f"```\n{report.command}\n```",
        "## Tensors",
        _tensor_table(rows),
        *(["## Bits", _allocation_table(report.allocation)] if report.allocation else []),
        *_section("Notes", (*report.warnings, *plan.notes)),
        *_section("What the source needed", report.repairs),
        *_section("Rounding", _rounding_sentences(report)),
        *_section("Importances", report.importances),
        *_section("Activation-aware scaling", [str(group) for group in report.folds.report]),
        "## Checks",
        f"Every file was read back. {_logits_sentence(report.check)}",
        _error_table(report.check.weights),
    ]
    return "\n\n".join(sections) + "\n"


def _rounding_sentences(report: Report) -> list[str]:
    rounding = report.rounding
    if rounding is None:
        packed = any(code != DENSE for code in report.check.weights)
        by = "affine groups by their importances, all others by MLX" if report.importances else "by MLX"
        return [f"as the published variants: {by}"] if packed else []
    return [str(rounding), *([f"SHA-256 of the text: {rounding.digest}"] if rounding.digest else [])]


def _logits_sentence(check: Check) -> str:
    """Say what was compared. Too few tokens for a figure of the model's quality, so none is given."""
    return (
        f"The logits over {check.tokens} tokens differ from the source's by a relative RMS of "
        f"{check.logits_error:.2e}, which proves the files whole; `qchat eval` measures the quality."
    )


def _allocation_table(found: AllocationSummary) -> str:
    rows = (
        ("budget", found.budget),
        ("size of all tensors", f"{found.nbytes:,} bytes"),
        ("predicted KL divergence", f"{found.predicted_kl:.3g} nats, the sum over all matrices"),
        ("sensitivities", f"{found.sensitivity}, sha256 {found.digest}"),
        ("measured over", f"{found.tokens:,} tokens of the text with sha256 {found.text}"),
    )
    return "\n".join(("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)))


def render_folder_card(folder: Path, figures: Mapping[str, Any] | None = None) -> str:
    """The card of the model in `folder`, remade from what it holds and the `figures` of `Measurements`.

    Raises ModelError if the model cannot load.
    """
    inspection = inspect_model(folder)
    path = folder / CARD_NAME
    old = read_text(path, ModelError, MAX_CARD_NBYTES) if path.exists() else ""
    front, body = _split_front(old)
    if not front:
        vision = any(row.kind == "vision" for row in inspection.classes)
        front = _front_matter(vision, _converted_from(folder))
    head, sections = _split_sections(body)
    sections["Tensors"] = _tensor_table(
        (row.kind, str(row.code), len(row.tensors), row.nbytes, row.bits_per_weight)
        for row in (*inspection.classes, inspection.total)
    )
    if figures and figures.get("kl_interval"):
        sections["Quality"] = _quality(figures)
    if inspection.repairs and "What the source needed" not in sections:
        sections["Notes"] = _bullets(inspection.repairs)
    texts = (f"## {name}\n\n{text}" for name, text in sections.items())
    return "\n\n".join([front, _update_head(head or f"# {model_name(folder)}", inspection), *texts]) + "\n"


def _quality(figures: Mapping[str, Any]) -> str:
    low, high = figures["kl_interval"]
    return (
        f"Measured with `qchat eval` over {figures['tokens']:,} tokens that no calibration saw, against "
        f"{model_name(Path(figures['reference']))}: mean KL divergence {figures['kl_mean']:.4f} nats (95 % "
        f"interval {low:.4f} to {high:.4f}), 99th percentile {figures['kl_p99']:.3f}, the same most likely "
        f"token {figures['top1_agreement']:.1%} of the time, perplexity {figures['perplexity']:.4g} instead "
        f"of {figures['reference_perplexity']:.4g}."
    )


def write_folder_card(folder: Path, figures: Mapping[str, Any] | None = None) -> Path:
    """Put the remade card into `folder`.

    Raises ModelError, and UsageError for the built-in model and for a folder in the hub's cache, whose files
    are shared.
    """
    path = folder / CARD_NAME
    if folder.resolve() == BUILT_IN_MODEL.resolve():
        raise UsageError("the built-in model is part of qchat and keeps its card: print the card")
    if path.is_symlink() or any(FOLDER.fullmatch(parent.name) for parent in folder.absolute().parents):
        raise UsageError(f"{folder} is in the cache that other tools share: copy it first, or print the card")
    text = render_folder_card(folder, figures)
    try:
        write_file(path, text.encode())
    except OSError as error:
        raise ModelError(f"the card cannot be written to {path}: {error.strerror}") from error
    return path


def _split_front(card: str) -> tuple[str, str]:
    """The front matter with its fences, empty where the card has none, and the rest."""
    front, closed, rest = card.removeprefix(FENCE).partition(f"\n{FENCE}")
    if not (card.startswith(FENCE) and closed):
        return "", card
    return f"{FENCE}{front}\n{FENCE.strip()}", rest


def _split_sections(body: str) -> tuple[str, dict[str, str]]:
    """What comes before the first section, and the sections by their headings."""
    head, *rest = re.split(r"^## +", body, flags=re.MULTILINE)
    pairs = (part.partition("\n") for part in rest)
    return head.strip(), {name.strip(): text.strip() for name, _, text in pairs}


def _update_head(head: str, inspection: Inspection) -> str:
    """The title and introduction with the line of the size replaced, or added below the title."""
    total, config = inspection.total, inspection.config
    kind = f"{config.model_type} with {config.num_hidden_layers} layers"
    line = f"{_size(kind, total.nbytes, total.bits_per_weight)} Runs with qchat."
    if SIZE_LINE.search(head):
        return SIZE_LINE.sub(lambda _: line, head, count=1)
    title, _, rest = head.partition("\n")
    return "\n\n".join(part for part in (title, line, rest.strip()) if part)


def _size(subject: str, nbytes: int, bits_per_weight: float) -> str:
    """A sentence that SIZE_LINE finds again."""
    return f"{subject}: {nbytes / GB:.2f} GB, {bits_per_weight:.2f} bits per weight."


def _front_matter(vision: bool, base_model: str | None, license: str | None = None) -> str:
    fields = ["library_name: mlx", f"pipeline_tag: {'image-text-to-text' if vision else 'text-generation'}"]
    if base_model is not None:
        fields += [f"base_model: {_yaml(base_model)}", "base_model_relation: quantized"]
    fields.append("tags:\n- mlx\n- qchat")
    if license is not None:
        fields.append(f"license: {license}")
    return "\n".join((FENCE.strip(), *fields, FENCE.strip()))


def _converted_from(folder: Path) -> str | None:
    """The source that the report of a conversion in `folder` names, if it is a plain word."""
    report = folder / REPORT_NAME
    source = read_json(report, ModelError).get("source") if report.exists() else None
    return source if isinstance(source, str) and PLAIN_WORD.fullmatch(source) else None


def _yaml(text: str) -> str:
    """A plain word as it is, anything else quoted."""
    return text if PLAIN_WORD.fullmatch(text) else "'" + text.replace("'", "''") + "'"


def _tensor_table(rows: Iterable[TableRow]) -> str:
    lines = ["| class | code | tensors | MB | bits per weight |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {code} | {tensors} | {nbytes / MB:,.1f} | {bits:.2f} |"
        for name, code, tensors, nbytes, bits in rows
    ]
    return "\n".join(lines)


def _error_table(errors: Mapping[str, float]) -> str:
    lines = ["| code | largest relative error of a sample |", "|---|---:|"]
    return "\n".join((*lines, *(f"| {code} | {error:.2e} |" for code, error in errors.items())))


def _section(title: str, items: Sequence[str]) -> list[str]:
    return [f"## {title}", _bullets(items)] if items else []


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
