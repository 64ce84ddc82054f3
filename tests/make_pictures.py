"""Makes the README's pictures: the app itself on the model in the package, in nine states.

    PYTHONPATH=.dev:. python tests/make_pictures.py [FOLDER]     (tests/pictures by default)

Conversations, models and settings are kept in a temporary folder: nothing of the user's is seen or changed.
"""

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HOME = Path(tempfile.mkdtemp(prefix="qchat-pictures-"))
os.environ |= {
    "HOME": str(HOME),
    "XDG_DATA_HOME": str(HOME / "data"),
    "XDG_STATE_HOME": str(HOME / "state"),
    "XDG_CACHE_HOME": str(HOME / "cache"),
    "XDG_CONFIG_HOME": str(HOME / "config"),
    "COLORTERM": "truecolor",
    "TEXTUAL_ANIMATIONS": "none",
}

from textual.pilot import Pilot  # noqa: E402  after the environment is set

from qchat.core import BUILT_IN_MODEL, Store  # noqa: E402
from qchat.tui.chat.controller import Chat  # noqa: E402
from qchat.tui.chat.start import Beginning  # noqa: E402
from qchat.tui.screens.app import QchatApp  # noqa: E402
from qchat.tui.screens.chat import ChatScreen  # noqa: E402
from qchat.tui.user.history import History  # noqa: E402
from qchat.tui.user.keymap import Keymap  # noqa: E402
from qchat.tui.user.settings import Settings  # noqa: E402

SECONDS = 120
CAPITALS = ("What is the capital of France?", "What about Germany?", "And Japan?")


class DrivenApp:
    """The app as its user drives it."""

    def __init__(self, app: QchatApp, pilot: Pilot, folder: Path):
        assert isinstance(app.screen, ChatScreen)
        self.app, self.pilot, self.folder, self.screen = app, pilot, folder, app.screen
        self.chat = app.chat

    async def until(self, true: Callable[[], object]) -> None:
        end = asyncio.get_running_loop().time() + SECONDS
        while not true():
            if asyncio.get_running_loop().time() > end:
                raise TimeoutError(self.chat.status.phase)
            await asyncio.sleep(0.02)
        await self.pilot.pause()

    async def idle(self) -> None:
        await self.until(lambda: self.chat.status.phase == "idle" and not self.chat.busy)

    async def jobs(self) -> None:
        await self.until(lambda: all(job.state != "running" for job in self.chat.jobs))

    async def enter(self, line: str) -> None:
        self.screen.prompt.put(line)
        await self.pilot.press("enter")
        await self.pilot.pause()

    async def ask(self, text: str) -> None:
        turns = len(self.chat.state.turns)
        await self.enter(text)
        await self.until(lambda: len(self.chat.state.turns) > turns)
        await self.idle()

    async def photograph(self, name: str) -> None:
        await self.pilot.pause(0.3)
        svg = self.app.export_screenshot(title="qchat")
        svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # no font is fetched from elsewhere
        svg = svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, monospace")
        for path, shown in ((str(HOME), "~"), (str(BUILT_IN_MODEL.parents[1]), "qchat")):
            svg = svg.replace(path, shown)
        (self.folder / f"{name}.svg").write_text(svg, encoding="utf-8")
        print(name)


def make_app(size: tuple[int, int], **settings: object) -> tuple[QchatApp, tuple[int, int]]:
    options = Settings.load({"theme": "night", **settings})
    store = Store(HOME / "conversations.db")
    app = QchatApp(
        lambda view: Chat(view, settings=options, store=store),
        settings=options,
        keymap=Keymap(),
        history=History(),
        beginning=Beginning(str(BUILT_IN_MODEL)),
    )
    return app, size


async def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    app, size = make_app((100, 30), seed=7)
    async with app.run_test(size=size) as pilot:
        it = DrivenApp(app, pilot, folder)
        await it.idle()
        await it.enter("/think off")
        for question in CAPITALS:
            await it.ask(question)
        await it.enter("Tell me a short story about a lighthouse keeper and a whale.")
        await it.until(lambda: it.chat.status.answer_tokens > 60)
        await it.photograph("answering")
        it.chat.stop()
        await it.idle()
        await it.enter("/think on")
        await it.ask("What is 17 + 25?")
        await it.pilot.press("ctrl+o")
        await it.photograph("thought")
        await it.pilot.press("ctrl+o")
        await it.enter("/convert embedded -q --q-bits 4 --q-recipe unsloth")
        await it.until(lambda: it.chat.jobs)
        await it.jobs()
        await it.photograph("convert")
        await it.enter("/compare embedded embedded-unsloth-4bit What is the capital of Italy?")
        await it.until(lambda: len(it.chat.jobs) > 1)
        await it.jobs()
        await it.photograph("compare")
        await it.enter("/bench embedded embedded-unsloth-4bit --runs 1")
        await it.until(lambda: len(it.chat.jobs) > 2)
        await it.jobs()
        await it.idle()
        await it.photograph("bench")
        for name, key in (("models", "f2"), ("sessions", "f3"), ("help", "f1")):
            await it.pilot.press(key)
            await it.photograph(name)
            await it.pilot.press("escape")
        await it.chat.quit()
    app, size = make_app((60, 16), theme="day")
    async with app.run_test(size=size) as pilot:
        it = DrivenApp(app, pilot, folder)
        await it.idle()
        await it.ask("What is the capital of Japan?")
        await it.photograph("narrow")
        await it.chat.quit()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures"))
