"""The escape sequences that reach the terminal's window, clipboard and links, and which terminals know them.

Returns text and writes nothing. Text of others is made printable, short and one line, so that nothing in it
can end a sequence or begin another.
"""

import base64
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TextIO

ESC, BELL = "\x1b", "\a"
TITLE_CHARACTERS, NOTICE_CHARACTERS = 80, 200
# XTerm's stack of titles; what does not know it ignores them
SAVE_TITLE, RESTORE_TITLE = f"{ESC}[22;0t", f"{ESC}[23;0t"
NO_PROGRESS, FAILED_PROGRESS, BUSY_PROGRESS = (f"{ESC}]9;4;{state};0{BELL}" for state in (0, 2, 3))
# where OSC 777 is the one for notifications; others know OSC 9, or neither
RXVT_LIKE = ("rxvt", "foot")
Notices = Literal["9", "777"]
# terminals that draw pictures in the cells of Kitty's protocol; what has another part of it draws only boxes
PICTURE_TERMS = ("xterm-kitty", "xterm-ghostty")
ASK_TMUX = "#{allow-passthrough} #{client_termname} #{client_termfeatures}"
TMUX_PASSES = ("1", "on", "all")  # 1 is that of tmux 3.3
TMUX_SECONDS = 2.0


@dataclass(frozen=True)
class Graphics:
    """How the terminal takes pictures: with 24-bit colours or else 256, and whether tmux stands before it."""

    truecolor: bool
    in_tmux: bool = False


def takes_sequences(stream: TextIO, env: Mapping[str, str] | None = None) -> bool:
    """Whether escape sequences may be written to `stream`: it is a terminal that is not dumb."""
    env = os.environ if env is None else env
    return stream.isatty() and env.get("TERM", "dumb") not in ("", "dumb")


def knows_progress(env: Mapping[str, str]) -> bool:
    """Whether the terminal shows OSC 9;4 as progress. Others may show it as a notification, or ring."""
    program = env.get("TERM_PROGRAM", "").lower()
    if program == "iterm.app":
        return _version(env) >= (3, 6)
    named = program in ("ghostty", "wezterm") or env.get("TERM") in ("xterm-ghostty", "xterm-kitty")
    return named or bool(env.get("WT_SESSION")) or env.get("ConEmuANSI") == "ON"


def kind_of_notices(env: Mapping[str, str]) -> Notices:
    """Return the number of the sequence for notifications here."""
    by_vte = bool(env.get("VTE_VERSION"))
    return "777" if by_vte or env.get("TERM", "").startswith(RXVT_LIKE) else "9"


def knows_pictures(env: Mapping[str, str]) -> bool:
    """Whether the terminal draws pictures in the cells of Kitty's protocol, and nothing stands before it."""
    if any(env.get(name) for name in ("TMUX", "STY", "ZELLIJ")):
        return False
    return env.get("TERM") in PICTURE_TERMS or env.get("TERM_PROGRAM", "").lower() == "ghostty"


def find_graphics(how: str, colours: str | None, env: Mapping[str, str]) -> Graphics | None:
    """Return the graphics to draw by for a value of the setting `pictures`; None for half blocks.

    `colours` is what the toolkit writes: "truecolor", "256" or less. Asks tmux, which takes a moment.
    """
    if how not in ("auto", "kitty") or colours not in ("truecolor", "256"):
        return None
    truecolor = colours == "truecolor"
    if env.get("TMUX"):
        return _graphics_behind_tmux(env, truecolor=truecolor)
    return Graphics(truecolor) if how == "kitty" or knows_pictures(env) else None


def _graphics_behind_tmux(env: Mapping[str, str], *, truecolor: bool) -> Graphics | None:
    """Return the graphics of the terminal around tmux, if tmux lets sequences pass."""
    command = ["tmux", "display-message", "-p", "-t", env.get("TMUX_PANE", ""), ASK_TMUX]
    try:
        told = subprocess.run(
            command, env=dict(env), capture_output=True, text=True, timeout=TMUX_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    passes, term, features = [*told.stdout.split(), "", "", ""][:3]
    if passes not in TMUX_PASSES or term not in PICTURE_TERMS:
        return None
    return Graphics(truecolor and "RGB" in features.split(","), in_tmux=True)


def title(text: str) -> str:
    """Set the title of window and tab."""
    return f"{ESC}]0;{_one_line(text, TITLE_CHARACTERS)}{BELL}"


def progress(share: float) -> str:
    """Show a share from 0 to 1 in the taskbar or the tab."""
    return f"{ESC}]9;4;1;{round(100 * min(max(share, 0.0), 1.0))}{BELL}"


def notification(text: str, kind: Notices) -> str:
    """Show a notification of the desktop, under the name of qchat."""
    text = _one_line(text, NOTICE_CHARACTERS)
    if kind == "777":
        return f"{ESC}]777;notify;qchat;{text.replace(';', ',')}{BELL}"
    return f"{ESC}]9;qchat: {text}{BELL}"  # a number first would be another command


def clipboard(text: str) -> str:
    """Put `text` into the terminal's clipboard."""
    return f"{ESC}]52;c;{base64.b64encode(text.encode(errors='replace')).decode()}{BELL}"


def link(text: str, address: str) -> str:
    """Return `text` as a link to a web address that is printable ASCII."""
    return f"{ESC}]8;;{address}{ESC}\\{text}{ESC}]8;;{ESC}\\"


def _one_line(text: str, most: int) -> str:
    """Return `text` in one line of at most so many characters; those that are not printable become spaces."""
    line = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _version(env: Mapping[str, str]) -> tuple[int, ...]:
    parts = env.get("TERM_PROGRAM_VERSION", "").split(".")
    return tuple(int(part) if part.isdecimal() else 0 for part in parts)
