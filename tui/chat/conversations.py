"""Stored conversations by number, title and date, as users name them."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import QchatError, UsageError
from ...core.hub.names import model_name
from ..user.paths import conversations_file

if TYPE_CHECKING:
    from ...core import Store
    from ...core.hub.library import Locations
    from ...core.storage.records import Conversation

LATEST = "latest"
SEARCHED = 1000  # conversations whose titles are searched


def open_store() -> "Store":
    """Open the user's conversations. Raises StoreError."""
    from ...core import Store

    return Store(conversations_file())


def find(store: "Store", word: str) -> "Conversation":
    """Find a conversation by its number, by the beginning of its title, or as "latest".

    Raises UsageError if there is none or more than one, StoreError for an unknown number.
    """
    if word == LATEST:
        latest = store.latest()
        if latest is None:
            raise UsageError("there is no earlier conversation to go on with")
        return latest
    if word.removeprefix("#").isdecimal():
        return store.conversation(int(word.removeprefix("#")[:18]))
    named = [one for one in store.conversations(SEARCHED) if _begins(one.title, word)]
    if len(named) == 1:
        return named[0]
    if not named:
        raise UsageError(f"no conversation's title begins with {word!r:.60}; `qchat sessions` lists them")
    numbers = ", ".join(str(one.id) for one in named[:5])
    raise UsageError(f"{len(named)} conversations begin with {word!r:.60}: say which by number ({numbers})")


def model_of(conversation: "Conversation | None", places: "Locations") -> str | None:
    """Return the folder of the model that it was last held with here, if that is still on this machine.

    The folder may have moved within `places`. An imported conversation names none.
    """
    if conversation is None or conversation.imported or not conversation.model.folder:
        return None
    if Path(conversation.model.folder).is_dir():
        return conversation.model.folder
    from ...core.hub import library

    try:
        found = library.find_model(conversation.model.name, places)
    except QchatError:
        return None
    return str(found) if model_name(found.resolve()) == conversation.model.name else None


def describe_other_model(conversation: "Conversation | None", folder: Path) -> str:
    """Say that another model than the one in `folder` replied last; empty if none did, or it is unknown."""
    last, here = (conversation.model if conversation else None), model_name(folder.resolve())
    if conversation is None or last is None or last.name in ("", here):
        return ""
    why = ""
    if not conversation.imported and last.folder and not Path(last.folder).is_dir():
        why = ", which is no longer on this machine"
    held = "was imported; it was held" if conversation.imported else "was last held"
    return f"this conversation {held} with {last.name}{why}; {here} answers now"


def when(seconds: float, now: datetime | None = None) -> str:
    """Format a time as briefly as is clear: 14:02, yesterday, 3 Nov, 2025-11-03."""
    now = now or datetime.now()
    then = datetime.fromtimestamp(seconds)
    if then.date() == now.date():
        return f"{then:%H:%M}"
    if then.date() == now.date() - timedelta(days=1):
        return "yesterday"
    return f"{then.day} {then:%b}" if then.year == now.year else f"{then:%Y-%m-%d}"


def _begins(title: str, word: str) -> bool:
    return bool(word.strip()) and " ".join(title.split()).casefold().startswith(word.strip().casefold())
