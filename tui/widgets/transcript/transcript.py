"""The conversation: questions, thoughts, answers, tool calls, notes and reports, as they come and as kept.

Owns which blocks there are. `Reader` is what can be done with them, `BlockView` how they scroll and are
painted. Never imports screens or the app.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from ...text.report import Report
from .blocks import Answer, Block, Ending, Note, NoteKind, Question, Reported, Thought, Tools
from .reader import Reader

_FASTEST, _SLOWEST = 1 / 30, 0.5  # seconds between two flushes
_COST_SHARE = 10  # a flush that took t is followed by a pause of 10 t


class Transcript(Reader):
    """Events of a reply are taken in at once and shown at a rate that leaves the processor alone."""

    DEFAULT_CSS = """
    Transcript {
        overflow-x: hidden;
        overflow-y: scroll;
        scrollbar-size-vertical: 1;
    }
    """

    def __init__(
        self, measure: int = 100, *, clock: Callable[[], float] = time.monotonic, id: str | None = None
    ) -> None:
        super().__init__(measure, id)
        self._clock = clock
        self.conversation: Any = None
        self._turns: dict[int, Mapping[str, Any]] = {}
        self._replying = 0  # the turn that is being answered
        self._reply: list[Thought | Answer | Tools] = []
        self._flush_due = False
        self._cost = 0.0  # seconds of processor time of the last flush, painting included
        self._reports: dict[int, Reported] = {}
        self._keys = count(1)

    # whole conversations

    def show(self, state: Mapping[str, Any]) -> None:
        """A whole conversation in place of what is here; notes and reports of the same one stay."""
        self._end_reply()
        turns = {int(turn["number"]): turn for turn in state.get("turns") or ()}
        same = self.conversation in (None, state.get("conversation"))
        self.conversation = state.get("conversation")
        own: dict[int, list[Block]] = defaultdict(list)
        extras: dict[int, list[Block]] = defaultdict(list)
        for block in self.blocks if same else ():
            (extras if block.is_extra else own)[block.turn].append(block)
        blocks = extras.pop(0, [])
        for number, turn in turns.items():
            blocks += own[number] if self._turns.get(number) == turn and own[number] else blocks_of(turn)
            blocks += extras.pop(number, [])
        blocks += [block for rest in extras.values() for block in rest if isinstance(block, Reported)]
        with self.kept_in_place():
            self.follow = self.follow or not same
            self.replace_all(blocks)
        self._turns = turns

    def clear(self) -> None:
        """Nothing is left but the reports that are still to be updated, which come back when they are."""
        self.conversation = object()
        self.show({})

    # a turn

    def add_question(self, turn: Mapping[str, Any]) -> None:
        """A new turn; those with its number or a later one are gone. The end is followed from here on."""
        self._end_reply()
        number = int(turn.get("number", 0))
        with self.kept_in_place():
            self.replace_all([b for b in self.blocks if b.turn < number or b.is_extra])
            self._turns = {n: old for n, old in self._turns.items() if n < number}
            self.insert(len(self.blocks), Question(turn))
            self.follow = True

    def begin_answer(self, turn: Mapping[str, Any]) -> None:
        """The turn is being answered (again): what its reply was so far is gone."""
        self._end_reply()
        self._replying = int(turn.get("number", 0))
        self._turns.pop(self._replying, None)
        with self.kept_in_place():
            reply = [b for b in self._blocks_of_turn(self._replying) if not isinstance(b, Question)]
            self.replace_all([b for b in self.blocks if b not in reply])

    def feed(self, events: Sequence[Mapping[str, Any]]) -> None:
        """More of the reply: `thought`, `text`, `tooluse` and `notice` events; others say nothing here."""
        for event in events:
            match event.get("event"):
                case "thought":
                    self._block_for(Thought).feed(str(event.get("text", "")), int(event.get("tokens", 1)))
                case "text":
                    self._block_for(Answer).feed(str(event.get("text", "")))
                case "tooluse":
                    self._block_for(Tools).add(event)
                case "notice":
                    self.add_note(str(event.get("text", "")))
        if self._reply and not self._flush_due:
            self._flush_due = True
            self.set_timer(min(max(_COST_SHARE * self._cost, _FASTEST), _SLOWEST), self._flush)

    def end_answer(self, done: Mapping[str, Any], turn: Mapping[str, Any]) -> None:
        """The reply is complete: its own figures replace the running ones."""
        number, reply = self._replying or int(turn.get("number", 0)), self._reply
        self._end_reply()
        ending = ending_of(number, {**turn, **done})
        with self.kept_in_place():
            for block in reply:
                if isinstance(block, Thought):
                    block.end(turn)
                    self.changed(block)
            if ending is not None:
                self._insert(number, ending)
        self._turns[number] = turn

    def _block_for(self, kind: type) -> Any:
        """The block of the reply that takes events of this kind, made when the first one comes."""
        for block in self._reply:
            if isinstance(block, kind):
                return block
        if kind is Thought:
            block = Thought(self._replying, self._clock)
        else:
            block = Answer(self._replying, running=True) if kind is Answer else Tools(self._replying)
        with self.kept_in_place():
            for before in self._reply:
                if isinstance(before, Thought):
                    before.end()
                    self.changed(before)
            self._insert(self._replying, block)
        self._reply.append(block)
        return block

    def _flush(self) -> None:
        """Show what was fed; the time until it is painted decides when the next flush may come."""
        began = time.thread_time()
        self._flush_due = False
        with self.kept_in_place():
            for block in self._reply:
                block.flush()
                self.changed(block)
        self.call_after_refresh(self._note_cost, began)

    def _note_cost(self, began: float) -> None:
        self._cost = time.thread_time() - began

    def _end_reply(self) -> None:
        reply, self._reply, self._replying = self._reply, [], 0
        with self.kept_in_place():
            for block in reply:
                block.end()
                self.changed(block)

    # between turns

    def add_note(self, text: str, kind: NoteKind = "info") -> None:
        with self.kept_in_place():
            self.insert(len(self.blocks), Note(text, kind, self._last_turn))

    def add_report(self, report: Report) -> int:
        """Returns the key that `update_report` takes."""
        key = next(self._keys)
        self._reports[key] = Reported(report, self._last_turn)
        with self.kept_in_place():
            self.insert(len(self.blocks), self._reports[key])
        return key

    def update_report(self, key: int, report: Report) -> None:
        """Show `report` in the place of the one before; at the end, if that is no longer here."""
        block = self._reports[key]
        block.replace(report)
        with self.kept_in_place():
            if block in self.blocks:
                self.changed(block)
            else:
                self.insert(len(self.blocks), block)

    @property
    def _last_turn(self) -> int:
        return self._replying or max(self._turns, default=0)

    @property
    def busy(self) -> bool:
        return bool(self._reply) or super().busy

    def toggle_thoughts(self) -> None:
        """All open, or all folded (but for the last lines of one that goes on)."""
        for block in self.blocks:
            if isinstance(block, Thought) and block.opened is not None:
                block.opened = None
                block.forget()
        self.thoughts = "live" if self.thoughts == "open" else "open"

    # blocks

    def _blocks_of_turn(self, number: int) -> list[Block]:
        return [block for block in self.blocks if block.turn == number and not block.is_extra]

    def _insert(self, number: int, block: Block) -> None:
        """After all that belongs to the turn, before notes and reports that came in between."""
        own = self._blocks_of_turn(number)
        self.insert(self.index(own[-1]) + 1 if own else len(self.blocks), block)


def blocks_of(turn: Mapping[str, Any]) -> list[Block]:
    """All that a finished turn shows."""
    number = int(turn.get("number", 0))
    tools = Tools(number)
    for call in turn.get("tool_calls") or ():
        tools.add(call)
    parts = [Question(turn), Thought.of(turn), Answer(number, str(turn.get("answer", ""))), tools]
    ending = ending_of(number, turn)
    return [block for block in (*parts, *([ending] if ending else ())) if block.text]


def ending_of(number: int, turn: Mapping[str, Any]) -> Ending | None:
    reason = "full" if turn.get("context_full") else str(turn.get("finish_reason") or "stop")
    return Ending.of(number, reason, str(turn.get("detail") or ""))
