"""Destinations: free, taken, replaced; interrupted runs that go on; disks that are full."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qchat.core.conversion import convert as converting
from qchat.core.conversion import staging
from qchat.core.conversion.convert import Conversion, Progress, convert
from qchat.core.conversion.report import Report
from qchat.core.conversion.writer import ShardWriter
from qchat.core.errors import DoesNotFit, UsageError
from qchat.core.quant.recipes import Options
from tests.checkpoints import write_checkpoint

FOUR_BITS, TWO_BITS = Options(recipe="none", bits=4), Options(recipe="none", bits=2)
SMALL_DISK_NBYTES = 120_000


def run(
    folder: Path, target: Path, options: Options = FOUR_BITS, listener: Callable = lambda _: None, **more: Any
) -> Report:
    return convert(Conversion(folder, target, options, **more), listener)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> dict[str, bytes]:
    """The weights and their index; card and report hold times."""
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw model whose conversion has several shards."""
    monkeypatch.setattr(converting, "SHARD_NBYTES", 60_000)
    write_checkpoint(tmp_path / "raw", tied=False)
    return tmp_path / "raw"


def interrupt_in_shard(number: int) -> Callable[[Any], None]:
    """A listener that is interrupted once the modules of `number` shards have been written."""
    seen: list[int] = []

    def listen(event: Any) -> None:
        if isinstance(event, Progress) and event.stage == "writing":
            seen.append(event.done)
            if event.done > number * event.total / 8:
                raise KeyboardInterrupt

    return listen


def test_an_interrupted_conversion_goes_on_where_it_was(raw: Path, tmp_path: Path):
    run(raw, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(raw, tmp_path / "new", listener=interrupt_in_shard(5))
    assert not (tmp_path / "new").exists()
    waiting = sorted(path.name for path in (tmp_path / ".new.partial").iterdir())
    assert waiting[0] == "conversion.json"
    assert not any(name.endswith(".part") for name in waiting)
    report = run(raw, tmp_path / "new")
    assert report.kept_shards == len(waiting) - 1 > 0
    assert files(tmp_path / "new") == files(tmp_path / "straight")
    assert not (tmp_path / ".new.partial").exists()


def test_an_interruption_before_the_first_shard_leaves_nothing(raw: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(raw, tmp_path / "new", listener=interrupt_in_shard(0))
    assert names(tmp_path) == ["raw"]


def test_other_options_start_from_nothing(raw: Path, tmp_path: Path):
    run(raw, tmp_path / "straight", TWO_BITS)
    with pytest.raises(KeyboardInterrupt):
        run(raw, tmp_path / "new", listener=interrupt_in_shard(5))
    assert run(raw, tmp_path / "new", TWO_BITS).kept_shards == 0
    assert files(tmp_path / "new") == files(tmp_path / "straight")


def test_a_source_that_changed_starts_from_nothing(raw: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(raw, tmp_path / "new", listener=interrupt_in_shard(5))
    write_checkpoint(raw, tied=False, seed=1)
    assert run(raw, tmp_path / "new").kept_shards == 0


def test_a_folder_with_the_name_of_ours_is_left_alone(raw: Path, tmp_path: Path):
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial/diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="remove it first"):
        run(raw, tmp_path / "new")
    assert (tmp_path / ".new.partial/diary.txt").read_text() == "mine"


def test_two_conversions_to_one_place_do_not_mix(raw: Path, tmp_path: Path):
    heard: list[str] = []

    def second(_event: Any) -> None:
        if not heard:
            heard.append("")
            with pytest.raises(UsageError, match="another conversion is writing"):
                run(raw, tmp_path / "new", TWO_BITS)

    run(raw, tmp_path / "new", listener=second)
    assert heard and (tmp_path / "new").exists()


def test_an_existing_destination_is_refused_and_an_empty_one_taken(raw: Path, tmp_path: Path):
    (tmp_path / "new").mkdir()
    run(raw, tmp_path / "new")
    before = files(tmp_path / "new")
    with pytest.raises(UsageError, match="exists"):
        run(raw, tmp_path / "new", TWO_BITS)
    assert files(tmp_path / "new") == before


def test_force_replaces_a_conversion(raw: Path, tmp_path: Path):
    run(raw, tmp_path / "new")
    run(raw, tmp_path / "new", TWO_BITS, force=True)
    run(raw, tmp_path / "straight", TWO_BITS)
    assert files(tmp_path / "new") == files(tmp_path / "straight")
    assert names(tmp_path) == ["new", "raw", "straight"]


@pytest.mark.parametrize("kind", ["a foreign folder", "a file of the user's", "a file", "a link"])
def test_force_never_removes_what_no_conversion_wrote(kind: str, raw: Path, tmp_path: Path):
    new = tmp_path / "new"
    if kind == "a foreign folder":
        shutil.copytree(raw, new)
    elif kind == "a file":
        new.write_text("mine")
    elif kind == "a link":
        run(raw, tmp_path / "other")
        new.symlink_to(tmp_path / "other")
    else:
        run(raw, new)
        (new / "notes.txt").write_text("mine")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"exists and is not a folder|which no conversion wrote"):
        run(raw, new, TWO_BITS, force=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_what_a_killed_replacement_left_is_finished_by_the_next_run(raw: Path, tmp_path: Path):
    """Between two renames the old conversion stands aside and the new one has no name yet."""
    run(raw, tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / ".new.replaced")
    run(raw, tmp_path / "new", TWO_BITS, force=True)
    assert names(tmp_path) == ["new", "raw"]


# --- full disks ---


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def usage(_path: Path) -> Any:
        return shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6)  # pyright: ignore

    monkeypatch.setattr(staging.shutil, "disk_usage", usage)
    with pytest.raises(DoesNotFit, match=r"needs 0\.05\d GB of disk and 0\.001 GB are free"):
        run(raw, tmp_path / "new")
    assert names(tmp_path) == ["raw"]


def test_a_disk_that_becomes_full_ends_in_a_sentence_and_a_clean_folder(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(self: ShardWriter, array: Any, values: Any, row: int = 0) -> None:
        if "mlp" in array.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, array, values, row)

    put = ShardWriter.write
    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(DoesNotFit, match="became full during the conversion"):
        run(raw, tmp_path / "new")
    assert names(tmp_path) == ["raw"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of SMALL_DISK_NBYTES, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_NBYTES}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_small_disk_is_refused_with_both_numbers(raw: Path, small_disk: Path):
    with pytest.raises(DoesNotFit, match=r"needs 0\.05\d GB of disk and 0\.000 GB are free"):
        run(raw, small_disk / "new")
    assert names(small_disk) == []


def test_a_small_disk_that_fills_up_is_left_clean(
    raw: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    def usage(_path: Path) -> Any:
        """What it was before another program began to fill it."""
        return shutil._ntuple_diskusage(10**12, 0, 10**12)  # pyright: ignore

    monkeypatch.setattr(staging.shutil, "disk_usage", usage)
    with pytest.raises(DoesNotFit, match="became full during the conversion"):
        run(raw, small_disk / "new")
    assert names(small_disk) == []


def test_the_report_lists_every_file_of_the_folder(raw: Path, tmp_path: Path):
    run(raw, tmp_path / "new")
    listed = json.loads((tmp_path / "new/conversion.json").read_text())["files"]
    assert sorted(listed) == names(tmp_path / "new")
