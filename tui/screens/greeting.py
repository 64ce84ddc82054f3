"""The empty conversation: the model, what else fits this machine, three things to try, the keys that matter.

Reads what it shows in a thread; the transcript paints its lines for as long as it has no blocks.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core import BUILT_IN_MODEL
from ...core.errors import QchatError
from ...core.hub.catalog import rank_models
from ...core.hub.library import Locations
from ..chat.conversations import when
from ..tasks.models import format_size, short_name
from ..text.figures import format_tokens
from ..text.markdown import Line, Span
from ..text.markdown.lines import lay, prefixed, width_of
from ..text.sanitise import cells, cut, printable
from ..user.keymap import Keymap
from ..widgets.hints import GAP
from ..widgets.transcript.transcript import Transcript

if TYPE_CHECKING:
    from ...core.storage.store import Store
    from ...core.worker.wire import ModelInfo
    from ..chat.controller import Chat

GB = 10**9
INDENT, WIDE_INDENT = 1, 4
LONGEST_TITLE = 40
EXAMPLES = (
    ("What is the capital of France?", ""),
    ("/bench    ", "measures how fast this model is here"),
    ("/convert  ", "makes a smaller variant; /compare puts two side by side"),
)


@dataclass(frozen=True)
class Surroundings:
    """What is known besides the model: the one to download, the memory, how many conversations, the last."""

    suggested: str = ""
    limit_nbytes: int = 0
    conversations: int = 0
    last: str = ""


def read_surroundings(places: Locations, store: "Store | None") -> Surroundings:
    """Read it from the disk; what cannot be read is left out."""
    from ...core.hub import library

    suggested, limit, earlier = "", 0, []
    try:
        best = next(iter(rank_models(library.list_published(places))), None)
        if best is not None and best.fit.fits:
            suggested, limit = f"{short_name(best.id)}, {format_size(best.nbytes)}", best.fit.limit_nbytes
        earlier = store.conversations(1000) if store else []
    except QchatError:
        pass
    last = f"{cut(printable(earlier[0].title), LONGEST_TITLE)}, {when(earlier[0].updated)}" if earlier else ""
    return Surroundings(suggested, limit, len(earlier), last)


@dataclass(frozen=True)
class Greeting:
    """What the empty conversation shows; `key` returns the key of an action."""

    model: "ModelInfo | None"
    around: Surroundings
    key: Callable[[str], str]

    def lines(self, width: int, height: int) -> list[Line]:
        """Return the lines, a little above the middle of `height` rows; the least important go first."""
        indent = WIDE_INDENT if width >= 80 else INDENT
        room = width - indent
        groups = [self._head(room), self._doors(room), self._examples(room), [self._keys(room)]]
        while len(groups) > 1 and sum(map(len, groups)) + len(groups) - 1 > height:
            del groups[-1 if len(groups) == 2 else -2]
        shown = [line for group in groups if group for line in (*group, Line(()))][:-1]
        above = max((height - len(shown)) // 3, 0)
        pad = Span(" " * indent, "", "")
        return [*[Line(())] * above, *(Line((pad, *line.spans)) for line in shown)][:height]

    def _head(self, width: int) -> list[Line]:
        if self.model is None:
            return [Line((Span("qchat", "title"),))]
        facts = (
            format_size(self.model.nbytes),
            f"{self.model.bits_per_weight:.1f} bits per weight",
            f"context of {format_tokens(self.model.context_limit)} tokens",
        )
        name = cut(printable(self.model.name), width)
        lines = [Line((Span(name, "title"),)), *lay([Span(" · ".join(facts), "info")], width)]
        if self.model.path == str(BUILT_IN_MODEL):
            toy = "A toy model to try the keys with: it makes things up."
            lines += lay([Span(toy, "warning")], width)
        return lines

    def _doors(self, width: int) -> list[Line]:
        entries = [(self.key("models"), "choose or download a model", "")]
        if self.around.suggested:
            best = f"best for this machine's {self.around.limit_nbytes / GB:.0f} GB: {self.around.suggested}"
            entries.append(("", best, "info"))
        if self.around.conversations:
            count = self.around.conversations
            earlier = f"{count:,} earlier conversations" if count > 1 else "an earlier conversation"
            entries.append((self.key("sessions"), f"{earlier}: {self.around.last}", ""))
        column = max(cells(key) for key, _, _ in entries) + GAP
        return [line for entry in entries for line in _entry(*entry, column, width)]

    def _examples(self, width: int) -> list[Line]:
        head = Line((Span("Try", "dim"),))
        shown = ((f"  {line}", cut(what, max(width - cells(line) - 2, 0))) for line, what in EXAMPLES)
        return [head, *(Line((Span(cut(line, width), "code"), Span(what, "info"))) for line, what in shown)]

    def _keys(self, width: int) -> Line:
        hints = [("/", "commands"), ("@", "attach a file"), (self.key("panes"), "panes"), ("?", "keys")]
        spans: list[Span] = []
        for key, label in hints:
            more = [Span(" " * GAP, "")] if spans else []
            more += [Span(key, "cap"), Span(f" {label}", "info")]
            if width_of((*spans, *more)) <= width:
                spans += more
        return Line(tuple(spans))


def _entry(key: str, text: str, style: str, column: int, width: int) -> list[Line]:
    """Return a key's cap, and in the column beside it what is behind it."""
    first = (Span(key, "cap"), Span(" " * (column - cells(key)), ""))
    lines = prefixed(lay([Span(text, style)], max(width - column, 8)), Span(""), Span(" " * column))
    return [Line((*first, *lines[0].spans)), *lines[1:]]


class Greeter:
    """Keeps the greeting of an empty transcript up to date."""

    def __init__(self, chat: "Chat", keymap: Keymap, transcript: Transcript):
        self._chat, self._keymap, self._transcript = chat, keymap, transcript
        self._around = Surroundings()

    async def read(self) -> None:
        """Learn what there is besides the model."""
        places = Locations.from_setting(self._chat.settings["models_dir"])
        self._around = await asyncio.to_thread(read_surroundings, places, self._chat.store)
        self.show()

    def show(self) -> None:
        self._transcript.greet_with(Greeting(self._chat.model, self._around, self._keymap.shown).lines)
