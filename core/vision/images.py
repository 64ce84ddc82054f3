"""The pictures of all conversations with one engine, and its vision tower, loaded with the first of them.

Knows a picture as long as somebody holds it. Refuses pictures for models without a tower, with several ranks,
and those for which the memory does not suffice, with numbers.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ..checkpoint.config import ModelConfig
from ..checkpoint.vision import VisionConfig
from ..errors import DoesNotFit, UsageError
from ..machine.backend import Policy, mx
from ..machine.device import device_free_nbytes
from .memory import tower_nbytes, transient_nbytes
from .picture import Picture
from .pixels import Grid, grid_of, patches
from .placement import (
    KEY_TOKENS,
    MISSING,
    MixedPrompt,
    PlacedPicture,
    find_stretches,
    has_images,
    image_ids,
    is_image,
)
from .settings import PixelSettings
from .tower import Rows, Tower

GB = 10**9


class Images:
    """What one model sees."""

    def __init__(self, folder: Path, config: ModelConfig, policy: Policy, *, shared: bool = False):
        """`shared` means a model of several ranks, which sees nothing."""
        self._folder, self._config, self._policy, self._shared = folder, config, policy, shared
        self._known: WeakValueDictionary[tuple[int, ...], PlacedPicture] = WeakValueDictionary()

    @cached_property
    def settings(self) -> PixelSettings:
        """How pictures are prepared. Raises UsageError for a model without a tower, ConfigError."""
        return PixelSettings.load(self._folder, self._sizes)

    @cached_property
    def pad_id(self) -> int:
        """The id that the template writes for a picture. Raises UsageError for a model that has none."""
        found = self._config.raw.get("image_token_id")
        if not isinstance(found, int) or not 0 <= found < self._config.vocab_size:
            raise UsageError("this model sees no pictures: its config.json names no image_token_id")
        return found

    @cached_property
    def _sizes(self) -> VisionConfig:
        if self._shared:
            raise UsageError("pictures do not work with several ranks: start qchat without --ranks")
        tower = VisionConfig.of(self._config)
        if tower is None:
            raise UsageError("this model sees no pictures: it has no vision tower")
        return tower

    @cached_property
    def _tower(self) -> Tower:
        return Tower.load(self._folder, self._config, self._policy.activations)

    def place(self, picture: Picture, tokens: int | None = None) -> PlacedPicture:
        """Prepare a picture for a prompt, with at most `tokens` tokens.

        Decodes a new one, so that a damaged file is refused before anything is read. Raises UsageError for
        one that cannot be read, DoesNotFit, ConfigError.
        """
        settings = self.settings.within(tokens)
        self.pad_id  # noqa: B018  refuses models without one
        grid = grid_of(picture, settings)
        if self._find(image_ids(picture.digest, grid, settings.digest)[:KEY_TOKENS]) is None:
            self._refuse_too_large(picture, grid)
            picture.decode()
        return self.place_again(picture, grid)

    def place_again(self, picture: Picture, grid: Grid) -> PlacedPicture:
        """Return a picture that was placed before, with the grid that it had."""
        ids = image_ids(picture.digest, grid, self.settings.digest)
        key = tuple(ids[:KEY_TOKENS])
        placed = self._known.get(key)
        if placed is None:
            placed = self._known[key] = PlacedPicture(picture, grid, ids)
        return placed

    def placed(self, digest: str, grid: Grid) -> PlacedPicture:
        """Return a picture that somebody holds. Raises UsageError for another."""
        found = self._known.get(tuple(image_ids(digest, grid, self.settings.digest)[:KEY_TOKENS]))
        if found is None:
            raise UsageError(MISSING)
        return found

    def picture_of(self, image: Mapping[str, Any]) -> Picture:
        """Return the picture of an entry of a message's `images`. Raises UsageError for a missing one."""
        return self.placed(image["digest"], Grid(image["rows"], image["columns"])).picture

    def mixed_prompt(self, ids: Sequence[int]) -> MixedPrompt | None:
        """Return a prompt with pictures as the network reads it; None if all of it is text.

        Raises UsageError for a picture that nobody holds any more.
        """
        if not has_images(ids):
            return None
        stretches = find_stretches(ids, self._find)
        return MixedPrompt(ids, stretches, self.pad_id, self._look)

    def _find(self, first: Sequence[int]) -> PlacedPicture | None:
        """Return the picture whose ids begin with `first`: KEY_TOKENS ids, or fewer at a prompt's end."""
        if len(first) == KEY_TOKENS:
            return self._known.get(tuple(first))
        return next((one for one in self._known.values() if one.ids[: len(first)] == list(first)), None)

    def without_pictures(self, ids: list[int]) -> list[int]:
        """Return `ids` with the template's own in place of those of pictures."""
        return [self.pad_id if is_image(id) else id for id in ids] if has_images(ids) else ids

    def _look(self, placed: PlacedPicture) -> Rows:
        """Compute the rows of a picture. Raises UsageError, WeightsError."""
        rows = self._tower(patches(placed.picture, placed.grid, self.settings), placed.grid)
        mx.eval(rows.embeddings, *rows.deepstack)
        mx.clear_cache()
        return rows

    def _refuse_too_large(self, picture: Picture, grid: Grid) -> None:
        weights = 0 if "_tower" in vars(self) else tower_nbytes(self._sizes)
        needed = weights + transient_nbytes(self._sizes, grid.tokens, self._policy.activations.size)
        free = device_free_nbytes()
        if free and needed > free:
            raise DoesNotFit(
                f"{picture.name} has {grid.tokens:,} tokens, for which {needed / GB:.1f} GB are needed and "
                f"{free / GB:.1f} GB are free: allow fewer with --image-tokens"
            )
