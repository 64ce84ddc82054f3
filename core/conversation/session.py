"""One conversation with one engine: a tree of turns, each of whose positions can be returned to.

Callers hand over messages; the session keeps the exact ids, decides what of them its live state or a snapshot
has read already, and reads only the rest. One reply at a time; what does not fit is refused beforehand.
What is said lies in a store as well, if there is one; a store that fails costs a notice, never a reply.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ..engine.engine import Engine
from ..errors import QchatError, UsageError
from ..events import Done, Event, Notice, Sync
from ..generation.reply_settings import ReplySettings
from ..generation.sampling import resolve
from ..storage.records import ConversationContent, stats_of, title_of
from ..storage.store import Store
from ..text.template import check_messages
from ..text.toolcalls import ToolCallParser
from .live_state import Live, limit_of
from .reopening import kept_options, rebuild
from .reply import PendingReply, sampling_of, switches_of
from .saved_states import DISK_BUDGET
from .shelf import Shelf
from .summary import explain, first_question, state_of
from .transcript import (
    Author,
    History,
    Input,
    Node,
    Output,
    Prompt,
    branch,
    calls_of,
    messages_of,
    next_number,
)
from .tree import Tree

__all__ = ["Engine", "Reply", "Session", "load_session"]

OPTIONS = ("history", "snapshot_budget", "context_limit", "quantized_kv", "tools", "store", "disk_budget")


@dataclass(frozen=True)
class Reply(Done):
    """A finished reply: the fields of `Done` under the name that `Session.send` returns."""


@dataclass(frozen=True)
class Turn:
    """What one reply cost: how its prompt was come by, and the counts of `Done`."""

    number: int
    sync: Sync
    prompt_tokens: int
    prefilled_tokens: int


def load_session(path: str | Path, system: str | None = None, **options: Any) -> "Session":
    """Load a model folder and begin a conversation; `options` are those of `Session`, settings among them.

    Raises ModelError for the folder, UsageError for a setting.
    """
    check_settings({name: value for name, value in options.items() if name not in OPTIONS})
    return Session(Engine.load(path), system, **options)


def check_settings(given: Mapping[str, Any]) -> None:
    """Raises UsageError for a name or a value that no reply could have."""
    ReplySettings.parse(given)
    resolve(sampling_of(dict(given)), {}, thinking=True)


class Session(Tree, Live):
    """A conversation. `ids` are the exact ids that the live state has read."""

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        *,
        history: History | None = None,
        snapshot_budget: int | None = None,
        context_limit: int | None = None,
        quantized_kv: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        store: Store | None = None,
        disk_budget: int = DISK_BUDGET,
        **defaults: Any,
    ):
        """`defaults` are settings for replies; budgets are in bytes, `context_limit` in tokens.

        `tools` are offered to the model, as the chat template takes them. With a `store` the conversation is
        kept there from its first question on, and live states beside it, within `disk_budget`. Raises
        UsageError for a setting, a history mode or a tool that cannot be.
        """
        Tree.__init__(self)
        Live.__init__(self, engine, snapshot_budget, quantized_kv=quantized_kv)
        self.system, self.defaults = system, defaults
        check_settings(defaults)
        self.author = Author(engine.template, engine.tokenizer)
        usual = "preserve" if engine.template.can_preserve_thinking else "strip"
        self._history: History = _checked_mode(history or usual)
        self.context_limit, refusals = limit_of(engine.model, context_limit, quantized=quantized_kv)
        self._notices = [*engine.notices, *refusals]
        self.tools = self._checked_tools(tools)
        self._disk_budget = disk_budget
        self.shelf = Shelf(engine, store, disk_budget, self._notices)
        self.closing_thought = False
        self._busy = False
        self.turns: list[Turn] = []
        self._disagreement: str | None = None

    @classmethod
    def reopen(cls, engine: Engine, store: Store, conversation: int, **options: Any) -> "Session":
        """Go on with a stored conversation, where its user was; `options` stand over what was stored of it.

        A saved live state is taken up; without one the next question reads everything. What is not as it was
        left becomes a `Notice` of the next reply. Raises StoreError for a conversation that is not there or
        damaged, TemplateError where its messages must be written anew and the template refuses them.
        """
        about, stored = store.conversation(conversation), store.nodes(conversation)
        session = cls(engine, store=store, **kept_options(about) | options)
        stock = rebuild(about, stored, engine, session._switches(session.defaults))
        session.nodes, session.leaf = stock.nodes, stock.leaf
        session._notices += stock.notices
        session.shelf = Shelf(engine, store, session._disk_budget, session._notices, conversation, stock)
        session._resume()
        return session

    # saying something

    def cancel(self) -> None:
        """Stop the reply asked for last at its next token or chunk; safe from signal handlers and threads."""
        self.cancelled = True

    def close_thought(self) -> None:
        """Have the open thought end at its next token, so that the answer begins; safe as `cancel` is."""
        self.closing_thought = True

    def send(self, text: str, **settings: Any) -> Reply:
        """Say `text` and wait for the whole reply. Raises as `stream` does."""
        *_, done = self.stream(text, **settings)
        if not isinstance(done, Done):
            raise TypeError("a reply ended without Done")
        return Reply(**{name: getattr(done, name) for name in Done.__dataclass_fields__})

    def stream(self, text: str, **settings: Any) -> Generator[Event]:
        """Say `text`; yields events and exactly one `Done`, the last.

        `settings` stand over the session's defaults. Raises UsageError for a setting or a second reply at
        once, TemplateError for messages the template refuses, ContextLengthExceeded before anything is
        computed.
        """
        return self._run(self._ask(self.leaf, [{"role": "user", "content": text}], settings))

    def answer_tools(self, results: Sequence[str], **settings: Any) -> Generator[Event]:
        """Hand the model the results of its last reply's tool calls, in their order; yields as `stream`.

        Raises UsageError where there are no calls, or not as many.
        """
        calls = len(calls_of(self.leaf.message)) if self.leaf else 0
        if not calls or isinstance(results, str) or len(results) != calls:
            raise UsageError(f"the last reply calls {calls} tools, and {len(results)} results were given")
        messages = [{"role": "tool", "content": result} for result in results]
        return self._run(self._ask(self.leaf, messages, settings))

    def retry(self, **settings: Any) -> Generator[Event]:
        """Answer the last question again, beside the reply that stands; yields as `stream`."""
        begun = time.perf_counter()
        node, given = self.last().parent, self.defaults | settings
        opener = self._author(node.parent, node.messages, given).opener
        return self._run(PendingReply(self, node, opener, given, begun))

    def edit(self, turn: int, text: str, **settings: Any) -> Generator[Event]:
        """Ask `text` in place of question `turn` (from 1), on a branch of its own; yields as `stream`."""
        node = self.question(turn)
        if not node.asks:
            raise UsageError(f"turn {turn} holds the results of tools, and no question that could be edited")
        messages = [*node.messages[:-1], {"role": "user", "content": text}]
        return self._run(self._ask(node.parent, messages, settings))

    def _ask(
        self, parent: Output | None, messages: list[dict[str, Any]], settings: dict[str, Any]
    ) -> PendingReply:
        begun, given = time.perf_counter(), self.defaults | settings
        node, opener = self._put(parent, messages, given)
        return PendingReply(self, node, opener, given, begun)

    def _put(
        self, parent: Output | None, messages: list[dict[str, Any]], given: Mapping[str, Any]
    ) -> tuple[Input, list[int]]:
        """The question's node, and the opener of the reply to it."""
        if parent is None and self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        prompt = self._author(parent, messages, given)
        return Input(parent, messages, prompt.ids, self._switches(given)), prompt.opener

    def _author(
        self, parent: Output | None, messages: list[dict[str, Any]], given: Mapping[str, Any]
    ) -> Prompt:
        self._refuse_if_busy()
        # here, so that a cancel between asking and the first event counts
        self.cancelled = self.closing_thought = False
        check_settings(given)
        return self.author.prompt(branch(parent), messages, self._switches(given))

    def _switches(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the chat template is told besides the messages."""
        switches = switches_of(self.engine, dict(given)) | {"preserve_thinking": self.history == "preserve"}
        return switches | ({"tools": self.tools} if self.tools else {})

    def _refuse_if_busy(self) -> None:
        if self._busy:
            raise UsageError("this session is answering already: wait for the reply or cancel it")

    def _run(self, reply: PendingReply) -> Generator[Event]:
        self._refuse_if_busy()
        if reply.came_after is not self.leaf:
            raise UsageError("the conversation went on after this reply was asked for: ask again")
        self._busy = True
        self.add(reply.node, reply.output)
        self.leaf = reply.output
        done = None
        try:
            self._save()
            self.shelf.begin(reply.output)
            yield from self._told()
            for event in reply.run():
                if isinstance(event, Sync):
                    self.turns.append(Turn(self.turn_of(reply.node), event, len(reply.prompt), 0))
                if isinstance(event, Done):
                    done = event
                    self._finish(reply, done)
                    yield from self._told()
                yield event
        finally:
            if done is None:
                self._finish(reply, None)

    def _finish(self, reply: PendingReply, done: Done | None) -> None:
        """The reply stands as it is: in the tree, in the store, in the snapshots."""
        output = reply.output
        reply.settle()
        self._busy = False
        if done:
            output.stats = stats_of(done)
        if reply.synced:
            self.turns[-1] = replace(self.turns[-1], prefilled_tokens=reply.read - reply.cached)
        self.shelf.finish(output, done)
        if not output.ids:  # nothing was said, so nothing was asked
            self.leaf = reply.came_after
            self.drop(output)
            self._save()
        elif self.history == "preserve" and self.ids and len(self.ids) == self.cache.length:
            self.keep("B", self.turn_of(output))

    def _told(self) -> Iterator[Notice]:
        while self._notices:
            yield Notice(self._notices.pop(0))

    # moving in the tree

    def undo(self) -> str:
        """Take the last question back, with its reply and what tools said to it; returns the question."""
        node = self.last().parent
        while node.parent and not node.asks:
            node = node.parent.parent
        self._go_to(node.parent)
        return node.text

    def fork(self, turn: int) -> None:
        """Go on from the reply to question `turn`; what came after stays on its own branch."""
        nodes = branch(self.leaf)
        node = nodes[nodes.index(self.question(turn)) + 1]
        self._go_to(node if isinstance(node, Output) else None)

    def switch(self, number: int) -> None:
        """Go to the reply with this node number, on whatever branch. Raises UsageError for an unknown one."""
        found = next((n for n in self.nodes if n.number == number and isinstance(n, Output)), None)
        if found is None:
            known = ", ".join(str(n.number) for n in self.branches()) or "none yet"
            raise UsageError(f"there is no reply {number}: branches end in {known}")
        self._go_to(found)

    def reset(self) -> None:
        """Begin a new conversation; of the old one only what is stored remains, its live state included.

        Raises DoesNotFit where that state cannot be written.
        """
        self._refuse_if_busy()
        try:
            self.save_state()
        finally:
            self.nodes, self.leaf, self.turns = [], None, []
            self.snapshots.clear()
            self.forget()
            self.shelf.forget()

    def prime(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> None:
        """Go on from a given history, which ends with an assistant's message; nothing is read yet.

        Raises TemplateError for messages of a wrong form, UsageError where the order is not question, reply.
        """
        given, waiting = self.defaults | settings, []
        nodes: list[Node] = []
        leaf = self.leaf
        for message in check_messages(messages):
            if message["role"] != "assistant":
                waiting.append(message)
                continue
            if not waiting:
                raise UsageError(
                    "a history to go on from alternates: the assistant speaks after somebody else"
                )
            thinking = bool(message.get("reasoning_content"))
            node, opener = self._put(leaf, waiting, given | {"enable_thinking": thinking})
            leaf = Output(node, opener, self.author.reply(node, opener, message, node.switches), message)
            leaf.stats = {"finish_reason": "stop"}
            nodes += [node, leaf]
            waiting = []
        if waiting:
            raise UsageError("a history to go on from ends with an assistant's message")
        self.add(*nodes)
        self._go_to(leaf)

    def set_system(self, system: str | None) -> None:
        """Speak on under another system message, on a branch of its own; the whole of it is read again."""
        self._refuse_if_busy()
        before, self.system = self.system, system
        nodes: list[Node] = []
        leaf: Output | None = None
        try:
            for output in (node for node in branch(self.leaf) if isinstance(node, Output)):
                question = [m for m in output.parent.messages if m["role"] != "system"]
                node, _ = self._put(leaf, question, self.defaults)
                leaf = replace(output, parent=node, number=next_number())
                nodes += [node, leaf]
        except QchatError:
            self.system = before
            raise
        self.add(*nodes)
        self._go_to(leaf)

    def _checked_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
        ToolCallParser(tools or ())
        if tools and "tools" not in self.engine.template.source:
            self._notices.append(
                "this model's chat template says nothing of tools, so the model will not know them"
            )
        return [dict(tool) for tool in tools or ()]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The current branch in the template's form."""
        own = messages_of(branch(self.leaf))
        return own or ([{"role": "system", "content": self.system}] if self.system else [])

    @property
    def history(self) -> History:
        """Whether later turns read earlier thoughts (`preserve`) or not (`strip`); may be changed."""
        return self._history

    @history.setter
    def history(self, mode: History) -> None:
        self._refuse_if_busy()
        self._history = _checked_mode(mode)
        self._save()

    def _go_to(self, leaf: Output | None) -> None:
        self._refuse_if_busy()
        self.leaf = leaf
        self._save()

    # what is read when

    def idle(self) -> Iterator[int]:
        """Read ahead, chunk by chunk, what the next question will need: in `strip` the answers without their
        thoughts. To be called while the user thinks, and left at any chunk."""
        if self.leaf is None or self._busy:
            return
        target = self._ahead(self.leaf)
        self.cancelled = False
        if self.sync(target).cached == len(target):
            return
        yield from self.read(target)
        if len(self.ids) == len(target):
            self.keep("B", self.turn_of(self.leaf))

    def _ahead(self, leaf: Output) -> list[int]:
        """The ids that whatever comes next begins with, be it results of the tools called or a question."""
        role = "tool" if calls_of(leaf.message) else "user"
        return self.author.ids(
            [*branch(leaf), Input(leaf, [{"role": role, "content": ""}], [])], self.history
        )

    def prompt_ids(self, text: str | None = None, **settings: Any) -> list[int]:
        """What the model has been told of this branch, or would be told if `text` were asked now; changes
        nothing. Raises as `stream` does."""
        told = self.author.ids(branch(self.leaf), self.history)
        if text is None:
            return told
        node, opener = self._put(self.leaf, [{"role": "user", "content": text}], self.defaults | settings)
        return [*self.author.ids(branch(node), self.history), *opener]

    def disagreement(self, node: Input) -> str | None:
        """Where the kept ids of the branch say something else than the template would write now; a sentence,
        the same one only once."""
        nodes = branch(node)
        found = self.author.disagreement(nodes, nodes[0].switches if isinstance(nodes[0], Input) else {})
        known, self._disagreement = self._disagreement, found
        if found is None or found == known:
            return None
        return f"the kept tokens differ from the template's rendering: {found}"

    def explain(self) -> dict[str, Any]:
        """What was reused and read again per turn and why, and every snapshot with its bytes."""
        return explain(self)

    def state(self) -> dict[str, Any]:
        """The conversation as plain JSON values: turns, branches, where it is kept."""
        return state_of(self)

    # what is kept on disk

    @property
    def conversation(self) -> int | None:
        """Its number in the store, once there is a question."""
        return self.shelf.conversation

    @property
    def title(self) -> str:
        """The user's title, else the beginning of the first question."""
        return self.shelf.title or title_of(first_question(self.nodes))

    def rename(self, title: str) -> None:
        """Raises StoreError where the store does not take it."""
        self.shelf.rename(title)

    def save_state(self) -> bool:
        """Write the live state beside the store, so that `reopen` need not read the conversation again; the
        longest kept one where the live one is nothing to go on from.

        False where there is nothing to save, or it exceeds the disk budget. Raises DoesNotFit where the disk
        does not take it.
        """
        self._refuse_if_busy()
        ahead = self._ahead(self.leaf) if self.leaf else []
        if self.ids and self.ids == ahead[: len(self.ids)]:
            return self.shelf.save_state(self.cache, self.ids)
        snapshot = self.snapshots.find(ahead)
        return snapshot is not None and self.shelf.save_state(snapshot.cache, ahead[: snapshot.length])

    def close(self) -> None:
        """`save_state`; the store stays open, for it is the caller's. Raises DoesNotFit."""
        self.save_state()

    def _save(self) -> None:
        settings = {"history": self.history, "tools": self.tools}
        about = ConversationContent(title=self.title, system=self.system or "", settings=settings)
        self.shelf.save(self.leaf, about)

    def _resume(self) -> None:
        """Take up the live state that was saved under this conversation, if it is this branch's."""
        found = self.shelf.load_state(quantized=self.quantized_kv) if self.leaf else None
        if self.leaf is None or found is None:
            return
        cache, ids = found
        if ids == self._ahead(self.leaf)[: len(ids)]:
            self.cache, self.ids = cache, ids
            self.keep("B", self.turn_of(self.leaf))


def _checked_mode(mode: Any) -> History:
    if mode not in get_args(History):
        raise UsageError(f"history is {mode!r}, wanted {' or '.join(get_args(History))}")
    return mode
