"""The folders of qchat's files: the XDG base directories, also on macOS, readable by their owner only.

`QCHAT_CONFIG_DIR` moves settings and themes. Every function raises UsageError where there is no home folder,
no such user, or a folder cannot be made.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...core.errors import UsageError
from ...core.machine.files import user_folder

SERVERS_FILE = ".mcp.json"  # of a project: the servers of tools that it suggests
SHIPPED_THEMES = Path(__file__).parents[2] / "themes"


def user_path(text: str | Path) -> Path:
    """Return a path that a user wrote, with ~ expanded, as an absolute one."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(f"{text} is no path: {error}") from error


def config_dir(env: Mapping[str, str] | None = None) -> Path:
    """Return the folder of the settings and the user's themes; reading needs none, so it is not made here."""
    env = os.environ if env is None else env
    own = env.get("QCHAT_CONFIG_DIR", "")
    return user_path(own) if own else _base(env, "XDG_CONFIG_HOME", ".config")


def config_file(env: Mapping[str, str] | None = None) -> Path:
    return config_dir(env) / "config.toml"


def theme_files(env: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield the files of the shipped themes, then of the user's."""
    for folder in (SHIPPED_THEMES, config_dir(env) / "themes"):
        yield from sorted(folder.glob("*.toml"))


def data_dir() -> Path:
    """Return the folder of data that cannot be replaced: conversations."""
    return _private(_base(os.environ, "XDG_DATA_HOME", ".local/share"))


def conversations_file() -> Path:
    return data_dir() / "conversations.db"


def state_dir() -> Path:
    """Return the folder of what survives restarts but can be lost: earlier prompts, the last crash."""
    return _private(_base(os.environ, "XDG_STATE_HOME", ".local/state"))


def cache_dir() -> Path:
    """Return the folder of what can be made again: measurements, compiled kernels."""
    return _private(_base(os.environ, "XDG_CACHE_HOME", ".cache"))


def measurements_file() -> Path:
    """Return the file of all measurements of models."""
    return cache_dir() / "measurements.jsonl"


def make_config_dir() -> Path:
    """Make the settings folder; one that exists keeps its access rights: other programs may use it."""
    return _made(config_dir())


def _base(env: Mapping[str, str], variable: str, default: str) -> Path:
    folder = user_folder(variable, default, env)
    if folder is None:
        raise UsageError(f"there is no home folder: set HOME or {variable}")
    return folder


def _private(folder: Path) -> Path:
    _made(folder)
    if folder.stat().st_mode & 0o077:  # another part, or the user, made it
        folder.chmod(0o700)
    return folder


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made: {error.strerror}") from error
    return folder
