"""Takes pictures of the app itself, on the model in the package, in all its states.

    PYTHONPATH=.dev:. python tests/make_pictures.py            the READMEs' pictures, into tests/pictures
    PYTHONPATH=.dev:. python tests/make_pictures.py FOLDER     all of them, into FOLDER

Conversations, models and settings are kept in a temporary folder: nothing of the user's is seen or changed.
The model in the package sees no pictures: what is said about those comes from the tests' scripted engine.
"""

import asyncio
import html
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HOME = Path(tempfile.mkdtemp(prefix="q"))
os.environ |= {
    "HOME": str(HOME),
    "XDG_DATA_HOME": str(HOME / "data"),
    "XDG_STATE_HOME": str(HOME / "state"),
    "XDG_CACHE_HOME": str(HOME / "cache"),
    "XDG_CONFIG_HOME": str(HOME / "config"),
    "COLORTERM": "truecolor",
    "TEXTUAL_ANIMATIONS": "none",
}

from PIL import Image, ImageDraw, ImageFilter  # noqa: E402  after the environment is set
from textual.pilot import Pilot  # noqa: E402

from qchat.core import BUILT_IN_MODEL, Store  # noqa: E402
from qchat.tui.chat.controller import Chat  # noqa: E402
from qchat.tui.chat.start import Beginning  # noqa: E402
from qchat.tui.screens.app import QchatApp  # noqa: E402
from qchat.tui.screens.chat import ChatScreen  # noqa: E402
from qchat.tui.user.history import History  # noqa: E402
from qchat.tui.user.keymap import Keymap  # noqa: E402
from qchat.tui.user.settings import Settings  # noqa: E402
from tests.tui.fake_engine import FakeEngine  # noqa: E402

SECONDS = 180
USUAL = (100, 30)
# the sizes at which a streaming answer is photographed
SIZES = {
    "panes-160x45": (160, 45),
    "panes": (120, 30),
    "answering": USUAL,
    "strip-60x16": (60, 16),
}
# the pictures that the READMEs show; empty for all
SHOWN = {
    *("first", "panes", "answering", "thought", "convert", "compare", "bench", "eval"),
    *("models", "sessions", "help", "palette", "narrow", "seeing"),
}
CAPITALS = ("What is the capital of France?", "What about Germany?", "And Japan?")


def shorten(svg: str, path: str, shown: str) -> str:
    """Show a path of this machine as `shown`, in texts that become narrower instead of being spaced out."""

    def shortened(match: re.Match[str]) -> str:
        before, length, after, text = match.groups()
        less = text.count(path) * (len(path) - len(shown)) / len(html.unescape(text))
        width = float(length) * (1 - less)
        return f'{before}textLength="{width:.1f}"{after}>{text.replace(path, shown)}</text>'

    texts = re.compile(r'(<text [^>]*?)textLength="([\d.]+)"([^>]*)>([^<]+)</text>')
    return texts.sub(lambda match: shortened(match) if path in match[4] else match[0], svg)


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

    async def begin(self, text: str) -> None:
        """Ask without waiting for the answer."""
        turns = len(self.chat.state.turns)
        await self.enter(text)
        await self.until(lambda: self.chat.busy or len(self.chat.state.turns) > turns)

    async def resize(self, width: int, height: int) -> None:
        await self.pilot.resize_terminal(width, height)
        await self.pilot.pause()

    async def photograph(self, name: str) -> None:
        if SHOWN and name not in SHOWN:
            return
        await self.pilot.pause(0.3)
        svg = self.app.export_screenshot(title="qchat")
        svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # no font is fetched from elsewhere
        svg = svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, monospace")
        for path, shown in ((str(HOME), "~"), (str(BUILT_IN_MODEL.parents[1]), "qchat")):
            svg = shorten(svg, path, shown)
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


