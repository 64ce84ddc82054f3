"""Where qchat keeps its files: the XDG base directories, also on macOS, readable by their owner only."""

import os
from pathlib import Path


def state_dir() -> Path:
    """`$XDG_STATE_HOME/qchat`, made when missing. Raises OSError, or RuntimeError where there is no home."""
    base = os.environ.get("XDG_STATE_HOME", "")
    # the specification has relative paths ignored
    folder = (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state") / "qchat"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
