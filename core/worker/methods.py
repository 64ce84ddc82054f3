"""The methods of the protocol, run one at a time on one session.

Owns engine, session and store; knows nothing about pipes and threads. Methods send events and poll for
cancellation. They raise QchatError, and MLX errors.
"""

import gc
import subprocess
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from typing import Any

from ..completion.completion import Completer, CompletionRequest
from ..conversation.pictures import with_pictures
from ..conversation.scoring import score_reply
from ..conversation.session import Session
from ..conversation.summary import (
    CacheSummary,
    ConversationState,
    describe_cache,
    describe_replies,
    describe_session,
)
from ..conversation.transcript import check_history
from ..engine.engine import Engine
from ..engine.followers import drop_collected
from ..errors import DoesNotFit, UsageError
from ..events import CallEvent, Event, LoadProgress, Memory, Notice, Unloaded, to_json
from ..generation.reply_settings import MAX_TOP_LOGPROBS, ReplySettings
from ..machine.backend import mx
from ..machine.device import copy_bandwidth, device_limit_nbytes
from ..ops.tuning import Tuner, sentences
from ..prompt_cache.live_state import LiveState
from ..storage.store import Store
from ..vision.placement import decode_with_images
from .jobs import EventSink, run_job
from .memory_guard import MemoryGuard
from .model_facts import describe_model
from .protocol import JOB_METHODS, Cancelled
from .wire import (
    CountResult,
    Empty,
    LoadResult,
    MemoryResult,
    PromptResult,
    RepliesResult,
    Result,
    SaveResult,
    StateResult,
    UndoResult,
)

COMPILING = "compiling faster kernels for this model"
READING_AHEAD = "reading ahead"
TUNING = "trying which operations are fastest here"
# parameters of `load` that configure the session
SESSION_OPTIONS = ("system", "history", "context_limit", "image_tokens")
# session options that a stored conversation has of its own
STORED_OPTIONS = ("system", "history")

Params = Mapping[str, Any]


