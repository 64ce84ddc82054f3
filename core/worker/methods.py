"""What an engine process does when asked: one method of the protocol after another, on one session.

Owns engine, session and store. Knows nothing of pipes and threads: it tells events and is asked to cancel.
Raises QchatError for whatever cannot be done, and what MLX raises.
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
from ..storage.store import Store
from .jobs import run_job
from .protocol import JOB_METHODS, Cancelled

COMPILING = "compiling faster kernels for this model"
# what a session is made with; the rest of a load's parameters says where from
SESSION_OPTIONS = ("system", "history", "quantized_kv", "context_limit", "snapshot_budget")
# of these, what a stored conversation brings along
STORED_OPTIONS = ("system", "history")

Result = dict[str, Any]
Params = Mapping[str, Any]


class Desk:
    """One engine with one session at a time, both absent before `load`."""

    def __init__(
        self,
        tell: Callable[[dict[str, Any]], None],
        cancelled: Callable[[], bool],
        *,
        background: Callable[[str], None] | None = None,
        wake: Callable[[], None] = lambda: None,
    ):
        """`tell` takes events of the request at hand; `cancelled` says whether it is to stop.

        `background` takes one line about work that no request waits for, and an empty one when that is done;
        `wake` asks, from any thread, for a call of `spare_work`.
        """
        self._tell, self._cancelled = tell, cancelled
        self._background, self._wake = background or (lambda _: None), wake
        self._engine: Engine | None = None
        self._session: Session | None = None
        self._store: Store | None = None
        self._options: dict[str, Any] = {}
        self._bandwidth: float | None = None
        self._replied = False

    def do(self, method: str, params: Params) -> Result:
        """The result of one of `protocol.METHODS`, whose parameters are checked."""
        if self._cancelled():
            raise Cancelled("cancelled before it began")
        if method in JOB_METHODS:
            return run_job(method, params, self._report)
        return _METHODS[method](self, params)

    def cancel(self) -> None:
        """Stop the reply under way; from any thread."""
        if (session := self._session) is not None:
            session.cancel()

    def close_thought(self) -> None:
        """End the thought under way; from any thread."""
        if (session := self._session) is not None:
            session.close_thought()

    def figures(self) -> dict[str, Any]:
        """The memory, from MLX's counters; from any thread."""
        return {
            "active_nbytes": mx.get_active_memory(),
            "cache_nbytes": mx.get_cache_memory(),
            "peak_nbytes": mx.get_peak_memory(),
            "limit_nbytes": device_limit_nbytes(),
            "copy_bandwidth": self._bandwidth,
        }

    def spare_work(self) -> Generator[None]:
        """Piece by piece what can be done while nothing is asked: compile kernels, measure the machine, read
        ahead."""
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
            self._session.live.forget()  # the next question reads it, and says what is wrong
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
        """Close the store; nothing is saved that was not yet."""
        if self._store is not None:
            self._store.close()

    def _report(self, event: dict[str, Any]) -> None:
        if self._cancelled():
            raise Cancelled("cancelled")
        self._tell(event)

    @property
    def _here(self) -> Session:
        if self._session is None:
            raise UsageError("no model is loaded")
        return self._session

    def _state(self) -> Result:
        return {"state": describe_session(self._here)}

    # the model

    def _load(self, params: Params) -> Result:
        ReplySettings.parse(params["defaults"] or {})
        if params["history"] not in (None, *get_args(History)):
            raise UsageError(f"history is {params['history']!r:.40}, wanted {' or '.join(get_args(History))}")
        given = {name: params[name] for name in SESSION_OPTIONS if params[name] is not None}
        given |= params["defaults"] or {}
        with ExitStack() as on_failure:
            store = self._store
            if params["store"] is not None and (store is None or str(store.path) != params["store"]):
                store = Store(params["store"])
                on_failure.callback(store.close)
            if params["conversation"] is not None:
                _kept(store).conversation(params["conversation"])  # refused before anything is given up
            self._engine = engine = Engine.load(params["model"], self._loading)
            self._options = {name: value for name, value in given.items() if name not in STORED_OPTIONS}
            if params["conversation"] is not None:
                self._session = Session.reopen(engine, _kept(store), params["conversation"], **given)
            else:
                self._session = Session(engine, store=store, **given)
            on_failure.pop_all()
        if store is not self._store:
            self.close()
            self._store = store
        self._tell_loaded(engine.model.nbytes, engine.model.nbytes, "")
        return {"model": _model_info(engine, self._session), **self._state()}

    def _loading(self, done: int, total: int, tensor: str) -> None:
        """The folder is checked by now, so the model before it can go; with both, memory might not do."""
        if self._engine is not None:
            self._drop()
        if self._cancelled():
            raise Cancelled("the loading was cancelled")
        self._tell_loaded(done, total, tensor)

    def _tell_loaded(self, done: int, total: int, tensor: str) -> None:
        self._tell({"event": "load", "done_nbytes": done, "total_nbytes": total, "detail": tensor})

    def _drop(self) -> None:
        self._engine = self._session = None
        gc.collect()  # its layers and their fused functions hold each other
        mx.clear_cache()
        drop_collected()
        self._tell({"event": "unloaded"})

    def _unload(self, _: Params) -> Result:
        self._drop()
        return {}

    # replies

    def _reply(self, begin: Callable[[Session], Generator[Event]]) -> Result:
        session = self._here
        with closing(begin(session)) as events:
            if self._cancelled():
                session.cancel()  # it came before there was a reply to stop
            for event in events:
                self._tell(to_json(event))
        self._replied = True
        return self._state()

    def _send(self, params: Params) -> Result:
        settings = _settings(params)
        return self._reply(lambda session: session.stream(params["text"], **settings))

    def _retry(self, params: Params) -> Result:
        settings = _settings(params)
        return self._reply(lambda session: session.retry(**settings))

    def _edit(self, params: Params) -> Result:
        settings = _settings(params)
        return self._reply(lambda session: session.edit(params["turn"], params["text"], **settings))

    def _answer_tools(self, params: Params) -> Result:
        settings, results = _settings(params), params["results"]
        if not all(isinstance(result, str) for result in results):
            raise UsageError("results are no list of texts")
        return self._reply(lambda session: session.answer_tools(results, **settings))

    # the conversation

    def _undo(self, _: Params) -> Result:
        return {"question": self._here.undo(), **self._state()}

    def _fork(self, params: Params) -> Result:
        self._here.fork(params["turn"])
        return self._state()

    def _switch(self, params: Params) -> Result:
        self._here.switch(params["number"])
        return self._state()

    def _reset(self, _: Params) -> Result:
        self._here.reset()
        return self._state()

    def _prime(self, params: Params) -> Result:
        self._here.prime(params["messages"])
        return self._state()

    def _set_system(self, params: Params) -> Result:
        self._here.set_system(params["text"])
        return self._state()

    def _history(self, params: Params) -> Result:
        self._here.history = params["mode"]
        return self._state()

    def _open(self, params: Params) -> Result:
        session, store = self._here, _kept(self._store)
        try:
            session.save_state()
        except DoesNotFit as error:
            self._tell(to_json(Notice(str(error))))
        self._session = Session.reopen(session.engine, store, params["conversation"], **self._options)
        return self._state()

    def _rename(self, params: Params) -> Result:
        self._here.rename(params["title"])
        return self._state()

    # questions about it

    def _explain(self, _: Params) -> Result:
        return describe_cache(self._here)

    def _prompt(self, params: Params) -> Result:
        ids = self._here.prompt_ids(params["text"], **_settings(params))
        return {"text": self._here.engine.tokenizer.decode_with_special(ids), "tokens": len(ids)}

    def _count(self, params: Params) -> Result:
        return {"tokens": len(self._here.engine.tokenizer.encode(params["text"], special=False))}

    def _memory(self, _: Params) -> Result:
        session = self._here
        return {
            **self.figures(),
            "weights_nbytes": session.engine.model.nbytes,
            "context_nbytes": session.live.cache.nbytes,
            "snapshot_nbytes": session.live.snapshots.nbytes,
            "snapshot_budget_nbytes": session.live.snapshots.budget_nbytes,
        }

    def _save_state(self, _: Params) -> Result:
        return {"saved": self._here.save_state()}

    def _nothing(self, _: Params) -> Result:
        return {}

    def _tell_state(self, _: Params) -> Result:
        return self._state()


_METHODS: Mapping[str, Callable[[Desk, Params], Result]] = {
    "load": Desk._load,
    "unload": Desk._unload,
    "send": Desk._send,
    "retry": Desk._retry,
    "edit": Desk._edit,
    "answer_tools": Desk._answer_tools,
    "undo": Desk._undo,
    "fork": Desk._fork,
    "switch": Desk._switch,
    "reset": Desk._reset,
    "prime": Desk._prime,
    "set_system": Desk._set_system,
    "history": Desk._history,
    "open": Desk._open,
    "rename": Desk._rename,
    "state": Desk._tell_state,
    "explain": Desk._explain,
    "prompt": Desk._prompt,
    "count": Desk._count,
    "memory": Desk._memory,
    "save_state": Desk._save_state,
    "shutdown": Desk._nothing,
}


def _kept(store: Store | None) -> Store:
    if store is None:
        raise UsageError("no conversations are kept: none can be opened")
    return store


def _settings(params: Params) -> dict[str, Any]:
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
