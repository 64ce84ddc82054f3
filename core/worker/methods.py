"""The methods of the protocol, run one at a time on one session.

Owns engine, session and store; knows nothing about pipes and threads. Methods send events and poll for
cancellation. They raise QchatError, and MLX errors.
"""

import gc
import subprocess
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any, get_args

from ..conversation.session import Session
from ..conversation.summary import describe_cache, describe_session
from ..conversation.transcript import History
from ..engine.engine import Engine
from ..engine.followers import drop_collected
from ..errors import DoesNotFit, UsageError
from ..events import Event, Notice, to_json
from ..generation.reply_settings import ReplySettings
from ..generation.sampling import resolve_sampling
from ..machine.backend import mx
from ..machine.device import copy_bandwidth, device_limit_nbytes
from ..quoting import quote_value
from ..storage.store import Store
from .jobs import EventSink, run_job
from .protocol import JOB_METHODS, Cancelled

COMPILING = "compiling faster kernels for this model"
# parameters of `load` that configure the session
SESSION_OPTIONS = ("system", "history", "quantized_kv", "context_limit", "snapshot_budget")
# session options that a stored conversation has of its own
STORED_OPTIONS = ("system", "history")

Result = dict[str, Any]
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
        self._background, self._wake = background or (lambda _: None), wake
        self._engine: Engine | None = None
        self._session: Session | None = None
        self._store: Store | None = None
        self._options: dict[str, Any] = {}
        self._bandwidth: float | None = None
        self._replied = False

    def call(self, method: str, params: Params) -> Result:
        """Run one of `protocol.METHODS` with checked parameters and return its result.

        Raises QchatError and MLX errors.
        """
        if self._cancelled():
            raise Cancelled("cancelled before it started")
        if method in JOB_METHODS:
            return run_job(method, params, self._send_job_event)
        return _METHODS[method](self, params)

    def cancel(self) -> None:
        """Stop the current reply. Callable from any thread."""
        if (session := self._session) is not None:
            session.cancel()

    def close_thought(self) -> None:
        """End the current reasoning and start the answer. Callable from any thread."""
        if (session := self._session) is not None:
            session.close_thought()

    def memory_figures(self) -> dict[str, Any]:
        """Return MLX's memory counters in bytes and the copy bandwidth. Callable from any thread."""
        return {
            "active_nbytes": mx.get_active_memory(),
            "cache_nbytes": mx.get_cache_memory(),
            "peak_nbytes": mx.get_peak_memory(),
            "limit_nbytes": device_limit_nbytes(),
            "copy_bandwidth": self._bandwidth,
        }

    def idle_work(self) -> Generator[None]:
        """Compile kernels, measure the machine and prefill ahead, in small steps, while no request waits."""
        if self._session is None:
            return
        self._fuse(self._session.engine)
        yield
        if self._bandwidth is None:
            self._bandwidth = copy_bandwidth()
            yield
        try:
            for _ in self._session.idle():
                yield
        except Exception:
            self._session.live.forget()  # the next question prefills again and reports the error
            raise

    def _fuse(self, engine: Engine) -> None:
        """Let the model run fused, or have what it needs for that compiled meanwhile."""
        precompiler = engine.precompiler
        if precompiler is None or precompiler.compiling:
            return
        # the first reply has the machine to itself
        child = None if precompiler.load() or not self._replied else precompiler.begin()
        self._background("" if child is None else COMPILING)
        if child is not None:
            threading.Thread(target=self._wake_after, args=(child,), name="kernels", daemon=True).start()

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
        self._send_event(event)

    def _require_session(self) -> Session:
        if self._session is None:
            raise UsageError("no model is loaded")
        return self._session

    def _state_result(self) -> Result:
        return {"state": describe_session(self._require_session())}

    # the model

    def _load(self, params: Params) -> Result:
        ReplySettings.parse(params["defaults"] or {})
        if params["history"] not in (None, *get_args(History)):
            raise UsageError(
                f"history is {quote_value(params['history'])}, wanted {' or '.join(get_args(History))}"
            )
        given = {name: params[name] for name in SESSION_OPTIONS if params[name] is not None}
        given |= params["defaults"] or {}
        with ExitStack() as on_failure:
            store = self._store
            if params["store"] is not None and (store is None or str(store.path) != params["store"]):
                store = Store(params["store"])
                on_failure.callback(store.close)
            if params["conversation"] is not None:
                _require_store(store).conversation(
                    params["conversation"]
                )  # check it before unloading the current model
            self._engine = engine = Engine.load(params["model"], self._report_loading)
            self._options = {name: value for name, value in given.items() if name not in STORED_OPTIONS}
            if params["conversation"] is not None:
                self._session = Session.reopen(engine, _require_store(store), params["conversation"], **given)
            else:
                self._session = Session(engine, store=store, **given)
            on_failure.pop_all()
        if store is not self._store:
            self.close()
            self._store = store
        self._send_load_event(engine.model.nbytes, engine.model.nbytes, "")
        return {"model": _model_info(engine, self._session), **self._state_result()}

    def _report_loading(self, done: int, total: int, tensor: str) -> None:
        """Unload the previous model, to free memory, once the folder is checked; send the progress."""
        if self._engine is not None:
            self._unload_engine()
        if self._cancelled():
            raise Cancelled("loading was cancelled")
        self._send_load_event(done, total, tensor)

    def _send_load_event(self, done: int, total: int, tensor: str) -> None:
        self._send_event({"event": "load", "done_nbytes": done, "total_nbytes": total, "detail": tensor})

    def _unload_engine(self) -> None:
        self._engine = self._session = None
        gc.collect()  # layers and their fused functions form reference cycles
        mx.clear_cache()
        drop_collected()
        self._send_event({"event": "unloaded"})

    def _unload(self, _: Params) -> Result:
        self._unload_engine()
        return {}

    # replies

    def _stream_reply(self, start: Callable[[Session], Generator[Event]]) -> Result:
        session = self._require_session()
        with closing(start(session)) as events:
            if self._cancelled():
                session.cancel()  # cancelled before the reply started
            for event in events:
                self._send_event(to_json(event))
        self._replied = True
        return self._state_result()

    def _send(self, params: Params) -> Result:
        settings = _reply_settings(params)
        return self._stream_reply(lambda session: session.stream(params["text"], **settings))

    def _retry(self, params: Params) -> Result:
        settings = _reply_settings(params)
        return self._stream_reply(lambda session: session.retry(**settings))

    def _edit(self, params: Params) -> Result:
        settings = _reply_settings(params)
        return self._stream_reply(lambda session: session.edit(params["turn"], params["text"], **settings))

    def _answer_tools(self, params: Params) -> Result:
        settings, results = _reply_settings(params), params["results"]
        if not all(isinstance(result, str) for result in results):
            raise UsageError("results has a value that is not text, wanted a list of texts")
        return self._stream_reply(lambda session: session.answer_tools(results, **settings))

    # the conversation

    def _undo(self, _: Params) -> Result:
        return {"question": self._require_session().undo(), **self._state_result()}

    def _fork(self, params: Params) -> Result:
        self._require_session().fork(params["turn"])
        return self._state_result()

    def _switch(self, params: Params) -> Result:
        self._require_session().switch(params["number"])
        return self._state_result()

    def _reset(self, _: Params) -> Result:
        self._require_session().reset()
        return self._state_result()

    def _prime(self, params: Params) -> Result:
        self._require_session().prime(params["messages"])
        return self._state_result()

    def _set_system(self, params: Params) -> Result:
        self._require_session().set_system(params["text"])
        return self._state_result()

    def _history(self, params: Params) -> Result:
        self._require_session().history = params["mode"]
        return self._state_result()

    def _open(self, params: Params) -> Result:
        session, store = self._require_session(), _require_store(self._store)
        try:
            session.save_state()
        except DoesNotFit as error:
            self._send_event(to_json(Notice(str(error))))
        self._session = Session.reopen(session.engine, store, params["conversation"], **self._options)
        return self._state_result()

    def _rename(self, params: Params) -> Result:
        self._require_session().rename(params["title"])
        return self._state_result()

    # queries

    def _explain(self, _: Params) -> Result:
        return describe_cache(self._require_session())

    def _prompt(self, params: Params) -> Result:
        ids = self._require_session().prompt_ids(params["text"], **_reply_settings(params))
        return {"text": self._require_session().engine.tokenizer.decode_with_special(ids), "tokens": len(ids)}

    def _count(self, params: Params) -> Result:
        return {"tokens": len(self._require_session().engine.tokenizer.encode(params["text"], special=False))}

    def _memory(self, _: Params) -> Result:
        session = self._require_session()
        return {
            **self.memory_figures(),
            "weights_nbytes": session.engine.model.nbytes,
            "context_nbytes": session.live.cache.nbytes,
            "snapshot_nbytes": session.live.snapshots.nbytes,
            "snapshot_budget_nbytes": session.live.snapshots.budget_nbytes,
        }

    def _save_state(self, _: Params) -> Result:
        return {"saved": self._require_session().save_state()}

    def _shutdown(self, _: Params) -> Result:
        return {}

    def _get_state(self, _: Params) -> Result:
        return self._state_result()


