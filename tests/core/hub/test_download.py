"""Fetching from a hub on the loopback: what comes, what is resumed, and one sentence for what goes wrong."""

import errno
import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from qchat.core.errors import DoesNotFit
from qchat.core.hub import cache as hubcache
from qchat.core.hub import library, listing, transfer
from qchat.core.hub.download import DownloadProgress, download_model
from qchat.core.hub.failures import DownloadCancelled
from qchat.core.hub.listing import DownloadPlan, plan_download
from qchat.core.worker.jobs import run_job
from qchat.core.worker.protocol import Cancelled
from tests import hub_stage
from tests.checkpoints import write_checkpoint
from tests.hub_server import LARGE_NBYTES, Fault, Hub, Repo, point_to
from tests.hub_stage import ID, Files, assert_nothing_to_load, content, pull, refusal

files, hasty, repo, server = hub_stage.files, hub_stage.hasty, hub_stage.repo, hub_stage.server
pytestmark = pytest.mark.usefixtures("server")
JUNK = (
    "pytorch_model.bin",
    "tiny.gguf",
    "onnx/model.onnx",
    "cat.png",
    ".gitattributes",
    "run.py",
    "model.pt",
)


# --- what is fetched ---


def test_a_model_is_fetched_whole(server: Hub, files: Files):
    folder = pull()
    assert content(folder) == files
    assert library.find_model(ID) == library.find_model(f"{ID}@main") == folder
    assert library.load_problem(folder) is None
    assert server.sent == sum(map(len, files.values()))


def test_only_what_a_model_needs_is_fetched(server: Hub, repo: Repo, files: Files):
    extra = dict.fromkeys((*JUNK, "other.safetensors"), b"x" * LARGE_NBYTES)
    repo.files = {**files, **extra}
    assert content(pull()).keys() == files.keys()
    assert not extra.keys() & {seen.name for seen in server.seen}


def test_a_model_without_an_index_and_a_head_of_its_own_are_found(repo: Repo, tmp_path: Path):
    write_checkpoint(tmp_path / "one")
    (tmp_path / "one/mtp").mkdir()
    (tmp_path / "one/mtp/weights.safetensors").write_bytes(b"x" * 5000)
    repo.files = Repo.of(tmp_path / "one").files
    assert content(pull()) == repo.files


def test_a_second_fetch_asks_for_no_file(server: Hub):
    folder = pull()
    server.seen.clear()
    assert pull() == folder
    assert server.seen == []


def test_a_damaged_blob_is_noticed_and_fetched_again(files: Files):
    folder = pull()
    shard = next(folder.glob("*.safetensors")).resolve()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert content(pull()) == files


def test_a_revision_can_be_asked_for(repo: Repo):
    repo.revisions = ("main", "v2/small")
    folder = download_model(plan_download(f"{ID}@v2/small"))
    assert library.find_model(f"{ID}@v2/small") == folder == library.find_model(f"{ID}@{repo.commit[:8]}")
    with pytest.raises(library.ModelNotDownloaded):
        library.find_model(f"{ID}@v3")


@pytest.mark.slow
def test_progress_counts_up_to_all_bytes(server: Hub, files: Files):
    server.always = Fault("slow", seconds=0.3)
    told: list[DownloadProgress] = []
    pull(progress=told.append)
    assert [p.done for p in told] == sorted(p.done for p in told)
    assert told[-1].done == told[-1].total == sum(map(len, files.values()))
    assert any(p.seconds_left for p in told)
    assert told[-1].as_json().keys() == {"event", "unit", "done", "total", "detail", "seconds_left"}


def test_the_token_is_shown_to_the_hub_and_to_nobody_else(
    server: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch
):
    repo.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", repo.token)
    pull()
    shown = {len(repo.files[seen.name]) >= LARGE_NBYTES: seen.authorization for seen in server.seen}
    assert shown == {True: None, False: "Bearer hf_secret"}


# --- what is resumed ---


@pytest.mark.usefixtures("hasty")
def test_a_cut_connection_costs_no_byte_twice(server: Hub, files: Files):
    server.faults.extend(Fault("cut", at=at) for at in (100, 5000, 33_000, 70_000, 1))
    assert content(pull()) == files
    assert server.sent == sum(map(len, files.values()))


