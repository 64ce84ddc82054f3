"""The runtime: load a model folder, hold a conversation with it. Names are imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import QchatError as QchatError
    from .session import Engine as Engine
    from .session import Reply as Reply
    from .session import Session as Session
    from .session import load_session as load_session

_HOMES = {
    "Engine": "session",
    "Reply": "session",
    "Session": "session",
    "load_session": "session",
    "QchatError": "errors",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"qchat.core has no {name}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