_METHODS: Mapping[str, Callable[[EngineMethods, Params], Result]] = {
    "load": EngineMethods._load,
    "unload": EngineMethods._unload,
    "send": EngineMethods._send,
    "retry": EngineMethods._retry,
    "edit": EngineMethods._edit,
    "answer_tools": EngineMethods._answer_tools,
    "undo": EngineMethods._undo,
    "fork": EngineMethods._fork,
    "switch": EngineMethods._switch,
    "reset": EngineMethods._reset,
    "prime": EngineMethods._prime,
    "set_system": EngineMethods._set_system,
    "history": EngineMethods._history,
    "open": EngineMethods._open,
    "rename": EngineMethods._rename,
    "state": EngineMethods._get_state,
    "explain": EngineMethods._explain,
    "prompt": EngineMethods._prompt,
    "count": EngineMethods._count,
    "memory": EngineMethods._memory,
    "save_state": EngineMethods._save_state,
    "shutdown": EngineMethods._shutdown,
}


def _require_store(store: Store | None) -> Store:
    if store is None:
        raise UsageError("cannot open a conversation: conversations are not being saved")
    return store


def _reply_settings(params: Params) -> dict[str, Any]:
    return params["settings"] or {}


def _model_info(engine: Engine, session: Session) -> Result:
    model, thinks = engine.model, engine.thinks_by_default
    return {
        "name": engine.name,
        "path": str(engine.folder),
        "nbytes": model.nbytes,
        "bits_per_weight": 8 * model.nbytes / max(model.parameters, 1),
        "max_position_embeddings": engine.config.max_position_embeddings,
        "context_limit": session.context_limit,
        "moe": engine.config.is_moe,
        "mtp": model.mtp is not None,
        "can_preserve_thinking": engine.template.can_preserve_thinking,
        "thinks_by_default": thinks,
        "notices": [*engine.notices, *model.repairs],
        "parameters": asdict(resolve_sampling({}, engine.generation_config, thinks)),
        "template": engine.template.source,
        "bytes_per_token": model.step_nbytes,
    }
