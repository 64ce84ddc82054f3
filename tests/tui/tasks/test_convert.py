"""`qchat convert`: what its flags ask for, what it prints, which contradictions it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qchat.tui.cli.main import main
from qchat.tui.cli.verbs import VERBS
from qchat.tui.tasks.progress import progress_line
from tests.checkpoints import tiny_config, write_checkpoint
from tests.paths import ROOT


def convert(*words: str | Path) -> int:
    return main(["convert", *map(str, words)])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "raw")
    return tmp_path / "raw"


def test_a_conversion_reports_what_it_made(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert convert("-i", raw, "-o", tmp_path / "new", "-q", "--q-bits", "2", "--q-recipe", "unsloth") == 0
    out, err = capsys.readouterr()
    assert out.startswith("new: 0.000 GB, ")
    assert "KL divergence" in out
    assert err == ""
    said = json.loads((tmp_path / "new/config.json").read_text())["quantization"]
    assert said["bits"] == 2
    card = (tmp_path / "new/README.md").read_text()
    assert "qchat convert -i raw -o new -q --q-bits 2 --q-recipe unsloth\n" in card


def test_the_report_as_json(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert convert("-i", raw, "-o", tmp_path / "new", "-q", "--json", "--mtp", "drop") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["name"] == "new"
    assert report["options"]["mtp"] == "drop"
    assert 0 <= report["check"]["kl_divergence"] < 1


def test_without_q_the_folder_is_bfloat16(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert convert("-i", raw, "-o", tmp_path / "new") == 0
    assert "16.0" in capsys.readouterr().out
    assert "quantization" not in json.loads((tmp_path / "new/config.json").read_text())


def test_a_plan_needs_config_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    words = ("-i", tmp_path, "-q", "--q-recipe", "unsloth", "--plan")
    assert convert(*words) == 0
    assert "at 400 GB/s" in capsys.readouterr().out
    assert convert(*words, "--json", "--bandwidth", "800") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["total_bytes"] == sum(row["nbytes"] for row in plan["classes"])
    assert plan["bandwidth_gb_s"] == 800
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


def test_a_recipe_file_decides(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[rule]]\nmatch = "*.down_proj"\nbits = "N+2"\n[[rule]]\nmatch = "*"\nbits = "N"\n')
    assert convert("-i", raw, "-q", "--recipe-file", recipe, "--q-bits", "4", "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    modes = {row["name"]: row["mode"] for row in plan["classes"]}
    assert modes["mlp down"] == "affine 6-bit group 64"
    assert modes["mlp gate/up"] == "affine 4-bit group 64"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--q-bits 4", "--q-bits would change nothing without -q"),
        ("--keep-bf16", "--keep-bf16 would change nothing without -q"),
        ("-q --dequantize", "contradict each other"),
        ("-q --awq search", "--awq search needs --imatrix-path"),
        ("-q --bandwidth 400", "--bandwidth would change nothing without --plan"),
        ("-q --q-recipe unsloth --recipe-file x.toml", "give one"),
        ("-q --recipe-file unsloth", "wanted a .toml file"),
        ("-q --q-recipe unslot", "did you mean unsloth?"),
        ("-q --q-bits 7", "--q-bits is 7, wanted one of 2, 3, 4, 5, 6, 8"),
        ("-q --q-recipe mixed_2_6 --q-bits 4", "--q-bits 4 would change nothing"),
        ("-q --float-map", "--float-map is a map of the recipe unsloth"),
        ("-q --plan --bandwidth 0", "--bandwidth is 0"),
        ("-q --imatrix-path no.gguf", "there is no imatrix file"),
        ("-q --mtp keep --q-bit 4", "unrecognized arguments"),
        ("--dequantize", "--dequantize would change nothing"),
        ("-q --target-size 15GB", "--target-size would change nothing without --q-recipe best"),
        ("-q --calibration x.txt", "--calibration would change nothing without --q-recipe best"),
        ("--q-recipe best", "needs one of --target-size, --target-bpw, --target-speed: none is given"),
        ("--q-recipe best --target-size 1GB --target-bpw 4", "--target-size and --target-bpw are given"),
        ("--q-recipe best --target-size 15", "--target-size is '15', wanted a size like 15GB or 900MiB"),
        ("--q-recipe best --target-bpw 0", "--target-bpw is 0, wanted a finite number above 0"),
        ("--q-recipe best --target-bpw 4 --q-bits 4", "--q-bits contradicts the recipe best"),
        ("--q-recipe best --target-speed 9 --bandwidth fast", "'fast' is not a bandwidth"),
        ("--q-recipe best --target-bpw 4 --calibration no.txt", "cannot read"),
        ("--q-recipe best --target-bpw 4 --sensitivity no/where.json --dequantize", "contradict each other"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(
    words: str, sentence: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code = convert("-i", raw, "-o", tmp_path / "new", *words.split())
    out, err = capsys.readouterr()
    assert sentence in err
    assert err.startswith("qchat: ") and err.count("\n") == 1
    assert code in (2, 3)
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_destination_is_needed_unless_it_is_a_plan(raw: Path, capsys: pytest.CaptureFixture[str]):
    assert convert("-i", raw, "-q") == 2
    assert "-o FOLDER is needed" in capsys.readouterr().err


def qchat(*words: str) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own, with nothing piped in and nothing but Python to find."""
    script = (
        "import sys; from qchat.tui.cli.main import main; code = main(sys.argv[1:]);"
        "print('mlx' in {name.split('.')[0] for name in sys.modules}); sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        env={"PYTHONPATH": str(ROOT / ".dev"), "PATH": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_a_path_with_a_slash_is_a_model_even_if_it_is_called_like_a_verb():
    done = qchat("./convert", "-p", "x")
    assert done.returncode == 3
    assert "does not exist" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"), [(["--help"], tuple(VERBS)), (["convert", "--help"], ("--q-recipe",))]
)
def test_help_lists_the_verbs_and_imports_no_mlx(words: list[str], expected: tuple[str, ...]):
    done = qchat(*words)
    assert done.returncode == 0
    assert all(word in done.stdout for word in expected)
    assert done.stdout.endswith("False\n")


