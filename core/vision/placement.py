"""Pictures in a prompt: the ids that stand for their tokens, and the positions of all tokens.

An image token's id is IMAGE_IDS or more and is drawn from the picture's content and grid, so equal ids mean
equal pictures wherever prompts are compared. Positions are those of transformers' `get_rope_index`: text
counts on, a token of a picture has its row and column beside the moment, and what follows continues after the
larger of them.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from ..errors import UsageError
from ..machine.backend import mx
from ..model.network import MixedTokens
from .picture import Picture
from .pixels import Grid
from .tower import Rows

IMAGE_IDS = 1 << 31
MISSING = "a picture of this conversation is missing: show it again in a new message"
KEY_TOKENS = 4  # the first ids by which a picture is found


def image_ids(digest: str, grid: Grid, settings: bytes) -> list[int]:
    """Return the ids of a picture's tokens; `settings` tells pixels normalised in other ways apart."""
    seed = f"{digest} {grid.rows} {grid.columns} ".encode() + settings
    drawn = array("I", hashlib.shake_128(seed).digest(4 * grid.tokens))
    return [IMAGE_IDS | id for id in drawn]


def has_images(ids: Sequence[int]) -> bool:
    """Whether any of `ids` stands for a part of a picture."""
    return max(ids, default=0) >= IMAGE_IDS and any(map(is_image, ids))


def count_images(ids: Sequence[int]) -> int:
    """Return how many of `ids` stand for a part of a picture."""
    return sum(map(is_image, ids)) if has_images(ids) else 0


def is_image(id: int) -> bool:
    """Whether `id` stands for a part of a picture."""
    return IMAGE_IDS <= id < 2 * IMAGE_IDS


def decode_with_images(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    """Return the text of `ids`, which `decode` gives, with each picture as its number of tokens."""
    stretches = ((shown, list(run)) for shown, run in groupby(ids, key=is_image))
    return "".join(f"[picture, {len(run):,} tokens]" if shown else decode(run) for shown, run in stretches)


@dataclass(frozen=True, eq=False)
class PlacedPicture:
    """A picture, its grid, and the ids of its tokens."""

    picture: Picture
    grid: Grid
    ids: list[int]


class Stretch(NamedTuple):
    """Tokens from `begin` to `end`, the first of them at `position`: text, or one picture."""

    begin: int
    end: int
    position: int
    placed: PlacedPicture | None = None

    @property
    def next_position(self) -> int:
        """The position of the token after the stretch."""
        if self.placed is None:
            return self.position + self.end - self.begin
        return self.position + max(self.placed.grid)

    def positions(self, begin: int, end: int) -> mx.array:
        """Return the positions [3, T] of the tokens from `begin` to `end`, which are in the stretch."""
        places = mx.arange(begin - self.begin, end - self.begin)
        if self.placed is None:
            return mx.broadcast_to(self.position + places, (3, end - begin))
        columns = self.placed.grid.columns
        axes = [mx.zeros_like(places), places // columns, places % columns]
        return self.position + mx.stack(axes)


def find_stretches(
    ids: Sequence[int], find: Callable[[Sequence[int]], PlacedPicture | None]
) -> list[Stretch]:
    """Divide a prompt into text and pictures; `find` returns the picture that ids begin with.

    The prompt may end within a picture. Raises UsageError for one that is unknown.
    """
    stretches: list[Stretch] = []
    begin = position = 0
    while begin < len(ids):
        end, placed = begin, None
        if is_image(ids[begin]):
            placed = find(ids[begin : begin + KEY_TOKENS])
            end = min(begin + (len(placed.ids) if placed else 0), len(ids))
            if placed is None or list(ids[begin:end]) != placed.ids[: end - begin]:
                raise UsageError(MISSING)
        else:
            while end < len(ids) and not is_image(ids[end]):
                end += 1
        stretches.append(Stretch(begin, end, position, placed))
        begin, position = end, stretches[-1].next_position
    return stretches


class MixedPrompt:
    """A prompt with pictures, read chunk by chunk; `look` computes a picture's rows."""

    def __init__(
        self, ids: Sequence[int], stretches: list[Stretch], pad: int, look: Callable[[PlacedPicture], Rows]
    ):
        self._ids, self._stretches, self._pad, self._look = ids, stretches, pad, look
        self._last: tuple[PlacedPicture, Rows] | None = None

    def chunk(self, begin: int, end: int) -> MixedTokens | None:
        """Return the tokens from `begin` to `end` as the network reads them; None if all are text."""
        parts = [s for s in self._stretches if s.begin < end and begin < s.end]
        if not any(part.placed for part in parts):
            return None
        bounds = [(max(part.begin, begin), min(part.end, end)) for part in parts]
        rows: list[Rows] = []
        places: list[int] = []
        for part, (first, last) in zip(parts, bounds, strict=True):
            if part.placed is not None:
                seen = self._rows(part.placed)
                cut = slice(first - part.begin, last - part.begin)
                rows.append(Rows(seen.embeddings[cut], tuple(deep[cut] for deep in seen.deepstack)))
                places += range(first - begin, last - begin)
        positions = [part.positions(*bound) for part, bound in zip(parts, bounds, strict=True)]
        last = parts[-1]
        next_position = last.next_position if last.placed else last.position + end - last.begin
        return MixedTokens(
            ids=mx.array([self._pad if is_image(id) else id for id in self._ids[begin:end]]),
            places=mx.array(places),
            embeddings=mx.concatenate([one.embeddings for one in rows]),
            deepstack=[
                mx.concatenate([*layer]) for layer in zip(*(one.deepstack for one in rows), strict=True)
            ],
            positions=mx.concatenate(positions, axis=1),
            shift=next_position - end,
        )

    def after(self, start: int) -> Callable[[int, int], MixedTokens | None]:
        """Return `chunk` with places counted from `start`."""
        return lambda begin, end: self.chunk(start + begin, start + end)

    def _rows(self, placed: PlacedPicture) -> Rows:
        """Return the rows of a picture; those of the last one are kept, as chunks may cut it."""
        if self._last is None or self._last[0] is not placed:
            self._last = placed, self._look(placed)
        return self._last[1]
