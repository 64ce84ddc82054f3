"""`/load` of an id in the app: asked, fetched by a real job with live progress, stopped, gone on with."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qchat.core.hub import cache as hubcache
from qchat.core.hub import library
from qchat.tui.chat.client import EngineClient
from tests.checkpoints import write_checkpoint
from tests.hub_server import Fault, Hub, Repo, point_to
from tests.run_async import run_async
from tests.tui.running_app import PLAY_SECONDS, Running, running

ID = "me/tiny"
PROGRESS = re.compile(r"━.* \d+%  0\.\d\d of 0\.\d\d GB")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    write_checkpoint(tmp_path / "tiny", shards=4)
    with Hub({ID: Repo.of(tmp_path / "tiny")}) as running_hub:
        point_to(running_hub.url, tmp_path / "hub", monkeypatch)
        for name, value in (
            ("ENDPOINT", running_hub.url),
            ("HUB_CACHE", str(tmp_path / "hub")),
            ("HUB_OFFLINE", "0"),
        ):
            monkeypatch.setenv(f"HF_{name}", value)  # for the job's process
        yield running_hub


def shown(it: Running) -> str:
    """The conversation as it is on the screen."""
    transcript = it.screen.transcript
    return "\n".join(transcript.render_line(y).text for y in range(transcript.size.height))


@pytest.mark.slow
def test_a_model_is_fetched_stopped_and_gone_on_with(server: Hub, tmp_path: Path):
    async def main() -> None:
        async with running(tmp_path) as it:
            await it.idle()
            it.chat.job_queue.client_factory = EngineClient  # jobs are real, the chat's engine is not
            server.faults.extend([None] * 4)  # config and index, asked for by the app and by the job
            server.always = Fault("slow", seconds=4.0)
            await it.say(f"/load {ID}")
            await it.until(lambda: len(it.app.screen_stack) > 1)
            await it.pilot.press("y")
            await it.until(lambda: it.chat.jobs and it.chat.jobs[-1].events)
            job = it.chat.jobs[-1]
            await it.until(lambda: job.events[-1].get("done", 0) > 30_000)
            await it.until(lambda: PROGRESS.search(shown(it)))
            await it.pilot.press("escape")
            await it.until(lambda: job.state == "cancelled")
            assert job.seconds < 60  # to the end it would take minutes
            with pytest.raises(library.ModelNotDownloaded, match="only partly downloaded"):
                library.find_model(ID)

            before, server.always = len(server.seen), None
            await it.say(f"/load {ID}")
            await it.until(lambda: len(it.app.screen_stack) > 1)
            await it.pilot.press("y")
            await it.until(lambda: len(it.engine.asked("load")) > 1)
            assert it.engine.asked("load")[-1]["model"] == str(library.find_model(ID))
            assert it.chat.jobs[-1].state == "done"
            again = [seen for seen in server.seen[before:] if seen.name.endswith(".safetensors")]
            assert any(seen.begin > 0 for seen in again)
            whole = sum(len(data) for data in server.repos[ID].files.values())
            assert sum(seen.sent for seen in again) < whole

    run_async(main(), PLAY_SECONDS)
    snapshot = hubcache.Repository(tmp_path / "hub", ID).find_snapshot("main")
    assert snapshot is not None
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == server.repos[ID].files


@pytest.mark.usefixtures("server")
def test_a_no_fetches_nothing(tmp_path: Path):
    async def main() -> None:
        async with running(tmp_path) as it:
            await it.idle()
            await it.say(f"/load {ID}")
            await it.until(lambda: len(it.app.screen_stack) > 1)
            await it.pilot.press("n")
            await it.until(lambda: ("error", f"{ID} was not downloaded") in it.said)

    run_async(main(), PLAY_SECONDS)
    assert not (tmp_path / "hub").exists()
