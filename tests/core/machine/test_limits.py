"""What control groups and `ulimit -v` leave this process, from files as Linux writes them."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from qchat.core.machine import limits, memory
from qchat.core.machine.limits import limited_room
from tests.paths import ROOT

GIB = 1 << 30
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="control groups and statm are Linux's")


@pytest.fixture(autouse=True)
def no_address_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: infinite)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 5\nfile 7\ninactive_file {inactive}\n",
    }


def test_a_group_leaves_its_limit_less_what_is_used_and_cannot_be_dropped(tmp_path: Path):
    files = {"proc/self/cgroup": "0::/user/app\n"} | group("sys/fs/cgroup/user/app", str(GIB), 600, 100)
    assert limited_room(write(tmp_path, files)) == GIB - 500


def test_the_tightest_of_nested_groups_decides(tmp_path: Path):
    files = {"proc/self/cgroup": "0::/user/app\n"}
    files |= group("sys/fs/cgroup/user/app", "max", 10) | group("sys/fs/cgroup/user", str(4 * GIB), 3 * GIB)
    files |= group("sys/fs/cgroup", str(8 * GIB), 6 * GIB)
    assert limited_room(write(tmp_path, files)) == GIB


def test_a_container_that_sees_its_group_as_the_mount_is_limited_too(tmp_path: Path):
    files = {"proc/self/cgroup": "0::/docker/0123/not/here\n"} | group("sys/fs/cgroup", str(GIB), 24)
    assert limited_room(write(tmp_path, files)) == GIB - 24


def test_the_first_version_of_control_groups_is_read(tmp_path: Path):
    folder = "sys/fs/cgroup/memory/app"
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/app\n0::/\n",
        f"{folder}/memory.limit_in_bytes": str(GIB),
        f"{folder}/memory.usage_in_bytes": "1000",
        f"{folder}/memory.stat": "inactive_file 1\ntotal_inactive_file 300\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
    }
    assert limited_room(write(tmp_path, files)) == GIB - 700


@pytest.mark.parametrize(
    "text", ["", "0::/../..\n", "nonsense\n", "4:memory:/gone\n0::/\n", "0::/" + "x/" * 100]
)
def test_nothing_limits_where_nothing_is_told(tmp_path: Path, text: str):
    assert limited_room(write(tmp_path, {"proc/self/cgroup": text})) is None


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path):
    files = {"proc/self/cgroup": "0::/\n"} | group("sys/fs/cgroup", "1000", 2000)
    assert limited_room(write(tmp_path, files)) == 0


def test_ulimit_leaves_what_is_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (GIB, GIB))
    root = write(tmp_path, {"proc/self/statm": "1000 10 5 1 0 9 0\n"})
    assert limited_room(root) == GIB - 1000 * resource.getpagesize()


@linux_only
def test_what_is_available_is_the_least_of_all(monkeypatch: pytest.MonkeyPatch):
    for room, available in ((12_345, 12_345), (0, 1)):  # 0 would mean unknown
        monkeypatch.setattr(memory, "limited_room", lambda room=room: room)
        assert memory.host_available_nbytes() == available


@linux_only
def test_a_real_ulimit_is_seen():
    script = "from qchat.core.machine.memory import host_available_nbytes; print(host_available_nbytes())"
    command = f"ulimit -v {GIB // 1024}; PYTHONPATH={ROOT / '.dev'} exec {sys.executable} -c '{script}'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < GIB
    assert limits.limited_room() is None or limits.limited_room() != int(done.stdout)
