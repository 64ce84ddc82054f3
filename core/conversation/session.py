"""One conversation with one engine: a tree of turns, any of which can be continued.

Callers pass messages; the session keeps the exact ids, finds the longest prefix that its live state or a
snapshot has read, and reads only the rest. One reply at a time; a prompt that does not fit is refused before
anything is computed. With a store the conversation is recorded there; its errors never cost a reply.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..engine.engine import Engine
from ..errors import QchatError, UsageError
from ..events import Done, Event, Notice, Sync
from ..generation.reply_settings import ReplySettings
from ..prompt_cache.disk_tier import DISK_BUDGET
from ..prompt_cache.live_state import LiveState
from ..storage.records import make_title, reply_stats
from ..storage.store import Store
from ..text.messages import pair_messages
from ..text.template import check_messages
from .encoder import Encoder
from .offered_tools import check_results, check_tools, promised_tools, tools_notices
from .pictures import NOTHING, Content, UserMessage, read_messages, user_message
from .recorder import Recorder
from .reopening import rebuild_tree, stored_options
from .reply import PendingReply, Reply, ReplyContext, Signals, TurnCost
from .switches import branch_tools, ignored_effort
from .transcript import History, Input, Node, Output, branch, check_history, messages_of
from .tree import Tree, turn_number

OPTIONS = (
    *("history", "snapshot_budget", "context_limit", "quantized_kv", "tools", "constrain_calls"),
    *("store", "disk_budget", "live", "image_tokens"),
)


def load_session(path: str | Path, system: str | None = None, **options: Any) -> "Session":
    """Load a model folder and begin a conversation; `options` are those of `Session`, settings among them.

    Raises ModelError for the folder, UsageError for a setting.
    """
    ReplySettings.parse({name: value for name, value in options.items() if name not in OPTIONS})
    return Session(Engine.load(path), system, **options)


class Session:
    """A conversation: its `tree` of turns, the `recorder` that keeps them, and the engine's `live` state."""

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
        constrain_calls: bool = False,
        store: Store | None = None,
        disk_budget: int = DISK_BUDGET,
        live: LiveState | None = None,
        image_tokens: int | None = None,
        **defaults: Any,
    ):
        """Begin a conversation under the message `system`; `defaults` are settings for its replies.

        Budgets are in bytes, `context_limit` in tokens. `tools` are offered to the model in the template's
        form; with `constrain_calls` their arguments satisfy the schemas, where llguidance is installed. With
        a `store` the conversation is recorded from its first question on, and its states beside it within
        `disk_budget`. `live` is shared with other conversations, and then decides what is kept; by default
        the session has its own. A picture gets at most `image_tokens` tokens. Raises UsageError for an
        invalid setting, history mode or tool.
        """
        self.engine, self.system, self.defaults = engine, system, defaults
        self._default_settings = ReplySettings.parse(defaults)
        self.tree = Tree()
        self.live = live or LiveState(engine, snapshot_budget, quantized_kv=quantized_kv)
        if store and live is None:
            self.live.keep_on_disk(store.states_folder, disk_budget)
        self.encoder = Encoder(engine.template, engine.tokenizer, engine.images)
        self.image_tokens = image_tokens
        usual = "preserve" if engine.template.can_preserve_thinking else "strip"
        self._history: History = check_history(history or usual)
        self.context_limit, refusals = engine.context_limit(context_limit, quantized=quantized_kv)
        self._notices = [*engine.notices, *refusals]
        self._constrain_calls = constrain_calls
        self._offer(check_tools(tools))
        self.recorder = Recorder(engine, store, self._notices)
        self.signals = Signals()
        self.key = object()  # what the snapshots of this conversation are known by
        self.turns: list[TurnCost] = []
        self._busy = False
        self.reading_ahead = 0  # the tokens that `idle` is reading
        self._checked_leaf: Output | None = None
        self._disagreement: str | None = None

    @classmethod
    def reopen(cls, engine: Engine, store: Store, conversation: int, **options: Any) -> "Session":
        """Continue a stored conversation where its user left it; `options` override the stored ones.

        Restores a saved live state; without one the next question reads everything. What differs from the
        stored conversation becomes a `Notice` of the next reply. Raises StoreError for a conversation that
        is missing or damaged, TemplateError where its messages must be encoded again and are refused.
        """
        about, stored = store.conversation(conversation), store.nodes(conversation)
        session = cls(engine, store=store, **stored_options(about) | options)
        switches = session._switches(session._default_settings)
        found = rebuild_tree(about, stored, engine, switches, store.pictures(conversation))
        session.tree = Tree(found.nodes, found.leaf)
        session._notices += found.notices
        session.recorder = Recorder(engine, store, session._notices, conversation, found)
        if found.leaf:
            session.live.sync(session.encoder.ids_before_next(found.leaf, session.history))
        return session

    # replies

    def cancel(self, reason: str = "") -> None:
        """Stop the reply at its next token or prefill chunk; safe from signal handlers and threads.

        `Done` gives the `reason`.
        """
        self.signals.reason = reason
        self.signals.cancelled = True

    def close_thought(self) -> None:
        """End an open thought at its next token, so that the answer begins; safe as `cancel` is."""
        self.signals.close_thought = True

    def send(self, content: Content, /, **settings: Any) -> Reply:
        """Ask `content` and wait for the whole reply. Raises as `stream` does."""
        *_, done = self.stream(content, **settings)
        if not isinstance(done, Done):
            raise TypeError("a reply ended without Done")
        return Reply(**{name: getattr(done, name) for name in Done.__dataclass_fields__})

    def stream(self, content: Content, /, **settings: Any) -> Generator[Event]:
        """Ask `content`, a text or parts with pictures; yields events, and exactly one `Done` as the last.

        `settings` override the session's defaults. Raises UsageError for a setting or a second reply at
        once, TemplateError for messages the template refuses, ContextLengthExceeded before anything is
        computed.
        """
        message, _held = self._user_message(content)
        return self._run(self._ask(self.tree.leaf, [message], settings))

    def answer_tools(self, results: Sequence[str], /, **settings: Any) -> Generator[Event]:
        """Pass the results of the last reply's tool calls to the model, in their order; yields as `stream`.

        One more result may answer a call that could not be read. Raises UsageError where there are no calls,
        or not as many.
        """
        check_results(self.tree.leaf, results)
        messages = [{"role": "tool", "content": result} for result in results]
        return self._run(self._ask(self.tree.leaf, messages, settings))

    def retry(self, **settings: Any) -> Generator[Event]:
        """Answer the last question again, beside its present reply; yields as `stream`."""
        begun = time.perf_counter()
        node, parsed = self.tree.last_reply().parent, self._begin_request(settings)
        opener = self._input(node.parent, node.messages, parsed)[1]
        return self._run(self._reply_to(node, opener, parsed, begun))

    def edit(self, turn: int, content: Content, /, **settings: Any) -> Generator[Event]:
        """Ask `content` in place of question `turn` (from 1), on a new branch; yields as `stream`.

        A text replaces the words alone: the question's pictures stay.
        """
        node = self.tree.question(turn)
        if not node.is_question:
            raise UsageError(f"turn {turn} holds the results of tools, not a question that could be edited")
        message, _held = self._user_message(content, node.messages[-1])
        return self._run(self._ask(node.parent, [*node.messages[:-1], message], settings))

    def _user_message(self, content: Content, edited: Mapping[str, Any] = NOTHING) -> UserMessage:
        """Return a message in place of the `edited` one, and its pictures, to be held until a node does."""
        return user_message(content, self.engine.images, self.image_tokens, edited)

    def _ask(
        self, parent: Output | None, messages: list[dict[str, Any]], settings: dict[str, Any]
    ) -> PendingReply:
        begun, parsed = time.perf_counter(), self._begin_request(settings)
        return self._reply_to(*self._input(parent, messages, parsed), parsed, begun)

    def _begin_request(self, settings: Mapping[str, Any]) -> ReplySettings:
        """Parse the settings of a new request; from here on a cancel counts for it."""
        self._refuse_if_busy()
        self.signals.cancelled = self.signals.close_thought = False
        self.signals.reason = ""
        return ReplySettings.parse({**self.defaults, **settings})

    def _reply_to(
        self, node: Input, opener: list[int], settings: ReplySettings, begun: float
    ) -> PendingReply:
        context = ReplyContext(
            engine=self.engine,
            live=self.live,
            signals=self.signals,
            tools=self.tools,
            strict_tools=self._promised,
            context_limit=self.context_limit,
            update=self.recorder.update,
            conversation=self.key,
        )
        output = Output(node, opener, settings=dict(settings.given), model_name=self.engine.name)
        history_ids = self.encoder.branch_ids(branch(node), self.history)
        return PendingReply(
            context, output, history_ids, settings, turn=turn_number(node), begun=begun, after=self.tree.leaf
        )

    def _input(
        self, parent: Output | None, messages: list[dict[str, Any]], settings: ReplySettings
    ) -> tuple[Input, list[int]]:
        """Encode a question: its node, and the opener of the reply to it."""
        if parent is None and self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        self.encoder.refuse_too_long(messages, self.context_limit)
        switches = self._switches(settings)
        prompt, shown = (
            self.encoder.encode_prompt(branch(parent), messages, switches),
            self.encoder.pictures_of(messages),
        )
        node = Input(parent, messages, prompt.ids, switches, pictures=shown)
        return node, prompt.opener

    def _switches(self, settings: ReplySettings) -> dict[str, Any]:
        """Return the chat template's variables besides the messages."""
        engine = self.engine
        switches = settings.template_switches(
            knows_efforts=engine.knows_efforts, thinks_by_default=engine.thinks_by_default
        )
        switches["preserve_thinking"] = self.history == "preserve"
        return switches | ({"tools": self.tools} if self.tools else {})

    def _refuse_if_busy(self) -> None:
        if self._busy:
            raise UsageError("this session is already replying: wait for the reply or cancel it")

    def _run(self, reply: PendingReply) -> Generator[Event]:
        self._refuse_if_busy()
        output = reply.output
        if reply.after is not self.tree.leaf:
            raise UsageError("the conversation continued after this reply was requested: ask again")
        self._busy = True
        effort, before = self._switches(reply.settings).get("reasoning_effort"), reply.after
        self._notices += ignored_effort(branch(output), before and before.parent, effort)
        self.tree.add(output.parent, output)
        self.tree.leaf = output
        done = None
        try:
            self._save()
            self.recorder.begin(output)
            yield from self._take_notices()
            for event in reply.run():
                if isinstance(event, Sync):
                    self.turns.append(reply.cost(event))
                if isinstance(event, Done):
                    done = event
                    self._finish(reply, done)
                    yield from self._take_notices()
                yield event
        finally:
            if done is None:
                self._finish(reply, None)

    def _finish(self, reply: PendingReply, done: Done | None) -> None:
        """Settle the reply as it is now: in the tree, in the store, in the snapshots."""
        output = reply.output
        reply.settle()
        self._busy = False
        if done:
            output.stats = reply_stats(done)
        if reply.synced:
            self.turns[-1] = replace(self.turns[-1], prefilled_tokens=reply.prefilled_tokens)
        self.recorder.finish(output, done)
        if not output.ids:  # no reply, so the question does not count as asked
            self.tree.leaf = reply.after
            self.tree.drop(output)
            self._save()
        elif self.history == "preserve" and len(self.live.ids) == self.live.cache.length > len(reply.prompt):
            self.live.keep_snapshot("B", turn_number(output), self.key)

    def note(self, sentence: str) -> None:
        """Tell the user `sentence` with the next reply; callable from any thread."""
        self._notices.append(sentence)

    def _take_notices(self) -> Iterator[Notice]:
        for notices in (self._notices, self.live.notices):
            while notices:
                yield Notice(notices.pop(0))

    # moving in the tree

    def undo(self) -> str:
        """Take back the last question, its reply and the tool results between; returns the question."""
        node = self.tree.last_reply().parent
        while node.parent and not node.is_question:
            node = node.parent.parent
        self._go_to(node.parent)
        return node.text

    def fork(self, turn: int) -> None:
        """Continue from the reply to question `turn`; later turns stay on their own branch."""
        nodes = self.tree.branch()
        node = nodes[nodes.index(self.tree.question(turn)) + 1]
        self._go_to(node if isinstance(node, Output) else None)

    def switch(self, number: int) -> None:
        """Go to the reply with this node number, on any branch. Raises UsageError for an unknown one."""
        self._go_to(self.tree.find_reply(number))

    def reset(self) -> None:
        """Begin a new conversation; of the old one only the stored part remains, its live state included.

        Raises DoesNotFit where that state cannot be written.
        """
        self._refuse_if_busy()
        try:
            self.save_state()
        finally:
            self.tree, self.turns = Tree(), []
            self.recorder.forget()

    def prime(self, messages: Sequence[Mapping[str, Any]], /, **settings: Any) -> None:
        """Continue from a given history that ends with an assistant's message; nothing is read yet.

        Raises TemplateError for malformed messages, UsageError where questions and replies do not alternate.
        """
        given = self.defaults | settings
        self._refuse_if_busy()
        messages, _held = read_messages(messages, self.engine.images, self.image_tokens)
        nodes: list[Node] = []
        leaf = self.tree.leaf
        for question, message in pair_messages(check_messages(messages)):
            thinking = bool(message.get("reasoning_content"))
            parsed = ReplySettings.parse(given | {"enable_thinking": thinking})
            node, opener = self._input(leaf, question, parsed)
            ids = self.encoder.encode_reply(node, opener, message, node.switches)
            leaf = Output(node, opener, ids, message, stats={"finish_reason": "stop"})
            nodes += [node, leaf]
        self.tree.add(*nodes)
        self._go_to(leaf)

    def set_system(self, system: str | None) -> None:
        """Continue under another system message, on a new branch; all of it is read again."""
        self._refuse_if_busy()
        before, self.system = self.system, system
        try:
            self._begin_anew()
        except QchatError:
            self.system = before
            raise

    def set_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Offer other tools, on a new branch that is read again; where it has the same ones nothing changes.

        Raises UsageError for a tool without a name, TemplateError for one that the template refuses.
        """
        self._refuse_if_busy()
        before, wanted = self.tools, check_tools(tools)
        self._offer(wanted)
        if branch_tools(self.tree.branch()) in (None, wanted):
            return
        try:
            self._begin_anew()
        except QchatError:
            self._offer(before)
            raise

    def _offer(self, tools: list[dict[str, Any]]) -> None:
        """Offer `tools` to the model from now on."""
        self.tools = tools
        self._promised = promised_tools(self.engine, tools) if self._constrain_calls else frozenset[str]()
        self._notices += tools_notices(self.engine, tools)

    def _begin_anew(self) -> None:
        """Copy the branch under the present system message and tools, and go there."""
        nodes: list[Node] = []
        leaf: Output | None = None
        for output in (node for node in self.tree.branch() if isinstance(node, Output)):
            question = [m for m in output.parent.messages if m["role"] != "system"]
            node, _ = self._input(leaf, question, self._default_settings)
            leaf = output.copy_under(node)
            nodes += [node, leaf]
        self.tree.add(*nodes)
        self._go_to(leaf)

    @property
    def ids(self) -> list[int]:
        """The exact ids that the live state has read, which may be another conversation's."""
        return self.live.ids

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The current branch in the template's form."""
        own = messages_of(self.tree.branch())
        return own or ([{"role": "system", "content": self.system}] if self.system else [])

    @property
    def history(self) -> History:
        """Whether later turns read earlier thoughts (`preserve`) or not (`strip`); may be changed."""
        return self._history

    @history.setter
    def history(self, mode: History) -> None:
        self._refuse_if_busy()
        self._history = check_history(mode)
        self._save()

    def _go_to(self, leaf: Output | None) -> None:
        self._refuse_if_busy()
        self.tree.leaf = leaf
        self._save()

    # reading ahead

    def idle(self) -> Iterator[int]:
        """Read ahead, chunk by chunk, what the next question will need; in `strip` mode the answers without
        their thoughts. Call it while the user thinks; it may be left at any chunk, which take about 0.15 s.
        Yields how many tokens of `reading_ahead` have been read.

        Also compares the exact ids of a new reply's branch with the template's rendering.
        """
        leaf = self.tree.leaf
        if leaf is None or self._busy:
            return
        if leaf is not self._checked_leaf:
            self._checked_leaf = leaf
            self._note_disagreement(leaf.parent)
            yield 0
        target = self.encoder.ids_before_next(leaf, self.history)
        self.reading_ahead = len(target)
        self.signals.cancelled = False
        if self.live.sync(target).cached == len(target):
            return
        turn = turn_number(leaf)
        yield from self.live.read(target, lambda: self.signals.cancelled, self.key, turn, ahead=True)
        if len(self.live.ids) == len(target):
            self.live.keep_snapshot("B", turn, self.key)

    def _note_disagreement(self, node: Input) -> None:
        """Note where the exact ids up to `node` differ from the template's text; each difference once."""
        known, self._disagreement = self._disagreement, self.encoder.find_disagreement(branch(node))
        if self._disagreement not in (None, known):
            self._notices.append(f"the kept tokens differ from the template's text: {self._disagreement}")

    def prompt_ids(self, content: Content | None = None, /, **settings: Any) -> list[int]:
        """Return the ids that the model reads for this branch, or would read if `content` were asked now.

        Changes nothing. Raises as `stream` does.
        """
        if content is None:
            return self.encoder.branch_ids(self.tree.branch(), self.history)
        parsed = self._begin_request(settings)
        message, _held = self._user_message(content)
        node, opener = self._input(self.tree.leaf, [message], parsed)
        return [*self.encoder.branch_ids(branch(node), self.history), *opener]

    # the stored conversation

    @property
    def conversation(self) -> int | None:
        """The conversation's number in the store; None before the first question."""
        return self.recorder.conversation

    @property
    def title(self) -> str:
        """The user's title, or the beginning of the first question."""
        return self.recorder.title or make_title(self.tree.first_question())

    def rename(self, title: str) -> None:
        """Set the title. Raises StoreError where the store does not accept it."""
        self.recorder.rename(title)

    def save_state(self, *, unasked: bool = False) -> bool:
        """Save the state on disk, so that `reopen` need not read the conversation again.

        Saves the longest useful snapshot where the live state itself is of no use to the next question.
        Returns False where there is nothing to save, or it exceeds the disk budget; saved `unasked`, also
        where it is too little or exceeds the budget of the day. Raises DoesNotFit where the disk is full.
        """
        self._refuse_if_busy()
        leaf, owner = self.tree.leaf, self.recorder.owner()
        if leaf is None or not owner:
            return False
        return self.live.save(self.encoder.ids_before_next(leaf, self.history), owner, unasked=unasked)

    def close(self) -> None:
        """Save the live state; the store stays open, because its owner is the caller. Raises DoesNotFit."""
        self.save_state()

    def _save(self) -> None:
        kept = {"history": self.history, "tools": self.tools}
        self.recorder.save(
            self.tree.leaf, {"title": self.title, "system": self.system or "", "settings": kept}
        )
