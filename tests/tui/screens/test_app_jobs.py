"""Jobs beside the chat in the app: how they fail and stop, and how they share memory and machine."""

from pathlib import Path
from typing import Any

import pytest

from qchat.tui.widgets.transcript.blocks import Reported
from tests.tui.fake_jobs import PROGRESS
from tests.tui.running_app import Running, chatting, quick_keys

__all__ = ["quick_keys"]
pytestmark = pytest.mark.usefixtures("quick_keys")

SLOW = {"method": "convert", "events": [PROGRESS] * 3000, "seconds": 0.02}


def block(it: Running) -> Reported:
    """The newest report, as a job's block."""
    return [one for one in it.screen.transcript.blocks if isinstance(one, Reported)][-1]


def rows(it: Running) -> list[str]:
    """What is on the screen of the conversation."""
    height = it.screen.transcript.size.height
    return [it.screen.transcript.render_line(y).text.strip() for y in range(height)]


# --- failures ---


@pytest.mark.parametrize("size", [(100, 30), (60, 16)])
@pytest.mark.parametrize("how", ["refused", "killed"])
def test_a_failed_job_is_red_whole_and_without_its_progress(tmp_path: Path, size: tuple[int, int], how: str):
    advice = "~/models/embedded-4bit exists: choose another folder, or replace it with --force at the end"
    error: dict[str, Any] = {"kind": "UsageError", "message": advice, "exit_code": 2}
    step = {"method": "convert", "events": [PROGRESS], **({"error": error} if how == "refused" else {})}
    if how == "killed":
        step["die"] = "SIGKILL"

    @chatting(tmp_path, step, size=size)
    async def check(it: Running) -> None:
        await it.say("/convert embedded")
        await it.until(lambda: it.chat.jobs and it.chat.jobs[0].state == "failed")
        await it.until(lambda: "failed" in block(it).text)
        await it.until(lambda: any(row.startswith("✖ convert") for row in rows(it)))
        shown = " ".join(rows(it))
        assert it.chat.jobs[0].error in " ".join(shown.split())
        assert "░" not in shown and "starting" not in shown and "25%" not in shown
        lines = block(it).lines(it.screen.transcript._look)
        assert {span.style for line in lines for span in line.spans} == {"bad"}


def test_a_cancelled_job_shows_no_progress_either(tmp_path: Path):
    @chatting(tmp_path, SLOW)
    async def check(it: Running) -> None:
        await it.say("/convert embedded")
        await it.until(lambda: "25%" in block(it).text)
        await it.say("/stop")
        await it.until(lambda: "cancelled" in block(it).text)
        assert "25%" not in block(it).text and "starting" not in block(it).text
