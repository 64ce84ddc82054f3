"""`qchat bench`: what it asks for, what it prints, a peer's figures."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qchat.core.errors import UsageError
from qchat.core.measuring import bench
from qchat.core.measuring.measurements import Measurements
from qchat.core.measuring.peers import measure_peer
from qchat.tui.cli.main import main
from qchat.tui.text.report import report_plain
from qchat.tui.user.paths import measurements_file
from tests.checkpoints import tiny_config, write_checkpoint
from tests.tui.chat_stage import ChatStage, at_rest
from tests.tui.task_results import bench_row, results, show

PEER = """
import sys
print("noise")
print("Averages: prompt_tps=300.5, generation_tps=20.5, peak_memory=2.5")
print(sys.argv, file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PREFILL_LENGTHS", (16, 64))
    monkeypatch.setattr(bench, "SUSTAINED_TOKENS", 32)
    monkeypatch.setattr(bench, "CAPITALS", ("What?", "And?"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a module in the place of mlx-lm's command."""

    def put(text: str) -> None:
        (tmp_path / "peer/mlx_lm").mkdir(parents=True)
        (tmp_path / "peer/mlx_lm/__init__.py").touch()
        (tmp_path / "peer/mlx_lm/__main__.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "peer"))

    return put


@pytest.mark.slow
def test_a_model_is_measured_beside_mlx_lm_and_its_figures_are_kept(model: Path, peer: Any, capsys):
    peer(PEER)
    assert main(["bench", str(model), "--runs", "1", "--against", "mlx-lm"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = {line[:9].strip(): line for line in out.splitlines()}
    assert "capitals tok/s" in rows["model"] or "first token s" in rows["model"]
    assert "x" in rows["as fast"]
    assert "20.5" in out and "300" in out and "2.33" in rows["mlx-lm"]
    assert Measurements(measurements_file()).find(model)["decode_tokens_per_s"] > 0


@pytest.mark.slow
def test_json_is_a_list_of_rows(model: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", str(model), "--runs", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"] == "tiny" and row["prefills"].keys() == {"16", "64"}
    assert row["bandwidth_share"] > 0 and "event" not in row and row["against"] is None


@pytest.mark.slow
def test_random_weights_are_measured_in_both_doors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config()))
    line = f"bench --random {config} --variant UD-Q8_K_XL --runs 1"
    assert main(line.split()) == 0
    assert "random UD-Q8_K_XL" in capsys.readouterr().out
    stage = ChatStage(tmp_path, {"method": "bench", "result": results()["bench"]})
    stage.play(f"/{line} --against mlx-lm", at_rest)
    assert not stage.front.all("error")
    (asked,) = stage.fake.asked("bench")
    assert (asked["models"], asked["runs"], asked["against"]) == ([], 1, "mlx-lm")
    assert (asked["random"], asked["variant"]) == (str(config), "UD-Q8_K_XL")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "say which models to measure, or --random CONFIG"),
        ("built-in --runs 0", "--runs is 0, wanted 1 to 100"),
        ("built-in --variant UD-Q8_K_XL", "--variant would change nothing without --random"),
        ("built-in --against vllm", "invalid choice: 'vllm'"),
        ("--random /nowhere/config.json", "config.json"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(words: str, sentence: str, capsys):
    assert main(["bench", *words.split()]) in (2, 3)
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1


@pytest.mark.slow
def test_figures_that_cannot_be_kept_are_a_notice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measurements_file().mkdir(parents=True)
    assert main(["bench", str(model), "--runs", "1"]) == 0
    out, err = capsys.readouterr()
    assert "tiny" in out and err.startswith("qchat: the measurement cannot be stored")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("raise SystemExit('no such model')", "mlx-lm's benchmark failed on .*: no such model"),
        ("print('hm')", "it wrote nothing"),
    ],
)
def test_a_peer_that_fails_is_a_sentence(tmp_path: Path, peer: Any, text: str, sentence: str):
    peer(text)
    with pytest.raises(UsageError, match=sentence):
        measure_peer(tmp_path, 1)


def test_a_peer_ends_with_a_cancelled_job(tmp_path: Path, peer: Any):
    started = tmp_path / "started"
    peer(f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(600)")

    def poll() -> None:
        if started.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_peer(tmp_path, 1, poll)


def test_a_peers_rows_stand_below_ours():
    said = report_plain(show("bench", [], results()["bench"])).splitlines()
    place = next(n for n, line in enumerate(said) if line.startswith("  mlx-lm"))
    assert said[place - 1].startswith("fake-4bit") and said[place + 1].split() == [
        "as",
        "fast",
        "x1.2",
        "x1.3",
    ]
    assert "fake-4bit: prompts of 512 at 400 tok/s, 4,096 at 350 tok/s" in said


def test_a_row_without_a_conversation_has_none():
    row = bench_row("random", 10.0, capitals_tokens_per_s=None, first_token_seconds=None)
    said = report_plain(show("bench", [], {"rows": [row]}))
    assert "None" not in said and sys.executable not in said