class EngineMethods:
    """The methods on at most one engine and session; `load` creates both."""

    def __init__(
        self,
        send_event: EventSink,
        cancelled: Callable[[], bool],
        *,
        background: Callable[[str], None] | None = None,
        wake: Callable[[], None] = lambda: None,
    ):
        """`send_event` takes the events of the current request; `cancelled` tells whether to stop it.

        `background` takes one line about work that no request waits for, and an empty one at its end; `wake`
        asks, from any thread, for a call of `idle_work`.
        """
        self._send_event, self._cancelled = send_event, cancelled
        self._tell_background, self._wake = background or (lambda _: None), wake
        self._beside, self._ahead = "", ""  # work of other processes; what is read ahead
        self._engine: Engine | None = None
        self._session: Session | None = None
        self._completer: Completer | None = None
        self._store: Store | None = None
        self._options: dict[str, Any] = {}
        self._bandwidth: float | None = None
        self._replied = self._calling = False
        self.guard = MemoryGuard(lambda: self._session, self._tell, self._wake)

    def call(self, method: str, params: Params) -> Result | dict[str, Any]:
        """Run one of `protocol.METHODS` with checked parameters and return what `wire.RESULTS` says.

        Raises QchatError and MLX errors.
        """
        if self._cancelled():
            raise Cancelled("cancelled before it started")
        self._calling = True
        try:
            return self._run_job(method, params) if method in JOB_METHODS else _METHODS[method](self, params)
        finally:
            self._calling = False

    def _run_job(self, method: str, params: Params) -> dict[str, Any]:
        self.guard.begin_job(method)
        try:
            return run_job(method, params, self._send_job_event)
        finally:
            self.guard.end_job()

    def _tell(self, sentence: str) -> None:
        """Tell the user `sentence` now, or with the next reply; callable from any thread."""
        if self._calling:
            self._send(Notice(sentence))
        elif (session := self._session) is not None:
            session.note(sentence)

    def cancel(self) -> None:
        """Stop the current reply. Callable from any thread."""
        if (session := self._session) is not None:
            session.cancel()

    def close_thought(self) -> None:
        """End the current reasoning and start the answer. Callable from any thread."""
        if (session := self._session) is not None:
            session.close_thought()

    def memory(self) -> Memory:
        """Return MLX's memory counters and the copy bandwidth. Callable from any thread."""
        return Memory(
            active_nbytes=mx.get_active_memory(),
            cache_nbytes=mx.get_cache_memory(),
            peak_nbytes=mx.get_peak_memory(),
            limit_nbytes=device_limit_nbytes(),
            copy_bandwidth=self._bandwidth,
        )

    def idle_work(self) -> Generator[None]:
        """Compile kernels, measure the machine and prefill ahead, in small steps, while no request waits."""
        self.guard.serve()
        if self._session is None:
            return
        self._fuse(self._session.engine)
        yield
        self._tune(self._session)
        yield
        if self._bandwidth is None:
            self._bandwidth = copy_bandwidth()
            yield
        session = self._session
        try:
            for done in session.idle():
                self.guard.serve()
                if done:
                    self._report_ahead(f"{READING_AHEAD} {done:,}/{session.reading_ahead:,}")
                yield
        except Exception:
            session.live.forget()  # the next question prefills again and reports the error
            raise
        finally:
            self._report_ahead("")

    def _report_ahead(self, text: str) -> None:
        self._ahead = text
        self._tell_background(self._ahead or self._beside)

    def _background(self, text: str) -> None:
        self._beside = text
        self._tell_background(self._ahead or self._beside)

    def save_when_idle(self) -> None:
        """Save what took long to read on disk, once nobody has asked for anything for a while."""
        self._save_states(unasked=True)

    def _save_states(self, *, unasked: bool = False) -> bool:
        """Save the states of the conversation and of requests; returns whether any was saved.

        Raises DoesNotFit after trying both.
        """
        saved, problems = False, []
        for kept in (self._session, self._completer):
            try:
                saved |= kept is not None and kept.save_state(unasked=unasked)
            except DoesNotFit as problem:
                problems.append(problem)
        if problems:
            raise problems[0]
        return saved

    def _fuse(self, engine: Engine) -> None:
        """Let the model run fused kernels, or have them compiled in the background."""
        precompiler = engine.precompiler
        if precompiler is None or precompiler.compiling:
            return
        # the first reply has the machine to itself
        child = None if precompiler.load() or not self._replied else precompiler.begin()
        self._background("" if child is None else COMPILING)
        if child is not None:
            threading.Thread(target=self._wake_after, args=(child,), name="kernels", daemon=True).start()

    def _tune(self, session: Session) -> None:
        """Have the forms of the model's operations tried meanwhile; the next load adopts what is fastest."""
        tuner, precompiler = session.engine.model.tuner, session.engine.precompiler
        if tuner.busy:
            self._background(TUNING)
        if not self._replied or not tuner.idle or (precompiler and precompiler.compiling):
            return
        self._background(TUNING)
        threading.Thread(
            target=self._finish_tuning, args=(session, tuner), name="tuning", daemon=True
        ).start()

    def _finish_tuning(self, session: Session, tuner: Tuner) -> None:
        known = sentences(tuner.results)
        tuner.wait()
        for sentence in sentences(tuner.results):
            if sentence not in known:
                session.note(sentence)
        self._background("")

    def _wake_after(self, child: subprocess.Popen[bytes]) -> None:
        if child.wait() == 0:
            self._wake()
        else:
            self._background("")

    def close(self) -> None:
        """Close the store, without saving anything."""
        if self._store is not None:
            self._store.close()

    def _send_job_event(self, event: dict[str, Any]) -> None:
        if self._cancelled():
            raise Cancelled("cancelled")
        self.guard.check_job()
        self._send_event(event)

    def _send(self, event: CallEvent) -> None:
        self._send_event(to_json(event))

    def _require_session(self) -> Session:
        if self._session is None:
            raise UsageError("no model is loaded")
        return self._session

    def _state(self) -> ConversationState:
        return describe_session(self._require_session())

    def _state_result(self) -> StateResult:
        return StateResult(self._state())

    # the model

    def _load(self, params: Params) -> LoadResult:
        ReplySettings.parse(params["defaults"] or {})
        if params["history"] is not None:
            check_history(params["history"])
        given = {name: params[name] for name in SESSION_OPTIONS if params[name] is not None}
        given |= {"constrain_calls": True, **(params["defaults"] or {})}
        with ExitStack() as on_failure:
            store = self._store
            if params["store"] is not None and (store is None or str(store.path) != params["store"]):
                store = Store(params["store"])
                on_failure.callback(store.close)
            if params["conversation"] is not None:
                # check it before unloading the current model
                _require_store(store).conversation(params["conversation"])
            self._engine = engine = Engine.load(params["model"], self._report_loading)
            self._options = {name: value for name, value in given.items() if name not in STORED_OPTIONS}
            live = LiveState(engine, params["snapshot_budget"], quantized_kv=params["quantized_kv"] or False)
            if store is not None:
                live.keep_on_disk(store.states_folder)
            if params["conversation"] is not None:
                stored = _require_store(store)
                self._session = Session.reopen(engine, stored, params["conversation"], live=live, **given)
            else:
                self._session = Session(engine, store=store, live=live, **given)
            on_failure.pop_all()
        if store is not self._store:
            self.close()
            self._store = store
        self._send_load_event(engine.model.nbytes, engine.model.nbytes, "")
        return LoadResult(self._state(), describe_model(engine, self._session))

    def _report_loading(self, done: int, total: int, tensor: str) -> None:
        """Unload the previous model, to free memory, once the folder is checked; send the progress."""
        if self._engine is not None:
            self._unload_engine()
        if self._cancelled():
            raise Cancelled("loading was cancelled")
        self._send_load_event(done, total, tensor)

    def _send_load_event(self, done: int, total: int, tensor: str) -> None:
        self._send(LoadProgress(done, total, tensor))

    def _unload_engine(self) -> None:
        self._engine = self._session = self._completer = None
        gc.collect()  # layers and their fused functions form reference cycles
        mx.clear_cache()
        drop_collected()
        self._send(Unloaded())

    def _unload(self, _: Params) -> Empty:
        self._unload_engine()
        return Empty()

    # replies

    def _stream_reply(self, start: Callable[[Session], Generator[Event]]) -> StateResult:
        self._send_all(start(self._require_session()))
        return self._state_result()

    def _send_all(self, reply: Generator[Event]) -> None:
        with closing(reply) as events:
            if self._cancelled():
                self.cancel()  # before the reply started
            for event in events:
                self._send(event)
                self.guard.serve()
        self._replied = True

    def _ask(self, params: Params) -> StateResult:
        content = with_pictures(params["text"], params["images"])
        return self._stream_reply(lambda session: session.stream(content, **_reply_settings(params)))

    def _retry(self, params: Params) -> StateResult:
        return self._stream_reply(lambda session: session.retry(**_reply_settings(params)))

    def _edit(self, params: Params) -> StateResult:
        settings, content = _reply_settings(params), with_pictures(params["text"], params["images"])
        return self._stream_reply(lambda session: session.edit(params["turn"], content, **settings))

    def _answer_tools(self, params: Params) -> StateResult:
        settings, results = _reply_settings(params), params["results"]
        if not all(isinstance(result, str) for result in results):
            raise UsageError("results has a value that is not text, wanted a list of texts")
        return self._stream_reply(lambda session: session.answer_tools(results, **settings))

    # replies beside the conversation

    def _complete(self, params: Params) -> Empty:
        self._send_all(self._require_completer().stream(_completion_request(params)))
        return Empty()

    def _count_messages(self, params: Params) -> CountResult:
        return CountResult(self._require_completer().count(_completion_request(params)))

    def _require_completer(self) -> Completer:
        session = self._require_session()
        if self._completer is None or self._completer.engine is not session.engine:
            limits = session.context_limit, session.image_tokens
            self._completer = Completer(session.engine, session.live, *limits)
        self._completer.signals = session.signals  # whichever replies is cancelled
        return self._completer

    # the conversation

    def _undo(self, _: Params) -> UndoResult:
        question = self._require_session().undo()
        return UndoResult(self._state(), question)

    def _fork(self, params: Params) -> StateResult:
        self._require_session().fork(params["turn"])
        return self._state_result()

    def _switch(self, params: Params) -> StateResult:
        self._require_session().switch(params["number"])
        return self._state_result()

    def _reset(self, _: Params) -> StateResult:
        self._require_session().reset()
        return self._state_result()

    def _prime(self, params: Params) -> StateResult:
        self._require_session().prime(params["messages"])
        return self._state_result()

    def _set_system(self, params: Params) -> StateResult:
        self._require_session().set_system(params["text"])
        return self._state_result()

    def _set_tools(self, params: Params) -> StateResult:
        self._require_session().set_tools(params["tools"])
        return self._state_result()

    def _history(self, params: Params) -> StateResult:
        self._require_session().history = params["mode"]
        return self._state_result()

    def _open(self, params: Params) -> StateResult:
        session, store = self._require_session(), _require_store(self._store)
        try:
            session.save_state()
        except DoesNotFit as error:
            self._send(Notice(str(error)))
        self._session = Session.reopen(
            session.engine, store, params["conversation"], live=session.live, **self._options
        )
        return self._state_result()

    def _rename(self, params: Params) -> StateResult:
        self._require_session().rename(params["title"])
        return self._state_result()

    # queries

    def _explain(self, _: Params) -> CacheSummary:
        return describe_cache(self._require_session())

    def _prompt(self, params: Params) -> PromptResult:
        session = self._require_session()
        ids = session.prompt_ids(params["text"], **_reply_settings(params))
        return PromptResult(decode_with_images(ids, session.engine.tokenizer.decode_with_special), len(ids))

    def _replies(self, _: Params) -> RepliesResult:
        return RepliesResult(describe_replies(self._require_session()))

    def _score(self, params: Params) -> Empty:
        session, count = self._require_session(), params["count"] or 0
        if not 0 <= count <= MAX_TOP_LOGPROBS:
            raise UsageError(f"count is {count}, wanted 0 to {MAX_TOP_LOGPROBS}")
        for event in score_reply(session, params["turn"], count, self._cancelled):
            self._send(event)
        if self._cancelled():
            raise Cancelled("cancelled")
        return Empty()

    def _count(self, params: Params) -> CountResult:
        ids = self._require_session().engine.tokenizer.encode(params["text"], special=False)
        return CountResult(len(ids))

    def _memory(self, _: Params) -> MemoryResult:
        session = self._require_session()
        return MemoryResult(
            **vars(self.memory()),
            weights_nbytes=session.engine.model.nbytes,
            context_nbytes=session.live.cache.nbytes,
            snapshot_nbytes=session.live.snapshots.nbytes,
            snapshot_budget_nbytes=session.live.snapshots.budget_nbytes,
        )

    def _save_state(self, _: Params) -> SaveResult:
        self._require_session()
        return SaveResult(self._save_states())

    def _shutdown(self, _: Params) -> Empty:
        return Empty()

    def _get_state(self, _: Params) -> StateResult:
        return self._state_result()


