"""The files of saved states, and which conversations they serve.

A state is `NAME.safetensors`; `OWNER.list` names the states of one conversation, or of all requests to a
server, a line each. What begins alike shares states, and a state goes with the last list that names it.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..machine.files import write_whole

STATE, LIST = ".safetensors", ".list"
SERVED = "served"  # the owner of states of requests to a server
NAME = re.compile(r"[0-9a-f]{32}")


def state_path(folder: Path, name: str) -> Path:
    """Return the file of the state `name`."""
    return folder / f"{name}{STATE}"


def claim(folder: Path, owner: str, names: Iterable[str]) -> None:
    """Note that the states `names`, and no others, serve `owner`. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(folder / f"{owner}{LIST}", "".join(f"{name}\n" for name in names), mode=0o600)


def claimed(folder: Path, owner: str) -> list[str]:
    """Return the names of the states that serve `owner`."""
    with suppress(OSError, UnicodeDecodeError):
        return (folder / f"{owner}{LIST}").read_text().split()
    return []


def release(folder: Path, owner: str) -> None:
    """Erase what serves `owner` alone. Raises OSError after erasing the rest."""
    problem: OSError | None = None
    for path in [folder / f"{owner}{LIST}", *_without_owner(folder, but=owner)]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            problem = error
    if problem:
        raise problem


def _without_owner(folder: Path, but: str) -> Iterator[Path]:
    """Yield the states that serve nobody `but` one owner."""
    lists = [path.stem for path in folder.glob(f"*{LIST}") if path.stem != but]
    served = {name for owner in lists for name in claimed(folder, owner)}
    for path in folder.glob(f"*{STATE}"):
        if path.stem not in served and not path.name.startswith("."):
            yield path