def test_an_interruption_says_how_to_go_on(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from qchat.core.conversion import convert as converting

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "_write_shards", interrupted)
    assert convert("-i", raw, "-o", tmp_path / "new", "-q") == 130
    assert "the same command goes on from the last finished shard" in capsys.readouterr().err


def test_progress_fits_a_line():
    event = {
        "event": "progress",
        "unit": "bytes",
        "done": 2 * 10**9,
        "total": 8 * 10**9,
        "detail": "writing layers.3.mlp.down_proj",
        "seconds_left": 83.4,
    }
    said = " 25%  2.00 of 8.00 GB · writing layers.3.mlp.down_proj · 1:23 left"
    assert progress_line(event) == said
    assert len(progress_line(event | {"detail": "writing " + "layers.3.mlp" * 20})) < 80


@pytest.mark.slow
def test_the_recipe_best_measures_once_and_plans_and_converts_from_that(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text, file = tmp_path / "text.txt", tmp_path / "mine.json"
    text.write_text("How deep is the well? Nobody has ever measured it, and nobody will.\n" * 2)
    words = ("-i", raw, "--q-recipe", "best", "--sensitivity", file)
    assert convert(*words, "--target-size", "0.3MB", "--calibration", text, "--plan") == 0
    out, _ = capsys.readouterr()
    assert "predicted KL" in out and "bits chosen for 300,000 bytes of weight files" in out
    measured = file.read_bytes()
    assert convert(*words, "--target-speed", "1000000", "--bandwidth", "300GB/s", "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes_per_token"] <= 300_000
    assert plan["allocation"]["budget"] == "1e+06 tokens/s at 300 GB/s"
    assert convert(*words, "--target-bpw", "5", "-o", tmp_path / "new") == 0
    out, _ = capsys.readouterr()
    assert "chosen for 5 bits per weight: predicted KL divergence" in out
    assert file.read_bytes() == measured
    assert (
        "-q --q-recipe best --target-bpw 5.0 --sensitivity mine.json"
        in (tmp_path / "new/README.md").read_text()
    )


def test_the_differences_from_the_published_cards_are_said_where_people_choose(
    raw: Path, capsys: pytest.CaptureFixture[str]
):
    assert convert("-i", raw, "-q", "--q-recipe", "unsloth", "--q-bits", "3", "--plan") == 0
    assert "the published cards leave them in bfloat16, as --keep-bf16 does" in capsys.readouterr().out
    assert convert("-i", raw, "-q", "--q-recipe", "unsloth", "--q-bits", "3", "--keep-bf16", "--plan") == 0
    assert "published cards" not in capsys.readouterr().out
    assert convert("-i", raw, "-q", "--q-mode", "mxfp8", "--plan") == 0
    assert "mxfp8 costs about four times the KL divergence of 6 affine bits" in capsys.readouterr().out
    assert convert("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "as the published cards have them" in said and "four times the KL divergence" in said
