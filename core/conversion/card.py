"""What a conversion did: as the model card that Hugging Face shows, as JSON, as lines for a terminal."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..machine.files import read_text
from ..quant.folds import Folds
from ..quant.plan import Plan, Row
from .verify import Check

GB = 10**9
MB = 10**6
MAX_CARD_NBYTES = 4 << 20
FENCE = "---\n"  # around a card's front matter
LICENSE = re.compile(r"^license: *([A-Za-z0-9._-]+) *$", re.MULTILINE)
CACHED = re.compile(r"models--([^/]+)--([^/]+)")  # folders of the Hugging Face cache


@dataclass(frozen=True)
class Report:
    """The whole story of one conversion.

    `nbytes` is what the weight files hold, `weights_nbytes` what this run wrote of it, in bfloat16; `seconds`
    is the time of writing alone, `total_seconds` that with the scaling search and all checks. `kept_shards`
    were finished by an earlier run.
    """

    name: str
    source: str
    command: str
    plan: Plan
    vision: bool
    nbytes: int
    weights_nbytes: int
    seconds: float
    total_seconds: float
    kept_shards: int
    warnings: tuple[str, ...]
    repairs: tuple[str, ...]
    folds: Folds
    check: Check
    license: str | None = None

    @property
    def speed(self) -> str:
        """Of writing, in the source's bytes; nothing to say of a run that found all shards finished."""
        if not self.weights_nbytes:
            return "all shards were there already"
        return f"{self.weights_nbytes / MB / self.seconds:.0f} MB of bfloat16 a second"

    def as_json(self) -> dict[str, Any]:
        """The report as values that `json.dumps` takes."""
        return {
            "name": self.name,
            "source": self.source,
            "command": self.command,
            "options": {**vars(self.plan.options), "recipe": Path(self.plan.options.recipe).name},
            "nbytes": self.nbytes,
            "bits_per_weight": self.plan.total.bits_per_weight,
            "seconds": self.seconds,
            "total_seconds": self.total_seconds,
            "kept_shards": self.kept_shards,
            "warnings": list(self.warnings),
            "repairs": list(self.repairs),
            "notes": list(self.plan.notes),
            "awq": self.folds.as_json(),
            "check": asdict(self.check),
        }

    def as_text(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.name}: {self.nbytes / GB:.3f} GB, {self.plan.total.bits_per_weight:.2f} bits per weight",
            f"written in {self.seconds:.1f} s ({self.speed}), {self.total_seconds:.1f} s with all checks",
            _check_line(self.check),
        ]
        if self.kept_shards:
            lines.append(f"{self.kept_shards} shards were finished by an earlier run")
        if self.folds.report:
            changed = sum(group.changed for group in self.folds.report)
            lines.append(f"AWQ changed {changed} of {len(self.folds.report)} groups: the card lists them")
        return "\n".join((*lines, *self.plan.notes))


def model_name(folder: Path) -> str:
    """What the model at `folder` is called: owner and name in the Hugging Face cache, else the folder's."""
    for part in (folder, *folder.parents):
        cached = CACHED.fullmatch(part.name)
        if cached:
            return "/".join(cached.groups())
    return folder.name


def read_license(folder: Path) -> str | None:
    """The license that the source's own card names."""
    try:
        card = read_text(folder / "README.md", ModelError, MAX_CARD_NBYTES)
    except ModelError:
        return None
    front, closed, _ = card.removeprefix(FENCE).partition(f"\n{FENCE}")
    found = LICENSE.search(front) if card.startswith(FENCE) and closed else None
    return found[1] if found else None


def _check_line(check: Check) -> str:
    return (
        f"Logits against the source over {check.tokens} tokens: relative RMS {check.logits_error:.2e}, "
        f"KL divergence {check.kl_divergence:.2e} nats, {check.same_top:.0%} of the most likely tokens equal"
    )


def as_card(report: Report) -> str:
    """The README.md of the new folder, front matter included."""
    plan, total = report.plan, report.plan.total
    sections = [
        _front_matter(report),
        f"# {report.name}",
        f"{report.source}, converted for MLX: {report.nbytes / GB:.2f} GB, {total.bits_per_weight:.2f} bits "
        "per weight. Runs with qchat, mlx-lm and other readers of MLX checkpoints.",
        f"```\n{report.command}\n```",
        "## Tensors",
        _table(plan.rows, total),
        *_bullets("Notes", (*report.warnings, *plan.notes)),
        *_bullets("What the source needed", report.repairs),
        *_bullets("Activation-aware scaling", [str(group) for group in report.folds.report]),
        "## Checks",
        f"Every file was read back. {_check_line(report.check)}.",
        _errors_table(report.check.weights),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(report: Report) -> str:
    fields = [
        "library_name: mlx",
        f"pipeline_tag: {'image-text-to-text' if report.vision else 'text-generation'}",
        f"base_model: {_yaml(report.source)}",
        "base_model_relation: quantized",
        "tags:\n- mlx\n- qchat",
    ]
    if report.license:
        fields.append(f"license: {report.license}")
    return "\n".join(("---", *fields, "---"))


def _yaml(text: str) -> str:
    """A plain word as it is, anything else quoted."""
    return text if re.fullmatch(r"[A-Za-z0-9][\w./-]*", text) else "'" + text.replace("'", "''") + "'"


def _table(rows: Sequence[Row], total: Row) -> str:
    lines = ["| class | code | tensors | MB | bits per weight |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {row.name} | {row.mode} | {row.tensors} | {row.nbytes / MB:,.1f} | {row.bits_per_weight:.2f} |"
        for row in (*rows, total)
    ]
    return "\n".join(lines)


def _errors_table(errors: Mapping[str, float]) -> str:
    lines = ["| code | largest relative error of a sample |", "|---|---:|"]
    return "\n".join((*lines, *(f"| {code} | {error:.2e} |" for code, error in errors.items())))


def _bullets(title: str, items: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {item}" for item in items)] if items else []
