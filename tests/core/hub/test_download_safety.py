"""Whatever a hub names, sends or breaks off: nothing outside the cache, and nothing half-finished in it."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qchat.core.errors import QchatError
from qchat.core.hub import cache as hubcache
from qchat.core.hub import library, listing
from qchat.core.hub.download import download_model
from qchat.core.hub.listing import MAX_SMALL_NBYTES, plan_download
from tests import hub_stage
from tests.hub_server import Fault, Hub, Repo
from tests.hub_stage import ID, QUICK, Files, assert_nothing_to_load, content, pull, refusal
from tests.paths import ROOT

files, hasty, repo, server = hub_stage.files, hub_stage.hasty, hub_stage.repo, hub_stage.server
pytestmark = pytest.mark.usefixtures("server")
# random fault scripts and kills; `make fuzz-download` asks for many more
SCRIPTS = int(os.environ.get("TESTS_DOWNLOADS", "6"))
KILLS = max(2, SCRIPTS // 20)


# --- names that lead elsewhere ---


TRICKS = (
    "../../evil.safetensors",
    "/tmp/evil.safetensors",
    "..\\evil.safetensors",
    "a/../../evil.safetensors",
    "model.safetensors/../../../x.safetensors",
    "~/evil.safetensors",
    "nul.safetensors",
    "COM1.safetensors",
    "a\0.safetensors",
    ".hidden.safetensors",
    "model\n.safetensors",
)


@pytest.mark.parametrize("name", TRICKS)
def test_a_shard_with_a_tricky_name_is_refused(repo: Repo, tmp_path: Path, name: str):
    index = json.loads(repo.files["model.safetensors.index.json"])
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    repo.files |= {"model.safetensors.index.json": json.dumps(index).encode(), name: b"x" * 9}
    refusal(pull)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]
    assert_nothing_to_load()


@pytest.mark.parametrize("name", TRICKS)
def test_other_files_with_tricky_names_are_left_alone(repo: Repo, files: Files, tmp_path: Path, name: str):
    repo.files = {**files, name: b"x" * 9, f"{name}/config.json": b"{}", "../config.json": b"{}"}
    assert content(pull()) == files
    lying = {path for path in tmp_path.rglob("*") if path.is_file()} - set((tmp_path / "hub").rglob("*"))
    assert not lying


def test_shards_that_differ_in_case_only_are_refused(repo: Repo):
    index = json.loads(repo.files["model.safetensors.index.json"])
    names = ["model-A.safetensors", "model-a.safetensors"]
    index["weight_map"] = {tensor: names[i % 2] for i, tensor in enumerate(index["weight_map"])}
    repo.files |= dict.fromkeys(names, b"x" * 9)
    repo.files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert "differ in case only" in refusal(pull)


@pytest.mark.parametrize("field", ["sha", "blobId", "size", "lfs"])
def test_a_listing_with_tricky_values_is_refused(repo: Repo, field: str):
    if field == "sha":
        repo.commit = "../../../elsewhere"
    else:
        bad: Any = {"sha256": "../../x", "size": 9, "pointerSize": 1} if field == "lfs" else "../../x"
        repo.listing = lambda siblings: [{**entry, "lfs": None, field: bad} for entry in siblings]
    refusal(pull)
    assert_nothing_to_load()


# --- more than any model has ---


def claim_sizes(repo: Repo, sizes: dict[str, int]) -> None:
    """Let the listing claim other sizes, and files that there are not."""
    claims = [
        {"rfilename": name, "size": nbytes, "blobId": 40 * "0", "lfs": None} for name, nbytes in sizes.items()
    ]
    repo.listing = lambda siblings: [entry for entry in siblings if entry["rfilename"] not in sizes] + claims


def test_a_small_file_that_is_none_is_refused_before_it_is_downloaded(repo: Repo, server: Hub):
    claim_sizes(repo, {"README.md": MAX_SMALL_NBYTES + 1})
    assert "README.md of me/tiny is too large: 134,217,729 bytes" in refusal(pull)
    assert not [seen for seen in server.seen if seen.name == "README.md"]


def test_small_files_that_are_large_together_are_refused(repo: Repo, server: Hub):
    names = ("README.md", "merges.txt", "vocab.json")
    claim_sizes(repo, dict.fromkeys(names, MAX_SMALL_NBYTES))
    assert re.search(r"besides its weights are too large: 402,\d+,\d+ bytes, at most 268,", refusal(pull))
    assert not [seen for seen in server.seen if seen.name in names]
    assert_nothing_to_load()


@pytest.mark.usefixtures("hasty")
def test_a_config_that_trickles_is_given_up(server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing, "PLAN_SECONDS", 0.3)
    server.always = Fault("slow", seconds=0.35)  # each piece within the time that one may take
    assert "does not answer" in refusal(pull)


# --- nothing half-finished ---


def test_a_folder_that_another_tool_left_half_is_completed(files: Files):
    wanted = plan_download(ID)
    wanted.folder.mkdir(parents=True)
    (wanted.folder / "config.json").write_bytes(files["config.json"])
    assert_nothing_to_load()
    assert content(download_model(wanted)) == files


@pytest.mark.parametrize("links", range(8))
def test_a_model_appears_when_its_last_file_does(files: Files, monkeypatch: pytest.MonkeyPatch, links: int):
    """Whatever stops the publishing, there is no config."""
    real, made = hubcache._link, []

    def link(*args: Path) -> None:
        if len(made) == links:
            raise OSError(errno.EIO, "Input/output error")
        made.append(args)
        real(*args)

    assert links < len(files)
    monkeypatch.setattr(hubcache, "_link", link)
    assert "cannot store" in refusal(pull)
    assert_nothing_to_load()
    monkeypatch.undo()


def test_a_disk_without_links_holds_the_files_themselves(
    server: Hub, files: Files, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = pull()
    assert content(folder) == files and not any(path.is_symlink() for path in folder.iterdir())
    server.seen.clear()
    assert content(pull()) == files
    assert server.seen == []


KINDS = (
    "status",
    "cut",
    "cut",
    "cut",
    "slow",
    "hang",
    "short",
    "long",
    "corrupt",
    "whole",
    "shifted",
    "page",
)


def random_fault(draw: random.Random) -> Fault | None:
    return draw.choice(
        [
            None,
            Fault(
                draw.choice(KINDS),
                at=draw.randrange(200_000),
                status=draw.choice([403, 404, 429, 500, 503]),
                retry_after=draw.choice([None, 0, 1, 60]),
                seconds=draw.choice([0.05, 0.3, QUICK + 0.1]),
            ),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SCRIPTS))
@pytest.mark.usefixtures("hasty")
def test_any_script_of_faults_ends_whole_or_in_a_sentence(server: Hub, files: Files, seed: int):
    draw = random.Random(seed)
    for _ in range(3):
        server.faults.extend(random_fault(draw) for _ in range(draw.randrange(12)))
        server.always = random_fault(draw) if draw.random() < 0.3 else None
        end = time.monotonic() + draw.choice([60.0, draw.uniform(0.0, 0.3)])
        try:
            folder = pull(cancelled=lambda end=end: time.monotonic() > end)
        except QchatError as error:
            assert "\n" not in str(error) and error.exit_code in (1, 3)
            assert_nothing_to_load()
        else:
            assert content(folder) == files
            return
    server.faults.clear()
    server.always = None
    assert content(pull()) == files


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_fetch_leaves_nothing_to_load(server: Hub, files: Files, tmp_path: Path, seed: int):
    server.always = Fault("slow", seconds=0.4)
    script = (
        "from qchat.core.hub import download, listing; "
        f"download.download_model(listing.plan_download({ID!r}))"
    )
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT / ".dev"),
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE)
    while not server.seen:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.0, 0.6))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    snapshot = hubcache.Repository(hubcache.cache_folder(), ID).find_snapshot("main")
    if snapshot is None or library.load_problem(snapshot):
        assert_nothing_to_load()
    server.always = None
    assert content(pull()) == files
