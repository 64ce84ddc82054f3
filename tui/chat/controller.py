"""The controller between a front end and its engine: one conversation, its queue, its jobs, its live figures.

Owns the order of requests: what is asked for while something runs waits in `queue`. The engine may die
at any moment; the conversation stays here and in the store, and `restart` continues it. Refuses requests that
cannot be served now.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...core.conversation.summary import ConversationState
from ...core.errors import QchatError, UsageError
from ...core.events import CallEvent, Done, Logprobs, Memory, Unloaded
from ...core.worker.wire import LoadResult, ModelInfo, StateResult, UndoResult
from ..user.paths import measurements_file
from .client import Call, EngineClient, EngineDied
from .interruption import take_up
from .job_queue import JobQueue
from .jobs import Job, Render, keep_speeds
from .kept_results import KeptResults
from .live_bench import LiveBench
from .meter import Meter, Phase, Status
from .picture_files import PictureFiles
from .priming import prime
from .replies import Replies, ReplyRequest
from .tool_turns import ToolTurns
from .turns import NO_STATE, RunningTurn, kept_settings, record_settings
from .view import Companion, NoteKind, View
from .waiting import WaitingLine, WaitingLines

if TYPE_CHECKING:
    from ...core.storage.store import Store
    from ..tools.toolbox import Toolbox
    from ..user.settings import Settings
    from .probabilities import ScoredAnswer

__all__ = ["Chat", "Job", "Status", "View"]

# the time that leaving may take: for the reply to stop, and for the live state to be written
STOP_SECONDS, SAVE_SECONDS = 1.0, 5.0
REPLYING = ("reading", "thinking", "answering", "tools")


class Chat:
    """One conversation with one engine. `settings` are the run's, which go with every reply and every load.

    `model` is None while none is loaded; `state` is the conversation as the engine described it last. Jobs
    have engines of their own. Every method raises QchatError with one sentence; EngineDied comes after the
    view was told of the death.
    """

    def __init__(
        self,
        view: View,
        client_factory: Callable[[], EngineClient] = EngineClient,
        *,
        job_client_factory: Callable[[], EngineClient] | None = None,
        settings: "Settings",
        store: "Store | None" = None,
        toolbox: "Toolbox | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.view, self.settings, self.store = view, settings, store
        self.model: ModelInfo | None = None
        self.state = NO_STATE
        self.waiting = WaitingLines()
        self.doing_queued = False  # whether what waited is being done now, as nobody may expect any more
        self.pictures: dict[str, list[str]] = {}  # the files that go with a question
        self.picture_files = PictureFiles(store)
        self.show_stats = False
        self.client: EngineClient | None = None
        self.meter, self.clock = Meter(clock), clock
        self._factory = client_factory
        self.job_queue = JobQueue(self, job_client_factory or client_factory, self._job_changed)
        self._path: str | None = None  # of the model that is loaded, or to be loaded
        self._call: Call | None = None
        self._busy = self._leaving = self._moving = False
        self.server: Companion | None = None
        self._parked_path: str | None = None  # of the model that was unloaded for a job
        self.kept_results, self.live_bench = KeptResults(store, self._note), LiveBench()
        self.tools = ToolTurns(self, toolbox)
        self.scored: ScoredAnswer | None = None
        self.replies = Replies(self)
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def status(self) -> Status:
        return self.meter.status

    @property
    def queue(self) -> list[str]:
        """The messages and commands that wait, as they were given."""
        return self.waiting.texts

    @property
    def busy(self) -> bool:
        """Whether a question has to wait."""
        return self._busy or self.parked

    @property
    def has_turns_to_come(self) -> bool:
        """Whether a command that needs the engine has to wait for what was asked before it."""
        return self.parked or bool(self.occupation())

    @property
    def parked(self) -> bool:
        """Whether the model was unloaded to make room for a job, and will be loaded again."""
        return self._parked_path is not None

    @property
    def log(self) -> list[str]:
        """The last lines that the engine and those of the jobs wrote."""
        return [*(self.client.log if self.client else ()), *(line for job in self.jobs for line in job.log)]

    # its front ends, one after the other

    def leave_view(self) -> None:
        """Let the queue wait until `show_in` has found another front end."""
        self._moving = True

    def show_in(self, view: View) -> "Chat":
        """Go on in another front end on the same event loop, which calls `take_over` once it can show it."""
        self.view = view
        return self

    def take_over(self) -> None:
        """Show the front end what there is: the conversation, its kept results and the jobs that run."""
        self._rebuild(None)
        for job in self.running_jobs:
            self.view.job(job)
        self.view.status(self.status)
        self._moving = False
        self._go_on()

    def _note(self, text: str, kind: NoteKind = "info") -> None:
        self.view.note(text, kind)

    def _job_changed(self, job: Job) -> None:
        self.view.job_changed(job)

    # the engine

    async def load(self, model: str, *, conversation: int | None = None) -> None:
        """Load the folder `model` and continue the conversation, or the stored one of this number.

        Nothing of it is read before the next question.
        """
        with self._at_work("starting"):
            await self._load(model, conversation)

    async def _load(self, model: str, conversation: int | None) -> None:
        client = await self._running()
        kept = self.state if conversation is None else NO_STATE
        number = (conversation or kept.conversation) if self.store is not None else None
        given = {**self.settings.session(), **kept_settings(kept, number)}
        if self.store is not None:
            given |= {"store": str(self.store.path), "conversation": number}
        self.meter.begin("loading")
        try:
            loaded: LoadResult = await self.follow(client.call("load", model=model, **given))
        except EngineDied:
            self._path = model  # for a restart
            raise
        self.model, self._path = loaded.model, model
        self.tools.forget(conversation=conversation is not None)
        self.meter.bytes_per_token = loaded.model.bytes_per_token
        self.hold(loaded.state)
        if self.store is None and kept.turns:
            self.hold((await prime(client.request, kept.turns, self.pictures, self.view)).state)
        self._rebuild(kept.conversation)

    async def restart(self, *, context_limit: int | None = None) -> None:
        """Start a new engine in place of a dead one, with the same model and conversation, and continue.

        A `context_limit` becomes the setting. A question that got no answer is asked again.
        """
        if self._path is None:
            raise UsageError("no model was loaded: /load NAME")
        if context_limit is not None:
            self.settings.change("context_limit", context_limit, "the restart")
        while self._busy and self.status.phase == "dead":  # what the engine's death is about to end
            await asyncio.sleep(0.01)
        with self._at_work("starting"):
            await self._load(self._path, None)
            turn, self.replies.interrupted = self.replies.interrupted, None
            if turn is not None:
                await take_up(self, turn)

    async def quit(self) -> None:
        """End the engine and every job; save the live state, so that the conversation reopens quickly."""
        self._leaving = True
        self.waiting.clear()
        for job in self.jobs:
            job.cancel()
        self.tools.leave()
        if self.server is not None:
            await self.server.stop(at_once=True)
        with suppress(QchatError, TimeoutError):
            await asyncio.wait_for(self._stopped(), STOP_SECONDS)
            if self.client is not None and self.model is not None:
                await asyncio.wait_for(self.client.request("save_state"), SAVE_SECONDS)
        clients = (self.client, *(job.client for job in self.jobs))
        stops = [client.stop() for client in clients if client is not None]
        await asyncio.gather(self.tools.toolbox.close(), *stops)
        if self._tasks:  # their calls have ended with the engines
            await asyncio.wait(self._tasks)
        self.kept_results.leave(*(self.model.name, self.model.path) if self.model else ("", ""))

    async def _stopped(self) -> None:
        while self._call is not None:
            self._call.cancel()
            with suppress(QchatError):
                await self._call.result()
            await asyncio.sleep(0)

    async def _running(self) -> EngineClient:
        """Return the client of a living engine; start one if there is none."""
        if self.client is None or not self.client.alive:
            client = self.client = self._factory()
            client.on_death = self._died
            client.on_background = self._background
            self.model = None
            await client.start()
        return self.client

    def connected(self) -> EngineClient:
        """Return the client of an engine with a model. Raises UsageError if there is none."""
        if self.status.phase == "dead":
            raise UsageError("the engine has stopped: restart it first")
        if self.client is None or self.model is None:
            raise UsageError("no model is loaded: /load NAME")
        return self.client

    def _background(self, text: str) -> None:
        self.status.background = text
        self._moved(disturbing=bool(text))
        self.view.status(self.status)

    def _died(self, reason: str) -> None:
        self.status.background = ""
        tokens = self.status.context_tokens
        where = f" at {tokens:,} tokens of context" if tokens else ""
        self.model = None
        self.meter.end("dead", f"{reason}{where}")
        self.view.status(self.status)
        self.view.note(f"{reason}{where}; nothing is lost", "error")

    # questions

    async def send(self, text: str, **settings: Any) -> None:
        """Ask `text` and wait for the end of the reply; if something runs, queue it and return."""
        if self.busy or self.waiting or self.status.phase in ("starting", "dead"):
            self.line_up(text)
        else:
            await self.ask(text, **settings)

    def line_up(
        self, text: str, work: Callable[[], Awaitable[None]] | None = None, *, first: bool = False
    ) -> None:
        """Queue the message `text`, or the `work` of the command `text`."""
        line = WaitingLine(text, work or partial(self.ask, text), is_message=work is None)
        self.waiting.add(line, first=first)
        self.view.status(self.status)
        self._go_on()

    async def ask(self, text: str, **settings: Any) -> None:
        """Ask `text` now and wait for the end of the reply. Raises UsageError if something runs."""
        images = {"images": shown} if (shown := self.pictures.get(text)) else {}
        await self._reply(ReplyRequest("send", self.state.turns, text, {"text": text, **images}, settings))

    async def retry(self, **settings: Any) -> None:
        """Answer the last question again, beside its present reply."""
        turns = self.state.turns
        if not turns:
            raise UsageError("there is no question yet")
        last = turns[-1]
        await self._reply(
            ReplyRequest("retry", turns[:-1], last.question, {}, settings, last.results, last.pictures)
        )

    async def edit(self, turn: int, text: str, images: Sequence[str] = (), **settings: Any) -> None:
        """Ask `text` in place of question `turn`, on a new branch.

        The files `images`, if there are any, replace its pictures.
        """
        turns = self.state.turns
        if not 1 <= turn <= len(turns):
            raise UsageError(f"there is no question {turn}: this branch has {len(turns)}")
        edited = turns[turn - 1]
        self.pictures[text] = list(images) or self.pictures.get(edited.question, [])
        params = {"turn": turn, "text": text} | ({"images": list(images)} if images else {})
        pictures = () if images else edited.pictures
        request = ReplyRequest("edit", turns[: turn - 1], text, params, settings, pictures=pictures)
        await self._reply(request)

    async def close_thought(self) -> None:
        """End the thought, so that the answer begins."""
        await self.connected().request("close_thought")

    async def score(self, turn: int, count: int) -> list[Logprobs]:
        """Return how likely each id of the reply in `turn` was, and the `count` likeliest in its place."""
        found: list[CallEvent] = []
        with self._at_work("working"):
            await self.follow(self.connected().call("score", turn=turn, count=count), keep=found)
        return [event for event in found if isinstance(event, Logprobs)]

    @property
    def jobs(self) -> list[Job]:
        return self.job_queue.jobs

    @property
    def running_jobs(self) -> list[Job]:
        """The jobs that have not ended, those that wait included."""
        return self.job_queue.running

    @property
    def job_to_stop(self) -> Job | None:
        """The job that `stop` would end; None if it ends the reply or calls of tools, or nothing."""
        has_call = self._call is not None or self.tools.busy
        return self.running_jobs[-1] if self.running_jobs and not has_call else None

    def stop(self) -> None:
        """Stop the reply or the loading, or the calls of tools, else the newest job."""
        if self._call is not None:
            self._call.cancel()
        elif self.tools.busy:
            self.tools.cancel()
        elif self.running_jobs:
            self.running_jobs[-1].cancel()

    async def _reply(self, request: ReplyRequest) -> None:
        self.connected()
        with self._at_work("reading"):
            try:
                await self.tools.offer()
            except QchatError:
                self.replies.give_back(request)
                raise
            if len(request.before) < len(self.state.turns):
                self.view.rebuilt(replace(self.state, turns=tuple(request.before)))
            await self.tools.go_on(await self.replies.show(request), request.settings)

    async def follow(
        self, call: Call, running: RunningTurn | None = None, keep: list[CallEvent] | None = None
    ) -> Any:
        """Show a call's events until it ends, or only keep them; return its result."""
        self._call = call
        try:
            async for batch in call:
                if keep is not None:
                    keep += batch
                    continue
                for event in batch:
                    self.meter.follow(event)
                    if isinstance(event, Unloaded):
                        self.model = None
                if running is not None:
                    running.collect(batch)
                    self.view.events([event for event in batch if not isinstance(event, Memory | Done)])
                self.view.status(self.status)
            return await call.result()
        finally:
            self._call = None

    # moving in the conversation

    async def undo(self) -> str:
        """Take back the last question and its reply; return the question."""
        undone: UndoResult = await self._move("undo")
        return undone.question

    async def fork(self, turn: int) -> None:
        """Continue from the reply to question `turn`."""
        await self._move("fork", turn=turn)

    async def switch(self, number: int) -> None:
        """Go to the reply with this node number, on any branch."""
        await self._move("switch", number=number)

    async def new(self) -> None:
        """Begin a new conversation; the old one stays in the store."""
        await self._move("reset")

    async def open(self, conversation: int) -> None:
        """Continue a stored conversation."""
        await self._move("open", conversation=conversation)

    async def prime(self, messages: list[dict[str, Any]]) -> None:
        """Continue from a given history."""
        await self._move("prime", messages=messages)

    async def set_system(self, text: str | None) -> None:
        """Replace the system message."""
        await self._move("set_system", text=text)

    async def set_history(self, mode: str) -> None:
        """Keep thoughts in the context (`preserve`) or drop them (`strip`)."""
        await self._move("history", mode=mode)

    async def rename(self, title: str) -> None:
        """Give the conversation another title."""
        await self.request("rename", title=title)

    async def _move(self, method: str, **params: Any) -> Any:
        client = self.connected()
        with self._at_work("working"):
            before = self.state.conversation
            result = await client.request(method, **params)
            if method in ("reset", "open"):
                self.tools.forget(conversation=True)
            self.hold(result.state)
            self._rebuild(before)
            return result

    def _rebuild(self, before: int | None) -> None:
        """Draw the conversation anew, with its kept results if it was opened after conversation `before`."""
        self.meter.forget_reply()
        self.view.rebuilt(self.state)
        if self.state.conversation not in (None, before):
            self.view.results(self.kept_results.read(self.state.conversation))

    async def request(self, method: str, **params: Any) -> Any:
        """Call any other method and return its result, after what the engine does now."""
        result = await self.connected().request(method, **params)
        if isinstance(result, StateResult):
            self.hold(result.state)
            self.view.status(self.status)
        return result

    def hold(self, state: ConversationState) -> None:
        self.state = state
        self.meter.hold(state)
        self.kept_results.settle(state.conversation)
        if self.model is not None:
            record_settings(self.settings, self.model, state)

    # jobs

    def start_job(
        self, title: str, method: str, params: Mapping[str, Any], render: Render, *, alone: bool = False
    ) -> Job:
        """Begin or queue a job in a process of its own; while it runs `alone` the model is unloaded."""
        if method == "eval":  # what a benchmark measured is kept once it is known that it ran alone
            params = {"measurements": str(measurements_file()), **params}
        job = Job(title, method, params, render, self.job_queue.changed, self.clock)
        job.alone, job.place = alone, (self.state.conversation, len(self.state.turns))
        self.jobs.append(job)
        self.view.job(job)
        self._in_background(self._run_job(job))
        return job

    async def _run_job(self, job: Job) -> None:
        await self.job_queue.run(job, self._keep_job)
        self._go_on()

    async def _keep_job(self, job: Job) -> None:
        """Keep the result of a finished job with its conversation, and its speeds with its models."""
        self.kept_results.keep_job(job, self.state.conversation)
        await self._or_note(asyncio.to_thread(keep_speeds, job, measurements_file()))

    def occupation(self) -> str:
        """Name what the engine does now, or will do at once; empty if it rests."""
        if self._busy:
            return "the reply" if self.status.phase in REPLYING else "the engine"
        return "the queued messages" if self.waiting and self.model is not None else ""

    @property
    def background(self) -> str:
        """Name the work of the engine that no request waits for; empty if there is none."""
        return self.status.background if self.model is not None else ""

    async def lend_memory(self) -> None:
        """Unload the chat's model for jobs."""
        if self.model is None:
            return
        self._parked_path = self._path
        self.view.note("the model of this chat is unloaded while the job runs")
        with suppress(QchatError):
            await self.connected().request("unload")
        self.model = None
        self.view.status(self.status)

    async def take_memory_back(self) -> None:
        """Load the model again that was unloaded for jobs."""
        path, self._parked_path = self._parked_path, None
        if path is not None and not self._leaving:
            await self._or_note(self.load(path))

    def _moved(self, *, disturbing: bool) -> None:
        """Tell the jobs that the engine began or ended something; beside a measurement it disturbs."""
        if disturbing:
            self.job_queue.disturb()
        self.job_queue.move()

    # work

    @contextmanager
    def _at_work(self, phase: Phase) -> Iterator[None]:
        """Refuse other requests meanwhile; afterwards do what is queued."""
        if self.busy:
            raise UsageError("something is running: wait for it, or stop it first")
        self._busy = True
        self._moved(disturbing=True)
        if phase == "working":
            self.status.phase = phase
        else:
            self.meter.begin(phase)
        self.view.status(self.status)
        try:
            yield
        except EngineDied as error:
            self.status.reason = self.status.reason or str(error)
            raise
        finally:
            self._busy = False
            if self.client is None or not self.client.alive:
                self.meter.end("dead", self.status.reason)
            else:
                self.meter.end("idle")
            self.view.status(self.status)
            self._moved(disturbing=False)
            self._go_on()

    def _go_on(self) -> None:
        if self.waiting:
            self._in_background(self._or_note(self._do_next()))

    async def _do_next(self) -> None:
        """Do what waits first, if possible now; its end begins the next."""
        if self.busy or self._moving or self.status.phase != "idle":
            return
        line = self.waiting.next(has_model=self.model is not None)
        if line is None:
            return
        self.view.status(self.status)
        self.doing_queued = True
        try:
            await line.work()
        finally:
            self.doing_queued = False
            self._go_on()

    async def _or_note(self, work: Any) -> None:
        """Do work that nobody awaits, and tell the view of errors."""
        try:
            with suppress(EngineDied):  # the view was told
                await work
        except QchatError as error:
            self.view.note(str(error), "error")

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
