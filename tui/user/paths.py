"""Where qchat keeps its files: the XDG base directories, also on macOS, readable by their owner only.

`QCHAT_CONFIG_DIR` moves settings and themes. Every function raises UsageError: where the user has no home,
where there is no such user, and where a folder cannot be made.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...core.errors import UsageError

SHIPPED_THEMES = Path(__file__).parents[2] / "themes"


def user_path(text: str | Path) -> Path:
    """A path as a user writes it, with ~ for a home, made absolute."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(f"{text} is no path: {error}") from error


def config_dir(env: Mapping[str, str] | None = None) -> Path:
    """Settings and the user's themes; not made here, since reading needs none."""
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
    """What the user would miss: conversations."""
    return _private(_base(os.environ, "XDG_DATA_HOME", ".local/share"))


def conversations_file() -> Path:
    return data_dir() / "conversations.db"


def state_dir() -> Path:
    """What survives a restart but would not be missed: history of prompts, logs."""
    return _private(_base(os.environ, "XDG_STATE_HOME", ".local/state"))


def cache_dir() -> Path:
    """What can be made again: measurements, saved states."""
    return _private(_base(os.environ, "XDG_CACHE_HOME", ".cache"))


def measurements_file() -> Path:
    """What was measured of models, by all parts of qchat."""
    return cache_dir() / "measurements.jsonl"


def make_config_dir() -> Path:
    """Its access rights stay where it is there already: it may be a part of something bigger."""
    return _made(config_dir())


def _base(env: Mapping[str, str], variable: str, default: str) -> Path:
    base = env.get(variable, "")
    # the specification has relative paths ignored
    return (Path(base) if Path(base).is_absolute() else user_path("~") / default) / "qchat"


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
