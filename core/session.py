"""One conversation with one engine: a tree of turns, each of whose positions can be returned to.

Callers hand over messages; the session keeps the exact ids, decides what of them its live state or a snapshot
has read already, and reads only the rest. One reply at a time; what does not fit is refused beforehand.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .backend import mx
from .chat import check_messages
from .engine import Engine
from .errors import StoreError, UsageError
from .events import Done, Event, Notice, Sync
from .generate import prefill
from .reply import PendingReply, sampling_of, switches_of
from .sampling import resolve
from .saved_states import SavedStates
from .settings import ReplySettings
from .snapshots import Kind, Snapshots
from .transcript import Author, History, Input, Node, Output, Prompt, branch, messages_of

__all__ = ["Engine", "Reply", "Session", "load_session"]


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


def load_session(path: str | Path, system: str | None = None, **defaults: Any) -> "Session":
    """Load a model folder and begin a conversation; `defaults` are settings for every reply.

    Raises ModelError for the folder, UsageError for a setting.
    """
    check_settings(defaults)
    return Session(Engine.load(path), system, **defaults)


def check_settings(given: dict[str, Any]) -> None:
    """Raises UsageError for a name or a value that no reply could have."""
    ReplySettings.parse(given)
    resolve(sampling_of(given), {}, thinking=True)


class Session:
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
        **defaults: Any,
    ):
        """`defaults` are settings for replies; `snapshot_budget` is in bytes, `context_limit` in tokens."""
        self.engine, self.system = engine, system
        self.defaults = defaults
        check_settings(defaults)
        self.author = Author(engine.template, engine.tokenizer)
        self.history: History = history or ("preserve" if engine.template.can_preserve_thinking else "strip")
        longest = engine.config.max_position_embeddings
        self.context_limit = min(context_limit or longest, longest)
        self.quantized_kv = quantized_kv
        self.snapshots = Snapshots(snapshot_budget)
        self.turns: list[Turn] = []
        self.cancelled = False
        self._busy = False
        self._notices = list(engine.notices)
        self._start()

    def _start(self) -> None:
        self.nodes: list[Node] = []
        self.leaf: Output | None = None
        self._first_switches: dict[str, Any] = {}
        self.snapshots.clear()
        self.forget()

    # saying something

    def cancel(self) -> None:
        """Stop the reply asked for last at its next token or chunk; safe from signal handlers and threads."""
        self.cancelled = True

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
        """Hand the model the results of its last reply's tool calls, in their order; yields as `stream`."""
        if self.leaf is None:
            raise UsageError("there is no reply whose tools could be answered")
        messages = [{"role": "tool", "content": result} for result in results]
        return self._run(self._ask(self.leaf, messages, settings))

    def retry(self, **settings: Any) -> Generator[Event]:
        """Answer the last question again, beside the reply that stands; yields as `stream`."""
        node = self._last().parent
        given = self.defaults | settings
        opener = self._author(branch(node.parent), node.messages, given).opener
        return self._run(PendingReply(self, node, opener, given))

    def edit(self, turn: int, text: str, **settings: Any) -> Generator[Event]:
        """Ask `text` in place of question `turn` (from 1), on a branch of its own; yields as `stream`."""
        node = self._input(turn)
        messages = [*node.messages[:-1], {"role": "user", "content": text}]
        return self._run(self._ask(node.parent, messages, settings))

    def _ask(
        self, parent: Output | None, messages: list[dict[str, Any]], settings: dict[str, Any]
    ) -> PendingReply:
        given = self.defaults | settings
        if parent is None and self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        prompt = self._author(branch(parent), messages, given)
        return PendingReply(self, Input(parent, messages, prompt.ids), prompt.opener, given)

    def _author(self, before: list[Node], messages: list[dict[str, Any]], given: dict[str, Any]) -> Prompt:
        self._refuse_if_busy()
        self.cancelled = False  # here, so that a cancel between asking and the first event counts
        check_settings(given)
        switches = switches_of(self.engine, given) | {"preserve_thinking": self.history == "preserve"}
        if not before:
            self._first_switches = switches
        return self.author.prompt(before, messages, switches)

    def _refuse_if_busy(self) -> None:
        if self._busy:
            raise UsageError("this session is answering already: wait for the reply or cancel it")

    def _run(self, reply: PendingReply) -> Generator[Event]:
        self._refuse_if_busy()
        if reply.came_after is not self.leaf:
            raise UsageError("the conversation went on after this reply was asked for: ask again")
        self._busy = True
        self._add(reply.node, reply.output)
        self.leaf = reply.output
        sync = None
        try:
            while self._notices:
                yield Notice(self._notices.pop(0))
            for event in reply.run():
                sync = event if isinstance(event, Sync) else sync
                yield event
        finally:
            reply.settle()
            self._busy = False
            if not reply.output.ids:  # nothing was said, so nothing was asked
                self.leaf = reply.came_after
                self.nodes = [n for n in self.nodes if n is not reply.output]
            if sync is not None:
                number, total = self._turn(reply.node), len(reply.prompt)
                self.turns.append(Turn(number, sync, total, total - sync.cached))
            if self.history == "preserve" and reply.output.ids and len(self.ids) == self.cache.length:
                self.keep("B")

    # moving in the tree

    def undo(self) -> str:
        """Take the last question and its reply back; returns the question."""
        node = self._last().parent
        self.leaf = node.parent
        return str(node.messages[-1]["content"])

    def fork(self, turn: int) -> None:
        """Go on from the reply to question `turn`; what came after stays on its own branch."""
        nodes = branch(self.leaf)
        node = nodes[nodes.index(self._input(turn)) + 1]
        self.leaf = node if isinstance(node, Output) else None

    def branches(self) -> list[Output]:
        """The last reply of every branch, in the order they were begun."""
        parents = {node.parent for node in self.nodes}
        return [n for n in self.nodes if isinstance(n, Output) and n not in parents]

    def switch(self, number: int) -> None:
        """Go to the reply with this node number, on whatever branch. Raises UsageError for an unknown one."""
        found = next((n for n in self.nodes if n.number == number and isinstance(n, Output)), None)
        if found is None:
            known = ", ".join(str(n.number) for n in self.branches()) or "none yet"
            raise UsageError(f"there is no reply {number}: branches end in {known}")
        self.leaf = found

    def reset(self) -> None:
        """Forget the conversation and every snapshot."""
        self._start()

    def prime(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> None:
        """Go on from a given history, which ends with an assistant's message; nothing is read yet.

        Raises TemplateError for messages of a wrong form, UsageError where the order is not question, reply.
        """
        given, waiting = self.defaults | settings, []
        for message in check_messages(messages):
            if message["role"] != "assistant":
                waiting.append(message)
                continue
            if not waiting:
                raise UsageError(
                    "a history to go on from alternates: the assistant speaks after somebody else"
                )
            thought = message.get("reasoning_content")
            reply = self._ask(self.leaf, waiting, given | {"enable_thinking": bool(thought)})
            reply.output.ids = self._written(message["content"], thought)
            reply.output.message = dict(message)
            self._add(reply.node, reply.output)
            self.leaf, waiting = reply.output, []
        if waiting:
            raise UsageError("a history to go on from ends with an assistant's message")

    def _written(self, content: str, thought: str | None) -> list[int]:
        """A reply that somebody wrote, as ids; its special tokens are text."""
        tokenizer = self.engine.tokenizer
        if not thought or tokenizer.think_close_id is None:
            return tokenizer.encode(content, special=False)
        inside = tokenizer.encode(f"{thought}\n", special=False)
        return [*inside, tokenizer.think_close_id, *tokenizer.encode(f"\n\n{content}", special=False)]

    def set_system(self, system: str | None) -> None:
        """Speak on under another system message, on a branch of its own; the whole of it is read again."""
        self.system = system
        nodes = branch(self.leaf)
        self.leaf = None
        for node in nodes:
            if isinstance(node, Input):
                question = [m for m in node.messages if m["role"] != "system"]
                new = self._ask(self.leaf, question, {}).node
            else:
                new = Output(self.nodes[-1], node.opener, node.ids, node.message)  # pyright: ignore
                self.leaf = new
            self._add(new)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The current branch in the template's form."""
        own = messages_of(branch(self.leaf))
        return own or ([{"role": "system", "content": self.system}] if self.system else [])

    def _add(self, *nodes: Node) -> None:
        self.nodes += [node for node in nodes if node not in self.nodes]

    def _last(self) -> Output:
        if self.leaf is None:
            raise UsageError("there is no question yet")
        return self.leaf

    def _input(self, turn: int) -> Input:
        asked = [node for node in branch(self.leaf) if isinstance(node, Input)]
        if not 1 <= turn <= len(asked):
            raise UsageError(f"there is no question {turn}: this branch has {len(asked)}")
        return asked[turn - 1]

    def _turn(self, node: Node) -> int:
        return sum(isinstance(n, Input) for n in branch(node))

    # the live state

    def sync(self, ids: Sequence[int]) -> Sync:
        """Make the live state one that has read a prefix of `ids`, the longest there is; says which."""
        snapshot = self.snapshots.find(ids)
        live = len(self.ids) if self.ids and list(ids[: len(self.ids)]) == self.ids else 0
        if live and (snapshot is None or snapshot.length <= live):
            return Sync("extend", live, "the live state goes on")
        if snapshot is None:
            why = "nothing was read yet" if not self.ids else "no kept state begins this prompt"
            self.forget()
            return Sync("rebuild", 0, why)
        self.cache, self.ids = snapshot.cache.copy(), list(ids[: snapshot.length])
        return Sync("restore", snapshot.length, f"state {snapshot.kind} of turn {snapshot.turn}")

    def read(self, ids: Sequence[int]) -> Iterator[int]:
        """Read what of `ids` the live state has not read, in chunks; yields how many are read."""
        start = len(self.ids)
        for done in prefill(self.engine.model, self.cache, ids[start:], lambda: self.cancelled):
            self.ids = list(ids[: start + done])
            yield start + done

    def idle(self) -> Iterator[int]:
        """Read ahead, chunk by chunk, what the next question will need: in `strip` the answers without their
        thoughts. To be called while the user thinks, and left at any chunk."""
        if self.leaf is None or self._busy:
            return
        pretended = Input(self.leaf, [{"role": "user", "content": ""}], [])
        target = self.author.ids(branch(pretended), self.history)
        self.cancelled = False
        if self.sync(target).cached == len(target):
            return
        yield from self.read(target)
        if len(self.ids) == len(target):
            self.keep("B")

    def forget(self) -> None:
        """Begin a live state that has read nothing."""
        self.cache, self.ids = self.engine.model.new_cache(quantized=self.quantized_kv), []

    def keep(self, kind: Kind) -> None:
        """Snapshot the live state."""
        self.snapshots.keep(self.cache, self.ids, self._turn(self.leaf) if self.leaf else 0, kind)

    def resume(self, states: SavedStates, name: str) -> bool:
        """Take the live state saved under `name`, if it is this branch's; else the next question reads again.

        A refused file becomes a `Notice` of the next reply.
        """
        try:
            found = states.load(name, quantized=self.quantized_kv)
        except StoreError as error:
            self._notices.append(f"{error}; the conversation is read again")
            return False
        written = self.author.ids(branch(self.leaf), self.history)
        if found is None or found[1] != written[: len(found[1])]:
            return False
        self.cache, self.ids = found
        return True

    def disagreement(self, node: Input) -> str | None:
        """Where the kept ids of the branch say something else than the template would write now."""
        return self.author.disagreement(branch(node), self._first_switches)

    def logits(self) -> mx.array:
        """Logits [V] float32 after the last of `ids`, from the live state and without changing it."""
        if self.cache.hidden is None:
            raise UsageError("nothing was read yet")
        return self.engine.model.logits(self.cache.hidden)[-1]

    def explain(self) -> dict[str, Any]:
        """What was reused and read again per turn and why, and every snapshot with its bytes."""
        return {
            "history": self.history,
            "turns": [
                {
                    "turn": turn.number,
                    "how": turn.sync.how,
                    "why": turn.sync.why,
                    "prompt_tokens": turn.prompt_tokens,
                    "cached_tokens": turn.sync.cached,
                    "prefilled_tokens": turn.prefilled_tokens,
                }
                for turn in self.turns
            ],
            "snapshots": [
                {"turn": s.turn, "kind": s.kind, "tokens": s.length, "state_nbytes": s.cache.state_nbytes}
                for s in self.snapshots
            ],
            "snapshot_nbytes": self.snapshots.nbytes,
            "snapshot_budget_nbytes": self.snapshots.budget_nbytes,
        }