@pytest.mark.slow
def test_a_cancelled_fetch_is_gone_on_with(server: Hub, files: Files):
    wanted = plan_download(ID)
    server.always = Fault("slow", seconds=0.8)
    enough = wanted.nbytes // 3
    stop = lambda: server.sent > enough  # noqa: E731
    sentence = refusal(lambda: download_model(wanted, cancelled=stop), DownloadCancelled)
    assert sentence.startswith(f"the download of {ID} was cancelled at ")
    assert_nothing_to_load()
    server.always = None
    before = -1
    while before != len(server.seen):  # a request that was given up may still be on its way to be seen
        before = len(server.seen)
        time.sleep(0.3)
    missing = wanted.missing_nbytes
    assert 0 < missing < wanted.nbytes
    assert content(pull()) == files
    assert sum(seen.sent for seen in server.seen[before:]) == missing


def test_a_job_is_stopped_while_the_hub_is_asked(server: Hub):
    server.faults.append(Fault("slow", seconds=1.5))
    told: list[dict[str, Any]] = []

    def report(event: dict[str, Any]) -> None:
        told.append(event)
        if server.seen:
            raise Cancelled("cancelled")

    assert refusal(lambda: run_job("fetch", {"id": ID, "revision": None}, report), Cancelled) == "cancelled"
    assert told[-1]["detail"] == "reading the file list"
    assert [seen.name for seen in server.seen] == ["config.json"]


@pytest.mark.usefixtures("hasty")
def test_a_server_that_knows_no_ranges_sends_all_again(server: Hub, files: Files):
    server.faults.extend(
        [None, None, Fault("cut", at=40_000), Fault("whole"), Fault("whole"), Fault("whole")]
    )
    assert content(pull()) == files


def test_what_an_earlier_run_left_is_checked(files: Files):
    wanted = plan_download(ID)
    big = max(wanted.files, key=lambda file: file.nbytes)
    partial = wanted.repository.partial(big.digest)
    partial.parent.mkdir(parents=True)
    for left in (b"\0" * 1000, b"\0" * big.nbytes, b"\0" * (big.nbytes + 1)):
        partial.write_bytes(left)
        assert content(download_model(wanted)) == files
        hubcache.Repository(wanted.cache, ID).blob(big.digest).unlink()


