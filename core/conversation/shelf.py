"""Where a session is kept: its tree in a store, its live state in a file beside it. Without a store, nowhere.

What the store refuses becomes a notice, said once for as long as the reason stands: the conversation goes on,
and the next turn writes what is still missing.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

from ..engine.engine import Engine
from ..errors import StoreError
from ..events import Done
from ..model.cache import Cache
from ..storage.records import ConversationContent
from ..storage.store import Store
from .identity import identity_of
from .recorder import Recorder
from .reopening import Stock
from .saved_states import SavedStates
from .transcript import Output


class Shelf:
    """The kept side of one session; `notices` is a list that grows by what could not be kept."""

    def __init__(
        self,
        engine: Engine,
        store: Store | None,
        disk_budget: int,
        notices: list[str],
        conversation: int | None = None,
        stock: Stock | None = None,
    ):
        """`stock` is what the store holds of `conversation` already; live states take `disk_budget` bytes."""
        self._notices = notices
        self._named = ""
        self._trouble = ""
        self._recorder = self._states = None
        if store:
            found = stock or Stock()
            identity = identity_of(engine)
            self._recorder = Recorder(store, identity, conversation, found.places, found.changes)
            if not engine.model.shared:  # of a shared one's states only a part is here
                self._states = SavedStates(store.states_folder, engine, disk_budget)

    @property
    def conversation(self) -> int | None:
        return self._recorder.conversation if self._recorder else None

    @property
    def title(self) -> str:
        """The stored title, which others may have changed; empty where there is none."""
        if self._recorder and self._recorder.conversation is not None:
            with suppress(StoreError):
                return self._recorder.store.conversation(self._recorder.conversation).title
        return self._named

    def rename(self, title: str) -> None:
        """Raises StoreError."""
        self._named = title
        if self._recorder and self._recorder.conversation is not None:
            self._recorder.store.rename(self._recorder.conversation, title)

    def forget(self) -> None:
        """What comes next is another conversation."""
        self._named = ""
        if self._recorder:
            self._recorder.forget()

    # the tree

    def save(self, leaf: Output | None, about: ConversationContent) -> None:
        """Write what is missing of the branch to `leaf`."""
        self._write(lambda recorder: recorder.save(leaf, about))

    def begin(self, output: Output) -> None:
        self._write(lambda recorder: recorder.begin(output))

    def update(self, text: str, thought: str, ids: Sequence[int]) -> None:
        """The reply that was begun has got longer."""
        self._write(lambda recorder: recorder.update(text, thought, ids))

    def finish(self, output: Output, done: Done | None) -> None:
        self._write(lambda recorder: recorder.finish(output, done))

    def _write(self, action: Callable[[Recorder], None]) -> None:
        if self._recorder is None:
            return
        try:
            action(self._recorder)
        except StoreError as error:
            if str(error) != self._trouble:
                self._notices.append(f"this conversation is not being saved: {error}")
            self._trouble = str(error)

    # the live state

    def save_state(self, cache: Cache, ids: Sequence[int]) -> bool:
        """False where there is nothing to save, the conversation was deleted meanwhile, or the state exceeds
        the budget. Raises DoesNotFit."""
        recorder = self._recorder
        if self._states is None or recorder is None or recorder.conversation is None or cache.hidden is None:
            return False
        try:
            recorder.store.conversation(recorder.conversation)
        except StoreError:  # it is gone, and nothing would erase its state
            return False
        return self._states.save(str(recorder.conversation), cache, ids)

    def load_state(self, *, quantized: bool) -> tuple[Cache, list[int]] | None:
        """What `save_state` wrote last, unless it is missing, damaged or another model's."""
        if self._states is None or self.conversation is None:
            return None
        try:
            return self._states.load(str(self.conversation), quantized=quantized)
        except StoreError as error:
            self._notices.append(f"{error}; the conversation is read again")
            return None
