"""`qchat card`: what it makes anew and what it leaves."""

import json
from pathlib import Path

import pytest

from qchat.core import BUILT_IN_MODEL, Measurements
from qchat.core.conversion.card import render_folder_card, write_folder_card
from qchat.core.errors import UsageError
from qchat.core.measuring.results import Score
from qchat.tui.cli.main import main
from qchat.tui.user.paths import config_file, measurements_file
from tests.checkpoints import quantize_checkpoint, write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "raw")
    quantize_checkpoint(tmp_path / "raw", tmp_path / "packed", (4, 32, "affine"))
    return tmp_path / "packed"


def test_a_folder_without_a_card_gets_one(model: Path, capsys: pytest.CaptureFixture[str]):
    (model / "conversion.json").write_text(json.dumps({"source": "Qwen/Qwen3.5-9B"}))
    assert main(["card", str(model)]) == 0
    assert capsys.readouterr().out == f"{model / 'README.md'}\n"
    card = (model / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\npipeline_tag: text-generation\n")
    assert "base_model: Qwen/Qwen3.5-9B\n" in card and "\n# packed\n\nqwen3_5 with 4 layers: 0.00 GB" in card
    assert "| mlp gate/up | affine 4-bit group 32 |" in card


@pytest.mark.parametrize("verb", ["card", "plan"])
def test_a_name_is_looked_for_in_the_folders_of_the_settings(verb: str, model: Path):
    config_file().parent.mkdir(parents=True)
    config_file().write_text(f'models_dir = "{model.parent}"\n')
    assert main([verb, "packed"]) == 0


def test_a_second_time_nothing_changes(model: Path):
    write_folder_card(model)
    card = (model / "README.md").read_text()
    write_folder_card(model)
    assert (model / "README.md").read_text() == card


def test_what_others_wrote_stays(model: Path):
    (model / "README.md").write_text(
        "---\nlicense: mit\n---\n# My model\n\nold: 9.99 GB, 4.00 bits per weight. Fine.\n\nHello.\n\n"
        "## Tensors\n\nold table\n\n## Thanks\n\nto all\n"
    )
    card = render_folder_card(model)
    assert card.startswith("---\nlicense: mit\n---\n\n# My model\n\nqwen3_5 with 4 layers: 0.00 GB, ")
    assert card.endswith("## Thanks\n\nto all\n")
    assert "Hello." in card and "9.99" not in card and "old table" not in card


def test_the_card_of_a_conversion_keeps_its_sections():
    old, new = (BUILT_IN_MODEL / "README.md").read_text(), render_folder_card(BUILT_IN_MODEL)
    sections = [line for line in old.splitlines() if line.startswith("## ")]
    assert [line for line in new.splitlines() if line.startswith("## ")] == sections
    assert old.split("---\n")[1] == new.split("---\n")[1]


def test_what_was_measured_of_the_model_is_told(model: Path, capsys: pytest.CaptureFixture[str]):
    score = Score("all", 4096, 9.5, 9.25, 0.0125, 0.25, 0.9375, (0.012, 0.013))
    figures = {"reference": "/models/original", **vars(score)}
    Measurements(measurements_file()).add(model, figures)
    assert main(["card", str(model), "--print"]) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Measured with")]
    assert "over 4,096 tokens that no calibration saw, against original:" in told
    assert "0.0125 nats (95 % interval 0.0120 to 0.0130)" in told and "93.8% of the time" in told


def test_a_printed_card_is_not_written(model: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["card", str(model), "--print"]) == 0
    assert capsys.readouterr().out == render_folder_card(model)
    assert not (model / "README.md").exists()


def test_the_card_of_the_built_in_model_stays(capsys: pytest.CaptureFixture[str]):
    before = (BUILT_IN_MODEL / "README.md").read_bytes()
    assert main(["card", "built-in"]) == 2
    assert "keeps its card" in capsys.readouterr().err
    assert (BUILT_IN_MODEL / "README.md").read_bytes() == before


def test_the_shared_cache_is_never_written_to(model: Path, tmp_path: Path):
    shared = tmp_path / "hub/models--me--tiny/snapshots/abc"
    shared.parent.mkdir(parents=True)
    model.rename(shared)
    with pytest.raises(UsageError, match="that other tools share"):
        write_folder_card(shared)