@pytest.mark.slow
def test_two_fetches_at_once_share_the_work(server: Hub, files: Files):
    server.always = Fault("slow", seconds=0.3)
    wanted = plan_download(ID)
    before = server.sent
    others = [threading.Thread(target=download_model, args=(wanted,)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert content(wanted.folder) == files
    assert server.sent - before == wanted.nbytes - sum(map(len, wanted.loaded.values()))


def test_a_file_that_another_tool_is_fetching_is_waited_for():
    wanted = plan_download(ID)
    lock = wanted.repository.lock(wanted.files[0].digest)
    lock.parent.mkdir(parents=True)
    told: list[DownloadProgress] = []
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        end = time.monotonic() + 0.5
        refusal(
            lambda: download_model(wanted, told.append, cancelled=lambda: time.monotonic() > end),
            DownloadCancelled,
        )
    assert "waiting for another process" in told[-1].detail


# --- what goes wrong, in one sentence ---


def test_a_gated_model_wants_a_token(repo: Repo, monkeypatch: pytest.MonkeyPatch):
    repo.token, repo.gated = "hf_secret", True
    assert "HF_TOKEN" in refusal(pull)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "terms" in refusal(pull)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull()


def test_an_unknown_model_is_named(monkeypatch: pytest.MonkeyPatch):
    assert "has no model me/nothing" in refusal(lambda: plan_download("me/nothing"))
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    sentence = refusal(lambda: plan_download("Brooooooklyn/Qwen3.6-27B-UD-Q2-mlx"))
    assert "did you mean Brooooooklyn/Qwen3.6-27B-UD-Q2_K_XL-mlx?" in sentence


def test_an_unknown_revision_is_named():
    assert refusal(lambda: plan_download(f"{ID}@v9")) == f"{ID} has no revision v9"


def test_without_a_network_the_host_is_named(monkeypatch: pytest.MonkeyPatch):
    point_to("http://127.0.0.1:9", hubcache.cache_folder(), monkeypatch)
    assert refusal(pull).startswith("no connection to 127.0.0.1:9 (")


@pytest.mark.usefixtures("hasty")
def test_a_host_that_never_answers_is_given_up(server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing, "FIRST_ANSWER_SECONDS", 0.2)
    server.api_faults.append(Fault("hang", seconds=1.0))
    assert "does not answer" in refusal(pull)


def test_offline_nothing_is_asked(server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(pull) == f"cannot download {ID} while HF_HUB_OFFLINE is set: unset it first"
    assert server.seen == []


def test_too_small_a_disk_is_refused_before_anything_is_fetched(server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DownloadPlan, "free_nbytes", property(lambda _: 1000))
    sentence = refusal(pull, DoesNotFit)
    assert "HF_HOME" in sentence and DoesNotFit.exit_code == 4
    assert len(server.seen) == 2  # config and index, to know what is needed


def test_a_disk_that_fills_up_keeps_what_arrived(monkeypatch: pytest.MonkeyPatch):
    keep = transfer.Transfer._append

    def full(self: transfer.Transfer, chunk: bytes) -> None:
        if sum(self._monitor.received.values()) > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        keep(self, chunk)

    monkeypatch.setattr(transfer.Transfer, "_append", full)
    assert "is full" in refusal(pull, DoesNotFit)
    assert_nothing_to_load()
    assert plan_download(ID).missing_nbytes < plan_download(ID).nbytes


def test_a_hub_that_wants_a_long_rest_gets_it(server: Hub):
    server.api_faults.append(Fault("status", status=429, retry_after=77))
    assert refusal(pull).endswith("received too many requests: try again in 77 seconds")
    server.always = Fault("status", status=429, retry_after=88)
    assert refusal(pull).endswith("try again in 88 seconds")


@pytest.mark.slow
def test_a_short_rest_is_taken(server: Hub, files: Files):
    server.faults.append(Fault("status", status=429, retry_after=1))
    begin = time.monotonic()
    assert content(pull()) == files
    assert time.monotonic() - begin >= 1


@pytest.mark.usefixtures("hasty")
def test_trouble_that_passes_is_waited_out(server: Hub, files: Files):
    server.api_faults.append(Fault("status", status=500))
    server.faults.extend(Fault("status", status=status) for status in (502, 503, 504))
    assert content(pull()) == files


@pytest.mark.slow
def test_trouble_that_stays_ends_the_fetch(server: Hub):
    server.always = Fault("status", status=503)
    assert "HTTP status 503" in refusal(pull)
    assert_nothing_to_load()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["corrupt", "short", "long", "page"])
@pytest.mark.usefixtures("hasty")
def test_a_wrong_answer_is_never_taken(server: Hub, files: Files, kind: str):
    wanted = plan_download(ID)
    server.always = Fault(kind, at=5)
    assert refusal(lambda: download_model(wanted)).startswith(f"{ID} was not downloaded: 127.0.0.1:")
    assert_nothing_to_load()
    server.always = None
    assert content(download_model(wanted)) == files


@pytest.mark.usefixtures("hasty")
def test_another_part_than_asked_for_is_never_taken(server: Hub, files: Files):
    wanted = plan_download(ID)
    big = max(wanted.files, key=lambda file: file.nbytes)
    partial = wanted.repository.partial(big.digest)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(files[big.name][:1000])
    server.always = Fault("shifted")
    assert "a different range of" in refusal(lambda: download_model(wanted))
    assert partial.read_bytes() == files[big.name][:1000]


@pytest.mark.usefixtures("hasty")
def test_one_wrong_byte_is_fetched_again(server: Hub, files: Files):
    server.faults.extend([None, None, None, Fault("corrupt", at=77)])
    assert content(pull()) == files


@pytest.mark.parametrize("fault", [Fault("corrupt", at=77), Fault("cut", at=77)])
@pytest.mark.usefixtures("hasty")
def test_a_config_that_arrives_wrong_is_read_from_its_beginning_again(
    server: Hub, files: Files, fault: Fault
):
    server.faults.extend([fault, Fault("whole")])
    assert plan_download(ID).loaded["config.json"] == files["config.json"]


def test_a_page_instead_of_a_listing_is_refused(server: Hub):
    server.api_faults.append(Fault("page"))
    assert "not a file listing" in refusal(pull)


def test_a_model_of_another_kind_is_refused_before_its_weights(server: Hub, repo: Repo):
    repo.files["config.json"] = json.dumps({"model_type": "llama"}).encode()
    assert "model_type is 'llama'" in refusal(pull)
    assert not any(name.endswith(".safetensors") for name in {seen.name for seen in server.seen})


@pytest.mark.parametrize("missing", ["config.json", "weights"])
def test_a_repository_that_is_no_model_is_refused(repo: Repo, missing: str):
    keep = (
        (lambda name: name != missing)
        if missing == "config.json"
        else (lambda name: "safetensors" not in name)
    )
    repo.files = {name: data for name, data in repo.files.items() if keep(name)}
    assert f"qchat cannot run {ID}" in refusal(pull)