class Album:
    """The scenes, each of which leaves the app as the next one needs it."""

    def __init__(self, it: DrivenApp):
        self.it = it

    async def first_screen(self) -> None:
        await self.it.photograph("first")

    async def answering(self) -> None:
        """Stream a story at every breakpoint of the panes, and open its thoughts and branches."""
        it = self.it
        await it.enter("/think off")
        for question in CAPITALS:
            await it.ask(question)
        for name, size in SIZES.items():
            await it.resize(*size)
            await it.begin("Tell me a short story about a lighthouse keeper and a whale.")
            await it.until(lambda: it.chat.status.answer_tokens > 60)
            await it.photograph(name)
            it.chat.stop()
            await it.idle()
            await it.enter("/undo")
            await it.idle()
        await it.resize(*USUAL)

    async def thinking(self) -> None:
        it = self.it
        await it.enter("/think on")
        await it.resize(160, 45)
        await it.begin("What is 17 + 25?")
        await it.until(lambda: it.chat.status.phase != "thinking" and it.chat.status.thought_tokens)
        await it.photograph("thinking")
        await it.idle()
        await it.resize(*USUAL)
        await it.pilot.press("ctrl+o")
        await it.photograph("thought")
        await it.pilot.press("ctrl+o")

    async def branches(self) -> None:
        it = self.it
        await it.resize(140, 40)
        for question in ("/edit 2 What about Spain?", "/edit 2 What about Italy?", "/retry"):
            await it.enter(question)
            await it.idle()
        await it.photograph("branches")
        await it.resize(*USUAL)

    async def jobs(self) -> None:
        it = self.it
        lines = {
            "convert": "/convert embedded -q --q-bits 4 --q-recipe unsloth",
            "compare": "/compare embedded embedded-unsloth-4bit What is the capital of Italy?",
            "bench": "/bench embedded embedded-unsloth-4bit --runs 1",
            "eval": "/eval embedded-unsloth-4bit --reference embedded --flips 2",
            "failed": "/convert embedded -q --q-bits 4 --q-recipe unsloth",
        }
        for number, (name, line) in enumerate(lines.items()):
            await it.enter(line)
            await it.until(lambda number=number: len(it.chat.jobs) > number)
            if name == "eval":
                await it.until(lambda: any("done" in event for event in it.chat.jobs[-1].events))
                await it.photograph("eval-running")
            await it.jobs()
            await it.idle()
            await it.photograph(name)

    async def screens(self) -> None:
        it = self.it
        for name, key in (("models", "f2"), ("sessions", "f3"), ("help", "f1"), ("palette", "ctrl+p")):
            await it.pilot.press(key)
            if name == "palette":
                await it.pilot.press(*"mod")
            await it.photograph(name)
            while it.app.screen is not it.screen:  # the first one may only empty a filter
                await it.pilot.press("escape")
        await it.enter("/convert")
        await it.photograph("form")
        await it.pilot.press("escape")

    async def themes(self) -> None:
        it = self.it
        await it.resize(120, 30)
        for theme in ("day", "contrast", "terminal"):
            await it.enter(f"/theme {theme}")
            await it.photograph(f"theme-{theme}")
        await it.enter("/theme night")


async def narrow(folder: Path) -> None:
    app, size = make_app((60, 16), theme="day")
    async with app.run_test(size=size) as pilot:
        it = DrivenApp(app, pilot, folder)
        await it.idle()
        await it.ask("What is the capital of Japan?")
        await it.photograph("narrow")
        await it.chat.quit()


async def seeing(folder: Path) -> None:
    """Ask about two pictures, on a scripted engine."""
    os.chdir(HOME)
    draw_house(HOME / "house.png")
    draw_moon(HOME / "moon.jpg")
    answers = (
        "A house with a **red roof** stands before two green hills, under a low sun.",
        "Both have one bright disc in the sky. `house.png` shows it by day, `moon.jpg` by night, over water.",
    )
    engine = FakeEngine(HOME, *({"method": "send", "answer": answer} for answer in answers))
    options = Settings.load({"theme": "night", "panes": False})
    app = QchatApp(
        lambda view: Chat(view, engine.client, settings=options),
        settings=options,
        beginning=Beginning("/models/Qwen3.5-4B-UD-Q4_K_XL-mlx"),
    )
    async with app.run_test(size=(100, 34)) as pilot:
        it = DrivenApp(app, pilot, folder)
        await it.idle()
        await it.ask("@house.png What is in this picture?")
        await it.ask("@moon.jpg And what do both have in common?")
        await it.photograph("seeing")
        await it.chat.quit()


def draw_house(path: Path) -> None:
    image = Image.new("RGB", (640, 400), "#8ecae6")
    draw = ImageDraw.Draw(image)
    draw.ellipse((500, 40, 580, 120), fill="#ffd166")
    draw.ellipse((-200, 220, 360, 700), fill="#588157")
    draw.ellipse((240, 260, 900, 800), fill="#3a7d44")
    draw.rectangle((220, 190, 420, 340), fill="#f1e9da")
    draw.polygon([(190, 190), (320, 90), (450, 190)], fill="#c1440e")
    draw.rectangle((290, 250, 350, 340), fill="#6b4226")
    image.save(path)


def draw_moon(path: Path) -> None:
    image = Image.new("RGB", (640, 400), "#0b1d3a")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 270, 640, 400), fill="#12355b")
    draw.ellipse((270, 60, 390, 180), fill="#f4f1de")
    for row, width in enumerate((90, 130, 60, 110)):
        draw.rectangle((330 - width, 285 + 28 * row, 330 + width, 295 + 28 * row), fill="#c9d6df")
    image.filter(ImageFilter.GaussianBlur(6)).save(path, quality=92)


async def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    app, size = make_app(USUAL, seed=7)
    async with app.run_test(size=size) as pilot:
        it = DrivenApp(app, pilot, folder)
        await it.idle()
        album = Album(it)
        for scene in (
            album.first_screen,
            album.answering,
            album.thinking,
            album.branches,
            album.jobs,
            album.screens,
            album.themes,
        ):
            await scene()
        await it.chat.quit()
    await narrow(folder)
    await seeing(folder)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        SHOWN.clear()
    asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures"))
