"""The content of a message with pictures: text, and which pictures stand at which places in it.

A message keeps its content as one text; `images` beside it lists digest, grid and place of each picture.
Refuses pictures named by an address: nothing is fetched.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..quoting import quote_value
from ..text.template import IMAGE_PART
from ..vision.images import Images
from ..vision.picture import MAX_NBYTES, Picture, encode_png, read_picture_file
from ..vision.pixels import Grid
from ..vision.placement import PlacedPicture

DATA_URL, BASE64 = "data:", ";base64"
PICTURE_PARTS = ("image", "image_url", "input_image")
MAX_PICTURES = 64  # of one message

# a text, or a list of texts and parts: {"type": "text", "text": ...}, {"type": "image", "image": ...}
Content = str | Sequence[str | Mapping[str, Any]]
UserMessage = tuple[dict[str, Any], list[PlacedPicture]]
NOTHING: Mapping[str, Any] = {}


def read_content(
    content: Content, images: Images, tokens: int | None = None, *, files: bool = True
) -> tuple[dict[str, Any], list[PlacedPicture]]:
    """Return the `content` of a message, and its `images` if there are any, and its pictures.

    A picture is the path of a file, unless without `files`, its bytes, or an image of Pillow; or the data URL
    of an `image_url`. It gets at most `tokens` tokens. Raises UsageError, DoesNotFit.
    """
    if isinstance(content, str):
        return {"content": content}, []
    if not isinstance(content, Sequence):
        raise UsageError(f"the content is {quote_value(content)}, wanted text or a list of parts")
    text, found, pictures = "", [], []
    for part in content:
        if isinstance(part, str) or _is_text(part):
            text += part if isinstance(part, str) else part["text"]
            continue
        placed = images.place(read_picture(part, files=files), tokens)
        found.append(image_entry(placed, len(text)))
        pictures.append(placed)
    if len(found) > MAX_PICTURES:
        raise UsageError(f"the message has {len(found)} pictures; {MAX_PICTURES} are allowed")
    return {"content": text} | ({"images": found} if found else {}), pictures


def user_message(
    content: Content, images: Images, tokens: int | None, edited: Mapping[str, Any] = NOTHING
) -> UserMessage:
    """Return the user's message and its pictures; a text alone keeps those of the `edited` message.

    Raises as `read_content` does.
    """
    parts, pictures = read_content(content, images, tokens)
    if isinstance(content, str) and (kept := edited.get("images")):
        parts["images"] = [{**image, "at": min(image["at"], len(content))} for image in kept]
    return {"role": "user", **parts}, pictures


def with_pictures(text: str, paths: Sequence[Any] | None) -> Content:
    """Return what is asked: the text, after the pictures in the files at `paths`. Raises UsageError."""
    if not all(isinstance(path, str) for path in paths or ()):
        raise UsageError("images has a value that is not text, wanted a list of paths")
    return [*({"type": "image", "image": path} for path in paths), text] if paths else text


def read_messages(
    messages: Sequence[Mapping[str, Any]], images: Images, tokens: int | None = None
) -> tuple[list[Any], list[PlacedPicture]]:
    """Return messages of other programs with the pictures in their content placed, and those.

    None may be a file of this machine. Raises as `read_content` does, and UsageError for pictures of others
    than the user and tools.
    """
    read, pictures = [], []
    for message in messages:
        if isinstance(message, Mapping):
            message = {name: value for name, value in message.items() if name != "images"}
            if _shows_pictures(message.get("content")):
                if message.get("role") not in ("user", "tool"):
                    raise UsageError("only messages of the user and of tools can have pictures")
                parts, shown = read_content(message["content"], images, tokens, files=False)
                message, pictures = message | parts, [*pictures, *shown]
        read.append(message)
    return read, pictures


def _shows_pictures(content: Any) -> bool:
    """Whether a part of `content` is a picture, or would be if it were given."""
    parts = content if isinstance(content, list) else ()
    return any(
        isinstance(part, Mapping) and part.get("type", "image") in PICTURE_PARTS and _picture_value(part)
        for part in parts
    )


def take_pictures(messages: Sequence[Mapping[str, Any]], images: Images) -> list[PlacedPicture]:
    """Return the pictures of `messages`, which somebody holds. Raises UsageError for one that is missing."""
    return [
        images.placed(image["digest"], Grid(image["rows"], image["columns"]))
        for message in messages
        for image in message.get("images", ())
    ]


def image_entry(placed: PlacedPicture, at: int) -> dict[str, Any]:
    """Return what a message keeps of a picture that stands after `at` characters of its text."""
    return {
        "digest": placed.picture.digest,
        "name": placed.picture.name,
        "rows": placed.grid.rows,
        "columns": placed.grid.columns,
        "at": at,
    }


def with_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its pictures as parts of its content, as templates want it."""
    images = message.get("images")
    if not images:
        return dict(message)
    text, parts, begin = message["content"], [], 0
    for image in images:
        parts += [{"type": "text", "text": text[begin : image["at"]]}, dict(IMAGE_PART)]
        begin = image["at"]
    parts.append({"type": "text", "text": text[begin:]})
    kept = [part for part in parts if part != {"type": "text", "text": ""}]
    return {**{name: value for name, value in message.items() if name != "images"}, "content": kept}


def read_picture(part: Any, *, files: bool = True) -> Picture:
    """Return the picture of a content part, which may name one of the `files` here. Raises UsageError."""
    value = _picture_value(part) if isinstance(part, Mapping) else None
    if value is None:
        raise UsageError(f"only text parts and pictures can be read, found {part!r:.60}")
    if isinstance(value, bytes | bytearray):
        return Picture(bytes(value))
    if isinstance(value, str) and value.startswith(DATA_URL):
        return Picture(_decode_url(value))
    if isinstance(value, str | Path):
        if not files or part.get("type", "image") != "image" or "://" in str(value):
            raise UsageError(
                "a picture must come with the message, as a data URL in base64: nothing is fetched"
            )
        return read_picture_file(Path(value))
    if hasattr(value, "tobytes") and hasattr(value, "save"):
        return Picture(encode_png(value))
    raise UsageError(f"a picture is {type(value).__name__}, wanted a path, bytes or an image of Pillow")


def _picture_value(part: Mapping[str, Any]) -> Any:
    """Return what a part names as its picture; None for one that is no picture."""
    kind = part.get("type", "image")
    value = part.get("image" if kind == "image" else "image_url") if kind in PICTURE_PARTS else None
    return value.get("url") if isinstance(value, Mapping) else value


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type", "text") in ("text", "input_text")
        and isinstance(part.get("text"), str)
    )


def _decode_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(BASE64):
        raise UsageError("a picture's data URL must be in base64: data:image/png;base64,...")
    if len(data) > 2 * MAX_NBYTES:
        raise UsageError(f"a picture has more than {MAX_NBYTES:,} bytes")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"a picture's data URL is not base64: {error}") from error
