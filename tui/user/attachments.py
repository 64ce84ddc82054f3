"""Files attached to a message: texts, named by `@path` in it or by /read, and pictures, named by `@path`.

Texts are limited in size, and UTF-8. Refuses, in one sentence, what is too large, unreadable or neither.
Opens only files that are named; pictures are left to the engine.
"""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ...core.errors import UsageError

MAX_FILE_NBYTES = 1 << 20
MAX_ALL_NBYTES = 4 << 20
MAX_SUGGESTIONS = 200
MAX_PATH = 4096
# an @ that begins a word, then a path, quoted where it has spaces
_MENTION = re.compile(r"""(?<!\S)@(?:"([^"\n]+)"|(\S+))""")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".heic", ".heif")
# what stands before a file's content in a message, as `with_files` appends it, but for the fence
_HEAD = re.compile(r"\n\n([^\n]+):\Z")
MAX_SEARCHED = 5_000  # entries of folders, for a name that begins no path
SKIPPED = ("node_modules", "__pycache__", "build", "dist", "target")
_TRAILING = ".,;:!?)]}'"


@dataclass(frozen=True)
class Attachment:
    """A text file's content and the name that the user gave it."""

    name: str
    text: str


def read(path: str, folder: Path) -> Attachment:
    """Read the file at `path`, relative to `folder`. Raises UsageError."""
    try:
        place = folder / Path(path).expanduser()
        if not place.is_file():
            raise UsageError(f"{path} cannot be attached: {_what_is(place)}")
        with place.open("rb") as file:
            data = file.read(MAX_FILE_NBYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_FILE_NBYTES:
        raise UsageError(f"{path} cannot be attached: it is larger than {MAX_FILE_NBYTES >> 20} MiB")
    return Attachment(path, _decode(data, path))


def find(text: str, folder: Path) -> list[str]:
    """Return the paths mentioned as `@path` in `text` that exist relative to `folder`, each once."""
    found = (_existing(match[1] or match[2], folder) for match in _MENTION.finditer(text))
    return list(dict.fromkeys(path for path in found if path))


def attach(text: str, folder: Path) -> str:
    """Return the message with the text files that it mentions. Raises UsageError."""
    return with_files(text, [read(path, folder) for path in find(text, folder) if not is_picture(path)])


def pictures(text: str, folder: Path) -> list[str]:
    """Return the pictures that `text` mentions, as whole paths."""
    return [str(folder / Path(path).expanduser()) for path in find(text, folder) if is_picture(path)]


def is_picture(path: str) -> bool:
    """Whether a file's name is that of a picture."""
    return path.lower().endswith(PICTURE_SUFFIXES)


def split_pictures(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the pictures among `paths`, and the others."""
    return [path for path in paths if is_picture(path)], [path for path in paths if not is_picture(path)]


def mention(path: str) -> str:
    """Return a path as a message mentions it."""
    return f'@"{path}"' if re.search(r"\s", path) else f"@{path}"


def pasted_picture(text: str, folder: Path) -> str | None:
    """Return the mention of a picture whose path was pasted or dropped on the terminal; None for other text.

    Terminals quote such paths, escape their spaces, or write them as file URLs.
    """
    if len(text) > MAX_PATH or "\n" in text.strip():
        return None
    try:
        words = shlex.split(text.strip())
    except ValueError:
        return None
    for path in (text.strip(), *words) if len(words) == 1 else (text.strip(),):
        path = unquote(urlsplit(path).path) if path.startswith("file://") else path
        if is_picture(path) and '"' not in path and _existing(path, folder) == path:
            return mention(path)
    return None


def with_files(text: str, attachments: Sequence[Attachment]) -> str:
    """Append each file under its name, in a fence that its content cannot close. Raises UsageError."""
    nbytes = sum(len(attachment.text.encode()) for attachment in attachments)
    if nbytes > MAX_ALL_NBYTES:
        raise UsageError(f"the attached files have {nbytes:,} bytes in all; {MAX_ALL_NBYTES:,} are allowed")
    return "\n\n".join([text, *map(_fenced, attachments)]) if attachments else text


def complete(prefix: str, folder: Path) -> list[str]:
    """Return paths that begin with `prefix`; folders end in a slash, `.` shows hidden ones."""
    tail = prefix.rpartition("/")[2]
    start = prefix[: len(prefix) - len(tail)]
    try:
        base = folder / Path(start).expanduser()
        with os.scandir(base) as entries:
            names = sorted(
                entry.name + "/" * entry.is_dir()
                for entry in entries
                if entry.name.lower().startswith(tail.lower()) and (tail or not entry.name.startswith("."))
            )
    except (OSError, ValueError, RuntimeError):
        return []
    found = [start + name for name in names[:MAX_SUGGESTIONS] if name.isprintable()]
    return found or (_below(tail, folder) if tail and not start else [])


def _below(letters: str, folder: Path) -> list[str]:
    """Return files below `folder` whose path has `letters` in this order, the shortest first."""
    wanted = re.compile(".*?".join(map(re.escape, letters)), re.IGNORECASE)
    found: list[str] = []
    for path in islice(_walk(folder), MAX_SEARCHED):
        relative = path.relative_to(folder).as_posix()
        if wanted.search(relative) and relative.isprintable():
            found.append(relative)
    return sorted(found, key=lambda one: (len(one), one))[:MAX_SUGGESTIONS]


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [one for one in sorted(folders) if not one.startswith(".") and one not in SKIPPED]
        yield from (Path(place, one) for one in sorted(files) if not one.startswith("."))


def missing(text: str, folder: Path) -> list[str]:
    """Return the words behind an @ in `text` that name no file or folder, each once."""
    words = (match[1] or match[2] for match in _MENTION.finditer(text))
    return list(dict.fromkeys(word.rstrip(_TRAILING) for word in words if not _existing(word, folder)))


@dataclass(frozen=True)
class Attached:
    """A file in a message that was sent: its name, and how long it is."""

    name: str
    lines: int
    characters: int


def split_attached(message: str) -> tuple[str, list[Attached]]:
    """Return what was typed of a message, and the files that follow it."""
    text, found = message.rstrip("\n"), []
    while (last := _last_file(text)) is not None:
        text, file = last
        found.insert(0, file)
    return (text, found) if found else (message, [])


def _last_file(text: str) -> tuple[str, Attached] | None:
    """Return the file at the end of `text`, and what is before it; its fence is longer than any inside."""
    end = text.rfind("\n")
    fence = text[end + 1 :]
    begin = text.rfind(f"\n{fence}", 0, max(end, 0))
    if len(fence) < 3 or set(fence) != {"`"} or begin < 0:
        return None
    opening, _, body = text[begin + 1 : end].partition("\n")
    line = text.rfind("\n", 0, begin)
    head = _HEAD.match(text[max(line - 1, 0) : begin])
    if head is None or "`" in opening.removeprefix(fence):
        return None
    return text[: line - 1], Attached(head[1], body.count("\n") + 1, len(body))


def _existing(path: str, folder: Path) -> str:
    for candidate in (path, path.rstrip(_TRAILING)):
        try:
            if candidate and (folder / Path(candidate).expanduser()).exists():
                return candidate
        except (OSError, ValueError, RuntimeError):
            return ""
    return ""


def _what_is(place: Path) -> str:
    if place.is_dir():
        return "it is a folder; name files, or a pattern with /read"
    return "it is not a regular file" if place.exists() else "there is no such file"


def _decode(data: bytes, path: str) -> str:
    if b"\0" in data:
        raise UsageError(f"{path} cannot be attached: it is not a text file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be attached: byte {error.start:,} is not UTF-8") from error


def _fenced(attachment: Attachment) -> str:
    runs = re.findall(r"^ *(`{3,})", attachment.text, re.MULTILINE)
    fence = "`" * (max(map(len, runs), default=2) + 1)
    suffix = Path(attachment.name).suffix.removeprefix(".")
    body = attachment.text if attachment.text.endswith("\n") else f"{attachment.text}\n"
    return f"{attachment.name}:\n{fence}{suffix}\n{body}{fence}"
