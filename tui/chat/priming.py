"""A conversation for an engine that has none of it: its messages, with pictures anew from their files."""

import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.conversation.summary import Turn
from ...core.errors import QchatError
from .client import EngineDied
from .turns import messages_of
from .view import View


async def prime(
    request: Callable[..., Awaitable[Any]],
    turns: Sequence[Turn],
    pictures: Mapping[str, Sequence[str]],
    view: View,
) -> Any:
    """Give `turns` to the engine that answers `request`; `pictures` has the files that go with a question.

    Returns the result of the request. Where a file is gone, or the model sees no pictures, the view is told,
    and the text alone goes.
    """
    messages = messages_of(turns)
    try:
        shown = [_with_pictures(message, pictures) for message in messages]
        return await request("prime", messages=shown)
    except EngineDied:
        raise
    except (QchatError, OSError) as error:
        if not any(pictures.get(str(message["content"])) for message in messages):
            raise
        view.note(f"the conversation goes on without its pictures: {error}", "warning")
        return await request("prime", messages=messages)


def _with_pictures(message: dict[str, Any], pictures: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a question with its pictures as data URLs. Raises OSError for a file that is gone."""
    paths = pictures.get(message["content"], ()) if message["role"] == "user" else ()
    if not paths:
        return message
    files = [base64.b64encode(Path(path).read_bytes()).decode() for path in paths]
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/*;base64,{data}"}} for data in files]
    return {**message, "content": [*parts, {"type": "text", "text": message["content"]}]}
