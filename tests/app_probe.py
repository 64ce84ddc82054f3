"""The app at a real terminal, and what it costs: `measure("paint"|"idle"|"reply")`.

Run as a program it is the app itself, which notes its figure in the file $QCHAT_PROBE and leaves.
"""

import asyncio
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUESTION = "Tell me everything about the history of Rome, its kings, its wars and its end."
TOKENS = 300
SETTLING_SECONDS, IDLE_SECONDS = 2.0, 5.0
LIMIT_SECONDS = 180
ONE_SHOT = ("-m", "qchat.tui", "-p", QUESTION, "--json", "--no-think", "--temperature", "0")


def measure(what: str) -> float:
    """Seconds of processor time until the first paint, share of a core when idle, or tokens/s of a reply.

    The window is wide enough for all panes.
    """
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 45, 160, 0, 0))
    with tempfile.TemporaryDirectory() as home:
        figure = Path(home) / "figure"
        process = subprocess.Popen(
            [sys.executable, __file__, what],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=_environment(home) | {"QCHAT_PROBE": str(figure)},
            start_new_session=True,
        )
        os.close(follower)
        threading.Thread(target=_drain, args=(leader,), daemon=True).start()
        process.wait(LIMIT_SECONDS)
        return float(figure.read_text())


def one_shot() -> float:
    """Tokens/s of the same reply without the app."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, *ONE_SHOT, "--max-tokens", str(TOKENS)]
        done = subprocess.run(
            command,
            env=_environment(home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            start_new_session=True,  # as the engine has; Linux shares processors between sessions first
        )
    return json.loads(done.stdout)["timings"]["decode_tokens_per_s"]


def _environment(home: str) -> dict[str, str]:
    folders = {f"XDG_{name}_HOME": home for name in ("CONFIG", "DATA", "STATE")}
    return {**os.environ, **folders, "PYTHONPATH": str(ROOT / ".dev"), "TERM": "xterm-256color"}


def _drain(leader: int) -> None:
    """Take what the app paints, as a terminal does; ends with an error when the app has."""
    try:
        while os.read(leader, 1 << 16):
            pass
    except OSError:
        os.close(leader)


# --- inside the app ---


def _run(what: str) -> int:
    from qchat.tui.cli import main as cli
    from qchat.tui.screens import app

    class Probed(app.QchatApp):
        def on_mount(self) -> None:
            self.call_after_refresh(self.probe)

        def probe(self) -> None:
            """Beside the app, whose messages must not wait for it."""
            self.probing = asyncio.create_task(self.note(time.process_time()))

        async def note(self, painted: float) -> None:
            figure = painted if what == "paint" else await (_idle if what == "idle" else _reply)(self.chat)
            Path(os.environ["QCHAT_PROBE"]).write_text(str(figure))
            await self.action_leave()

    app.QchatApp = Probed
    return cli.main([])


async def _loaded(chat) -> None:
    while chat.model is None or chat.busy:
        await asyncio.sleep(0.05)


async def _idle(chat) -> float:
    await _loaded(chat)
    await asyncio.sleep(SETTLING_SECONDS)
    before = time.process_time()
    await asyncio.sleep(IDLE_SECONDS)
    return (time.process_time() - before) / IDLE_SECONDS


async def _reply(chat) -> float:
    await _loaded(chat)
    await chat.send(QUESTION, max_new_tokens=TOKENS, temperature=0, enable_thinking=False)
    return chat.status.last.performance.decode_tokens_per_s


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / ".dev"))
    sys.exit(_run(sys.argv[1]))
