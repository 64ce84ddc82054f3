"""The files of a chat's pictures: read when they are asked about, and found again by their digests.

What the engine does with a picture it reads for itself; this is for those who look at it.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.conversation.summary import ShownPicture
from ...core.errors import StoreError, UsageError
from ...core.vision.picture import read_picture_file

if TYPE_CHECKING:
    from ...core.storage.store import Store


class PictureFiles:
    """The files of one chat; its methods take a while, and any thread may call them."""

    def __init__(self, store: "Store | None"):
        self._store = store
        self._paths: dict[str, Path] = {}  # by digest, of the pictures that were asked about in this run

    def look(self, paths: Sequence[str]) -> tuple[ShownPicture, ...]:
        """Return the pictures in files, their tokens unknown, without those that cannot be read."""
        found = []
        for path in map(Path, paths):
            with suppress(UsageError):
                picture = read_picture_file(path)
                found.append(ShownPicture(picture.name, *picture.size, 0, picture.thumbnail, picture.digest))
                self._paths[picture.digest] = path
        return tuple(found)

    def read(self, digest: str, conversation: int | None) -> bytes | None:
        """Return the file of this digest, from its place or the conversation; None if it is gone."""
        path = self._paths.get(digest)
        with suppress(UsageError):
            if path is not None and (picture := read_picture_file(path)).digest == digest:
                return picture.data
        with suppress(StoreError):
            if self._store is not None and conversation is not None:
                return self._store.pictures(conversation, digest).get(digest)
        return None
