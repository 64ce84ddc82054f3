"""Request bodies: read up to a limit, parsed, and converted into the types of their fields.

Refuses what is too long, no JSON object, or of a wrong type, with the field's name. Fields that a body has
besides are ignored and named, never refused.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from ...core.machine.files import parse_json_value
from ...core.quoting import printable, shorten
from .errors import ClientGone, RequestError

MAX_BODY_NBYTES = 32 << 20
IGNORED_HEADER = "x-qchat-ignored"
MAX_IGNORED, MAX_NAME = 20, 60

Fields = TypeVar("Fields", bound=msgspec.Struct)


async def read_object(request: Request, limit: int = MAX_BODY_NBYTES) -> dict[str, Any]:
    """Return the JSON object in a request's body. Raises RequestError, ClientGone."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise RequestError(413, f"the body is longer than {limit >> 20} MiB", "body_too_long")
    except ClientDisconnect as error:
        raise ClientGone from error
    try:
        value = parse_json_value(bytes(body).decode())
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    except RecursionError as error:
        raise RequestError(400, "the request nests too deeply") from error
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {printable(str(error))}", "bad_json") from error
    if not isinstance(value, dict):
        raise RequestError(400, "the body is not a JSON object", "bad_json")
    return value


def read_fields(body: dict[str, Any], kind: type[Fields]) -> Fields:
    """Return the body as a `kind`; null means not given. Raises RequestError naming the field."""
    given = {name: value for name, value in body.items() if value is not None}
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        sentence, _, place = str(error).partition(" - at `$")
        name = place.rstrip("`").lstrip(".") or None
        where = f"{name}: " if name else ""
        raise RequestError(
            400, f"{where}{printable(sentence.replace('`', '').replace(' | null', ''))}", param=name
        ) from error


def ignored_fields(body: dict[str, Any], kind: type[msgspec.Struct]) -> list[str]:
    """Return the names of the body's fields that a `kind` does not have."""
    return [name for name in body if name not in kind.__struct_fields__]


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """Return the header that lists what was ignored, if anything was."""
    shown = [re.sub(r"[^!-~]", "?", shorten(name, MAX_NAME)) or "?" for name in names[:MAX_IGNORED]]
    more = [f"and {len(names) - MAX_IGNORED} more"] if len(names) > MAX_IGNORED else []
    return {IGNORED_HEADER: ", ".join([*shown, *more])} if names else {}
