"""`qchat pull`, and fetching a model that was named for something else: what is asked and printed."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from qchat.core.hub import cache as hubcache
from qchat.core.hub import library
from qchat.core.hub.download import DownloadProgress
from qchat.core.hub.library import ModelNotDownloaded
from qchat.core.hub.listing import DownloadPlan
from qchat.tui.cli import verbs
from qchat.tui.cli.main import main
from qchat.tui.cli.verbs.pull import find_or_download, progress_line
from tests.checkpoints import write_checkpoint
from tests.hub_server import Fault, Hub, Repo, point_to
from tests.paths import QTINY, ROOT
from tests.tui.fake_terminal import FakeTerminal

ID = "me/tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pull")
    write_checkpoint(folder, shards=2)
    return folder


@pytest.fixture
def server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with Hub({ID: Repo.of(model)}) as running:
        point_to(running.url, tmp_path / "hub", monkeypatch)
        yield running


def answer(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", FakeTerminal(text))


def test_pull_prints_the_folder_and_nothing_else(server: Hub, capsys: pytest.CaptureFixture[str]):
    assert main(["pull", ID]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{library.find_model(ID)}\n", "")
    assert server.sent


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("typed", ["y\n", "YES\n"])
def test_on_a_terminal_it_asks_first(typed: str, monkeypatch: pytest.MonkeyPatch, capsys):
    answer(typed, monkeypatch)
    assert main(["pull", ID]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"{ID}: 0.00 GB in 7 files\n")
    assert " GB are free on the disk of " in err and "\nfits: " in err
    assert err.endswith("Download it? [y/N] ")
    assert library.find_model(ID)


@pytest.mark.parametrize("typed", ["n\n", "\n", ""])
def test_without_a_yes_nothing_is_fetched(server: Hub, typed: str, monkeypatch: pytest.MonkeyPatch):
    answer(typed, monkeypatch)
    assert main(["pull", ID]) == 0
    assert {seen.name for seen in server.seen} == {"config.json", "model.safetensors.index.json"}
    assert not hubcache.cache_folder().exists()


@pytest.mark.usefixtures("server")
def test_yes_asks_nothing(monkeypatch: pytest.MonkeyPatch):
    answer("", monkeypatch)
    assert main(["pull", ID, "--yes"]) == 0
    assert library.find_model(ID)


def test_a_dry_run_lists_the_files_and_writes_nothing(server: Hub, capsys: pytest.CaptureFixture[str]):
    assert main(["pull", ID, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[1] for line in lines[3:]}
    assert names == server.repos[ID].files.keys()
    assert not hubcache.cache_folder().exists()


@pytest.mark.parametrize("trouble", ["unknown", "gated", "offline", "network", "disk", "id"])
def test_trouble_is_one_sentence_and_a_code(
    server: Hub, trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    if trouble == "gated":
        server.repos[ID].token, server.repos[ID].gated = "hf_secret", True
    if trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if trouble == "network":
        point_to("http://127.0.0.1:9", tmp_path, monkeypatch)
    if trouble == "disk":
        monkeypatch.setattr(DownloadPlan, "free_nbytes", property(lambda _: 1000))
    begin = time.monotonic()
    name = {"unknown": "me/none", "id": "no id"}.get(trouble, ID)
    assert main(["pull", name]) == (4 if trouble == "disk" else 3)
    assert time.monotonic() - begin < 60  # retries would go on for minutes
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qchat: ") and err.count("\n") == 1


def test_a_name_that_is_known_stands_for_its_id(server: Hub, capsys: pytest.CaptureFixture[str]):
    whole = "Brooooooklyn/Qwen3.5-9B-UD-Q2_K_XL-mlx"
    server.repos[whole] = server.repos[ID]
    assert main(["pull", "qwen3.5-9b-ud-q2"]) == 0
    assert capsys.readouterr().out == f"{library.find_model(whole)}\n"
    assert main(["pull", "qwen3.5-9b"]) == 3


# --- a model named for something else ---


@pytest.mark.usefixtures("server")
def test_a_model_that_is_here_is_not_asked_about(model: Path):
    assert find_or_download(str(model), yes=False) == model


def test_where_nobody_can_be_asked_nothing_is_fetched(server: Hub):
    with pytest.raises(ModelNotDownloaded, match="download it with `qchat pull me/tiny`"):
        find_or_download(ID, yes=False)
    assert server.seen == []


@pytest.mark.usefixtures("server")
def test_a_yes_given_before_fetches():
    assert find_or_download(ID, yes=True) == library.find_model(ID)


@pytest.mark.usefixtures("server")
def test_a_person_is_asked_and_decides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    answer("n\n", monkeypatch)
    with pytest.raises(ModelNotDownloaded):
        find_or_download(ID, yes=False)
    assert "It is not on this machine. Download it? [y/N] " in capsys.readouterr().err
    answer("y\n", monkeypatch)
    assert find_or_download(ID, yes=False) == library.find_model(ID)


# --- the line of progress, and being interrupted ---


def test_the_line_of_progress_has_bytes_and_time_left_in_a_terminal_of_80_columns():
    line = progress_line(
        DownloadProgress(12 * 10**9, 15 * 10**9, "waiting for another process that downloads", 3671)
    )
    assert line.startswith(" 80%  12.00 of 15.00 GB, 1:01:11 left  waiting for")
    assert len(line) < 80
    assert progress_line(DownloadProgress(0, 0, "downloading")) == "100%  0.00 of 0.00 GB  downloading"


@pytest.mark.slow
def test_an_interrupted_pull_says_that_it_can_go_on(server: Hub, tmp_path: Path):
    server.faults.extend([None, None])  # config and index
    server.always = Fault("slow", seconds=3.0)
    process = subprocess.Popen(
        [sys.executable, "-m", "qchat.tui", "pull", ID],
        env=outside(server, tmp_path),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    here, files = hubcache.Repository(tmp_path / "hub", ID), server.repos[ID].files
    shards = [data for name, data in files.items() if name.endswith(".safetensors")]
    partial = [here.partial(hashlib.sha256(data).hexdigest()) for data in shards]
    while not any(path.exists() and path.stat().st_size for path in partial):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().count("\n") == 1 and b"received data is kept" in err
    with pytest.raises(ModelNotDownloaded, match="is only partly downloaded"):
        library.find_model(ID)


@pytest.mark.slow
@pytest.mark.skipif(not QTINY.exists(), reason="the trained model is not here")
def test_the_trained_model_arrives_whole(server: Hub, tmp_path: Path):
    server.repos["me/qtiny"] = Repo.of(QTINY)
    server.faults.extend(Fault("cut", at=at) for at in (5_000_000, 1_000_000, 300_000))
    command = [sys.executable, "-m", "qchat.tui", "pull", "me/qtiny"]
    done = subprocess.run(
        command, env=outside(server, tmp_path), stdin=subprocess.DEVNULL, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.decode().strip())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == server.repos["me/qtiny"].files
    assert server.sent == sum(map(len, server.repos["me/qtiny"].files.values()))


def outside(server: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a process of its own."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / ".dev"),
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]):
    assert verbs.run("pull", ["--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out
