"""The empty conversation: what it greets with, how it fits every window, and that it leaves."""

from dataclasses import replace
from pathlib import Path

import pytest

from qchat.core import BUILT_IN_MODEL, Store
from qchat.tui.screens.greeting import Greeting, Surroundings, read_surroundings
from qchat.tui.text.markdown.lines import plain
from qchat.tui.text.sanitise import cells
from tests.tui.conversing import talk
from tests.tui.running_app import Running, chatting, quick_keys
from tests.tui.widgets.panes.pane_facts import MODEL

__all__ = ["quick_keys"]
pytestmark = pytest.mark.usefixtures("quick_keys")

AROUND = Surroundings("Qwen3.6-35B-A3B-UD-Q3_K_XL, 18.50 GB", 24 * 10**9, 9, "Merge sort, 14:02")


def lines_of(greeting: Greeting, width: int, height: int) -> list[str]:
    return [plain(line) for line in greeting.lines(width, height)]


def greeting(path: str = "/models/real") -> Greeting:
    return Greeting(replace(MODEL, path=path), AROUND, lambda action: f"<{action}>")


@pytest.mark.parametrize("width", [36, 56, 96, 140])
@pytest.mark.parametrize("height", [3, 8, 12, 24, 40])
def test_it_fits_every_window_and_names_the_model_first(width: int, height: int):
    lines = lines_of(greeting(), width, height)
    assert len(lines) <= height
    assert all(cells(line) <= width for line in lines)
    assert next(line for line in lines if line.strip()).strip() == MODEL.name


def test_a_roomy_window_says_what_fits_what_to_try_and_which_keys_matter():
    said = "\n".join(lines_of(greeting(), 96, 24))
    for part in (
        "best for this machine's 24 GB: Qwen3.6-35B-A3B-UD-Q3_K_XL, 18.50 GB",
        "9 earlier conversations: Merge sort, 14:02",
        "/bench",
        "/convert",
        "/ commands",
        "<panes> panes",
        "<models>",
    ):
        assert part in said
    assert "toy" not in said
    assert "toy" in "\n".join(lines_of(greeting(str(BUILT_IN_MODEL)), 96, 24))


def test_it_counts_earlier_conversations_and_does_without_a_store(tmp_path: Path):
    from qchat.core.hub.library import Locations

    store = Store(tmp_path / "conversations.db")
    places = Locations.from_setting([str(tmp_path)])
    assert read_surroundings(places, None).conversations == 0
    for question in ("one", "two"):
        talk(store, question, "answer")
    found = read_surroundings(places, store)
    assert found.conversations == 2 and found.last.startswith("two, ")


def test_it_stands_until_the_first_question_and_again_in_a_new_conversation(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        def shown() -> str:
            transcript = it.screen.transcript
            return "\n".join(transcript.render_line(y).text for y in range(transcript.size.height))

        await it.until(lambda: "What is the capital of France?" in shown())
        await it.ask("one")
        assert "What is the capital of France?" not in shown()
        await it.pilot.press("ctrl+n")
        await it.until(lambda: "What is the capital of France?" in shown())
