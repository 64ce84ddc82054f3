"""Models that were measured before, beside new results: as points of size against quality."""

from pathlib import Path

import pytest

from qchat.core import Measurements
from qchat.core.hub import cache as hubcache
from qchat.tui.tasks.base import Door
from qchat.tui.tasks.models import known_variants
from qchat.tui.tasks.variants import Variant
from qchat.tui.text.report import Plot, Report
from qchat.tui.user.paths import measurements_file
from tests.checkpoints import write_checkpoint
from tests.tui.task_results import CONVERTED, evaluation, request

REFERENCE = "/m/ref"


def variant(name: str, kl: float, reference: str = REFERENCE) -> Variant:
    return Variant(f"/models/{name}", name, 2 * 10**9, kl, reference)


def points(report: Report) -> dict[str, tuple[float, float]]:
    return {
        one.label: (one.x, one.y) for part in report.parts if isinstance(part, Plot) for one in part.points
    }


def test_an_evaluation_is_plotted_beside_what_was_measured_against_the_same_reference():
    task, asked = request("eval", "a --reference ref")
    known = [variant("b", 0.5), variant("other", 0.1, "/m/another")]
    shown = points(task.show([], evaluation("/m/a", 0.02), asked, known=known))
    assert shown["b"] == (2.0, 0.5) and shown["a"][1] == 0.02
    assert "other" not in shown


def test_a_conversion_shows_the_variants_of_its_source_and_one_alone_is_no_picture():
    task, asked = request("convert", "a -q")
    source = f"/m/{Path(CONVERTED['source']).name}"
    known = [variant("b", 0.5, source), variant("c", 0.2, source), variant("other", 0.1)]
    assert points(task.show([], CONVERTED, asked, known=known)).keys() == {"b", "c"}
    assert points(task.show([], CONVERTED, asked, known=known[1:])) == {}


def test_known_variants_are_models_with_a_measured_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hubcache.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("alpha", "beta"):
        write_checkpoint(tmp_path / "models" / name)
    figures = {"kl_mean": 0.25, "reference": REFERENCE}
    Measurements(measurements_file()).add(tmp_path / "models" / "beta", figures)
    door = Door("/", [str(tmp_path / "models")])
    task, _ = request("eval", "a --reference ref")
    (found,) = known_variants(task, task.parse(["a", "--reference", "ref"], door), door)
    assert (found.name, found.kl_mean, found.reference) == ("beta", 0.25, REFERENCE)
    assert known_variants(task, task.parse(["a", "--reference", "ref", "--context", "64"], door), door) == ()
