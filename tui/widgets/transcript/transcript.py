"""The conversation as blocks, while replies come and afterwards: questions, thoughts, answers, tools, notes.

Owns the choice of blocks; `Reader` owns what users do with them, `BlockView` how they scroll and are painted.
Never imports screens or the app.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from ....core import events
from ....core.conversation.summary import ConversationState, ShownPicture, ToolCall, Turn
from ....core.events import CallEvent
from ...text.report import Report
from ...user.sequences import Graphics
from .blocks import (
    Answer,
    Block,
    Ending,
    ModelChange,
    Note,
    NoteKind,
    Question,
    Thought,
)
from .gallery import Gallery
from .reader import Reader
from .reports import Reported
from .scroll import Place
from .tool_blocks import Results, Tools

_FASTEST, _SLOWEST = 1 / 30, 0.5  # seconds between two flushes
_COST_SHARE = 10  # a flush that took t is followed by a pause of 10 t


class Transcript(Reader):
    """Shows a conversation; events of a reply are shown at a rate that spares the processor."""

    DEFAULT_CSS = """
    Transcript {
        overflow-x: hidden;
        overflow-y: scroll;
        scrollbar-size-vertical: 1;
    }
    """

    def __init__(
        self,
        measure: int = 100,
        *,
        clock: Callable[[], float] = time.monotonic,
        gallery: Gallery | None = None,
        id: str | None = None,
    ) -> None:
        super().__init__(measure, id)
        self._clock = clock
        self.gallery = gallery or Gallery(lambda _: None, lambda _: None)
        self._draw = self.gallery.draw
        self.conversation: int | None = None
        self._turns: dict[int, Turn] = {}
        self._replying = 0  # number of the turn that is being answered
        self._reply: list[Thought | Answer | Tools] = []
        self._flush_due = False
        self._cost = 0.0  # processor seconds of the last flush, painting included
        self.notes = 0  # how many were ever added
        self._reports: dict[int, Reported] = {}
        self._keys = count(1)

    # whole conversations

    def show(self, state: ConversationState) -> None:
        """Show a whole conversation; notes and reports of the same one stay."""
        self._end_reply()
        turns = {turn.number: turn for turn in state.turns}
        same = self.conversation in (None, state.conversation)
        self.conversation = state.conversation
        own: dict[int, list[Block]] = defaultdict(list)
        extras: dict[int, list[Block]] = defaultdict(list)
        for block in self.blocks if same else ():
            if not isinstance(block, ModelChange):
                (extras if block.is_extra else own)[block.turn].append(block)
        blocks, before = extras.pop(0, []), None
        for number, turn in turns.items():
            blocks += model_change(before, turn)
            before = turn
            blocks += own[number] if self._turns.get(number) == turn and own[number] else blocks_of(turn)
            blocks += extras.pop(number, [])
        blocks += [block for rest in extras.values() for block in rest if isinstance(block, Reported)]
        with self.kept_in_place():
            self.follow = self.follow or not same
            self.replace_all(blocks)
        self._turns = turns
        self.call_later(self._keep_pictures)  # a retry shows the question again at once

    # a turn

    def add_question(self, turn: Turn) -> None:
        """Show a new turn in place of those from its number on, and follow the end."""
        self._end_reply()
        number = turn.number
        with self.kept_in_place():
            self.replace_all([b for b in self.blocks if b.turn < number or b.is_extra])
            self._turns = {n: old for n, old in self._turns.items() if n < number}
            for block in (*model_change(self._turns.get(number - 1), turn), asked(turn)):
                self.insert(len(self.blocks), block)
            self.follow = True

    def begin_answer(self, turn: Turn) -> None:
        """Begin the turn's reply, in place of an earlier one."""
        self._end_reply()
        self._replying = turn.number
        self._turns.pop(self._replying, None)
        with self.kept_in_place():
            own = self._blocks_of_turn(self._replying)
            reply = [b for b in own if not isinstance(b, Question | ModelChange)]
            self.replace_all([b for b in self.blocks if b not in reply])

    def feed(self, batch: Sequence[CallEvent]) -> None:
        """Add more of the reply: thought, answer, tool calls and notices; ignore other events."""
        for event in batch:
            match event:
                case events.Thought(text, tokens):
                    self._block_for(Thought).feed(text, tokens)
                case events.Text(text):
                    self._block_for(Answer).feed(text)
                case events.ToolUse(name, arguments):
                    self._block_for(Tools).add(ToolCall(name, arguments))
                case events.Notice(text):
                    self.add_note(text)
        if self._reply and not self._flush_due:
            self._flush_due = True
            self.set_timer(min(max(_COST_SHARE * self._cost, _FASTEST), _SLOWEST), self._flush)

    def end_answer(self, done: events.Done, turn: Turn) -> None:
        """Complete the reply; its own figures replace the measured ones."""
        number, reply = self._replying or turn.number, self._reply
        self._end_reply()
        reason = "full" if done.context_full else done.finish_reason
        ending = Ending.of(number, reason, done.detail, said=bool(turn.answer or turn.tool_calls))
        with self.kept_in_place():
            for block in reply:
                if isinstance(block, Thought):
                    block.end(turn)
                    self.changed(block)
            if ending is not None:
                self._insert(number, ending)
            for block in self._blocks_of_turn(number):
                if isinstance(block, Question):  # only now it has its place among its siblings
                    block.update(turn)
                    self.changed(block)
        self._turns[number] = turn

    def _block_for(self, kind: type) -> Any:
        """Return the reply's block for events of this kind; make it for the first one."""
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
        """Show what was fed; the processor time that this takes decides when the next flush may come."""
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

    # pictures

    def show_pictures(self, turn: Turn) -> None:
        """Show the pictures of the question that is being answered."""
        if turn.number != self._replying:
            return
        with self.kept_in_place():
            for block in self._blocks_of_turn(turn.number):
                if isinstance(block, Question):
                    block.update(turn)
                    self.changed(block)

    def draw_pictures(self, graphics: Graphics | None, *, shown: bool) -> None:
        """Draw all pictures by `graphics` from now on, or in half blocks, or not at all unless `shown`."""
        self.gallery.use(graphics, shown=shown)
        self._redraw_pictures()

    def _redraw_pictures(self, digest: str = "") -> None:
        """Draw the picture of this `digest` anew, or all of them."""
        with self.kept_in_place():
            for question in self._questions:
                if any(digest in ("", picture.digest) for picture in question.pictures):
                    question.forget()
                    self.changed(question)

    @property
    def _questions(self) -> list[Question]:
        return [block for block in self.blocks if isinstance(block, Question)]

    def _settle(self, place: Place | None) -> None:
        """Settle, then send what came into sight."""
        super()._settle(place)
        questions = [block for block in self.in_sight if isinstance(block, Question)]
        for picture in self.gallery.take_unsent(one for block in questions for one in block.pictures):
            self.run_worker(self._send(picture))

    async def _send(self, picture: ShownPicture) -> None:
        png = await asyncio.to_thread(self.gallery.prepare, picture)
        if png:
            self.gallery.send(picture, png)
            self._redraw_pictures(picture.digest)

    def _keep_pictures(self) -> None:
        self.gallery.keep({picture.digest for question in self._questions for picture in question.pictures})

    # between turns

    def add_note(self, text: str, kind: NoteKind = "info") -> None:
        self.notes += 1
        with self.kept_in_place():
            self.insert(len(self.blocks), Note(text, kind, self._last_turn))

    def add_report(self, report: Report) -> int:
        """Show a report; return the key for `update_report`."""
        key = next(self._keys)
        self._reports[key] = Reported(report, self._last_turn)
        with self.kept_in_place():
            self.insert(len(self.blocks), self._reports[key])
        return key

    def add_kept(self, turn: int, when: str, report: Report) -> None:
        """Show a report that was kept with the conversation, folded, behind its turn."""
        block = Reported(report, min(turn, max(self._turns, default=0)), when)
        with self.kept_in_place():
            before = [one for one in self.blocks if one.turn <= block.turn]
            self.insert(self.index(before[-1]) + 1 if before else 0, block)

    def update_report(self, key: int, report: Report) -> None:
        """Show `report` in place of an earlier one, or at the end if that is gone."""
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
        """Open all thoughts, or fold them but for the last lines of a running one."""
        for block in self.blocks:
            if isinstance(block, Thought) and block.opened is not None:
                block.opened = None
                block.forget()
        self.thoughts = "live" if self.thoughts == "open" else "open"

    # blocks

    def _blocks_of_turn(self, number: int) -> list[Block]:
        return [block for block in self.blocks if block.turn == number and not block.is_extra]

    def _insert(self, number: int, block: Block) -> None:
        """Insert a block behind those of its turn and before later notes and reports."""
        own = self._blocks_of_turn(number)
        self.insert(self.index(own[-1]) + 1 if own else len(self.blocks), block)


def model_change(before: Turn | None, turn: Turn) -> list[Block]:
    """Return the rule between two turns that different models answered."""
    if before is None or turn.model_name in ("", before.model_name):
        return []
    return [ModelChange(turn.number, before.model_name, turn.model_name)]


def asked(turn: Turn) -> Question:
    """Return the block of what a reply answers: a question, or the results of tools."""
    return Results(turn) if turn.results else Question(turn)


def blocks_of(turn: Turn) -> list[Block]:
    """Return the blocks of a finished turn."""
    tools = Tools(turn.number)
    for call in turn.tool_calls:
        tools.add(call)
    ending = Ending.of(turn.number, turn.finish_reason, said=bool(turn.answer or turn.tool_calls))
    parts = [asked(turn), Thought.of(turn), Answer(turn.number, turn.answer), tools, ending]
    return [block for block in parts if block is not None and block.text]