_METHODS: Mapping[str, Callable[[EngineMethods, Params], Result]] = {
    "load": EngineMethods._load,
    "unload": EngineMethods._unload,
    "send": EngineMethods._ask,
    "retry": EngineMethods._retry,
    "edit": EngineMethods._edit,
    "answer_tools": EngineMethods._answer_tools,
    "undo": EngineMethods._undo,
    "fork": EngineMethods._fork,
    "switch": EngineMethods._switch,
    "reset": EngineMethods._reset,
    "prime": EngineMethods._prime,
    "set_system": EngineMethods._set_system,
    "set_tools": EngineMethods._set_tools,
    "history": EngineMethods._history,
    "open": EngineMethods._open,
    "rename": EngineMethods._rename,
    "state": EngineMethods._get_state,
    "explain": EngineMethods._explain,
    "prompt": EngineMethods._prompt,
    "replies": EngineMethods._replies,
    "score": EngineMethods._score,
    "count": EngineMethods._count,
    "complete": EngineMethods._complete,
    "count_messages": EngineMethods._count_messages,
    "memory": EngineMethods._memory,
    "save_state": EngineMethods._save_state,
    "shutdown": EngineMethods._shutdown,
}


def _require_store(store: Store | None) -> Store:
    if store is None:
        raise UsageError("cannot open a conversation: conversations are not being saved")
    return store


def _completion_request(params: Params) -> CompletionRequest:
    if (params.get("messages") is None) == (params.get("prompt") is None):
        raise UsageError("a reply needs either messages or a prompt")
    given = {name: value for name, value in params.items() if value is not None}
    return CompletionRequest(**given)


def _reply_settings(params: Params) -> dict[str, Any]:
    return params["settings"] or {}
