"""One model on several ranks behind one process that is asked: rank 0 leads, the others follow.

Before rank 0 computes with its part of a model it tells the others over a socket what: which operation, on
which cache, for how many tokens. What it computes with (ids, hidden states) reaches them as a sum over ranks
to which they add nothing, so that nobody waits for a value. Conversations, sampling and files are rank 0's
alone, which notices of the others no more than a model and caches.
"""

import atexit
import gc
import json
import os
import queue
import secrets
import signal
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import Progress
from ..errors import DoesNotFit, GenerationError, ModelError, QchatError, UsageError
from ..machine.backend import mx, on_gpu
from ..model.cache import Cache
from ..model.network import Model
from ..ops.fused_matvec import MAX_ROWS
from .ranks import Ranks, addresses, joined

# ranks of one cluster reach each other at once, or not at all
CONNECT_SECONDS, GREETING_SECONDS = 30.0, 3.0
SECRET_WORDS = 4
GRACE_SECONDS = 5.0
# what another rank refuses with an exit code is refused here
KINDS = {kind.exit_code: kind for kind in (UsageError, ModelError, DoesNotFit)}
# of a memory plan: the least of all ranks counts
LIMITS = ("context", "chunk", "free_nbytes")


def load_model(folder: Path, config: ModelConfig, progress: Progress | None = None) -> Model:
    """`Model.load`, together with the other ranks if there are any, its kernels compiled.

    Raises what `Model.load` does, also for another rank, and GenerationError where one has left.
    """
    ranks = joined()
    if ranks is None:
        model = Model.load(folder, config, progress)
    elif ranks.rank:
        raise UsageError(
            f"rank {ranks.rank} was to load a model by itself: it is to call qchat.core.follow()"
        )
    else:
        what = str(folder.resolve())
        model = LedModel.begin(ranks, what, lambda told: LedModel.load(folder, config, told), progress)
    if on_gpu():
        if progress:
            progress(model.nbytes, model.nbytes, "kernels")
        model.warm_up()
    return model


class Followers:
    """Rank 0's end of the sockets to all others."""

    def __init__(self, ranks: Ranks):
        """Waits for the others. Raises GenerationError where they do not come."""
        self.ranks = ranks
        self._numbers = 0
        self._dropped: deque[int] = deque()
        by_rank: dict[int, socket.socket] = {}
        secret = [secrets.randbits(31) for _ in range(SECRET_WORDS)]
        try:
            with socket.create_server((_leader_address(), 0)) as server:
                server.settimeout(CONNECT_SECONDS)
                ranks.agree([server.getsockname()[1], *secret])
                while len(by_rank) < ranks.size - 1:
                    follower = server.accept()[0]
                    if (rank := _greeted(follower, secret)) is None:
                        follower.close()
                    else:
                        by_rank[rank] = follower
        except OSError as error:
            raise GenerationError(f"the other ranks cannot be reached: {error.strerror or error}") from error
        self._sockets = [by_rank[rank] for rank in sorted(by_rank)]

    def allot(self) -> int:
        """A number for a model or a cache."""
        self._numbers += 1
        return self._numbers

    def drop(self, number: int, when: object = None) -> None:
        """Have the others drop what has this number: soon, or once `when` is collected here."""
        if when is None:
            self._dropped.append(number)
        else:
            weakref.finalize(when, self._dropped.append, number)

    def tell(self, operation: str, *arguments: Any) -> None:
        """Have all others do `operation`. Raises GenerationError where one has left."""
        if not self._sockets:
            raise GenerationError("the ranks have lost step: start all of them again")
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        line = json.dumps([operation, *arguments, dropped]).encode() + b"\n"
        try:
            for follower in self._sockets:
                follower.sendall(line)
        except OSError as error:
            raise GenerationError("another rank has left: start all of them again") from error

    def answers(self) -> list[dict[str, Any]]:
        """What each of the others says of what it was told last."""
        found = []
        for follower in self._sockets:
            with follower.makefile("r") as lines:
                line = lines.readline()
            if not line:
                raise GenerationError("another rank has left: start all of them again")
            found.append(json.loads(line))
        return found

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """What ends half way on this rank leaves the others waiting for the rest of it: they are let go."""
        try:
            yield
        except BaseException:
            for follower in self._sockets:
                follower.close()
            self._sockets = []
            raise

    def tell_dropped(self) -> None:
        """Have the others drop now what they are to drop."""
        if self._dropped:
            self.tell("drop")

    def end(self) -> None:
        """Let the others end, once what is under way has ended everywhere; who does not answer is left."""
        with suppress(GenerationError, OSError, RuntimeError):
            self.tell("end")
            mx.synchronize()
            for follower in self._sockets:
                follower.settimeout(GRACE_SECONDS)
            self.answers()


def _greeted(follower: socket.socket, secret: list[int]) -> int | None:
    """The rank of who knocked at the open port; None for a stranger, who does not know the secret."""
    follower.settimeout(GREETING_SECONDS)
    with suppress(OSError, ValueError), follower.makefile("r") as lines:
        match json.loads(lines.readline(1000)):
            case [int(rank), *words] if words == secret:
                follower.settimeout(None)
                follower.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return rank
    return None


_leading: list[Followers] = []


def _followers(ranks: Ranks) -> Followers:
    """One for the whole process."""
    if not _leading:
        _leading.append(Followers(ranks))
        atexit.register(let_go)
    return _leading[0]


def let_go() -> None:
    """Let the followers of this process end, if there are any."""
    for followers in _leading:
        followers.end()


class LedModel(Model):
    """Rank 0's part of a model whose other parts follow."""

    followers: Followers
    number: int
    shared = True

    @classmethod
    def begin(
        cls,
        ranks: Ranks,
        what: str,
        make: Callable[[Progress], "LedModel"],
        progress: Progress | None = None,
    ) -> "LedModel":
        """Have every rank load its part of `what`, this one by `make`. Raises as `load_model` does.

        The others begin at the first progress here, when a model before it has made room.
        """
        followers = _followers(ranks)
        number, told = followers.allot(), False

        def tell(done: int, total: int, tensor: str) -> None:
            nonlocal told
            if progress:
                progress(done, total, tensor)
            if not told:
                told = True
                followers.tell("load", number, what)

        try:
            model = make(tell)
            if not told:
                tell(0, 0, "")
        except BaseException:
            if told:
                followers.answers()
                followers.drop(number)
            raise
        followers.drop(number, when=model)
        model.followers, model.number = followers, number
        answers = followers.answers()
        for rank, answer in enumerate(answers, 1):
            if answer["error"]:
                raise KINDS.get(answer["code"], GenerationError)(f"rank {rank}: {answer['error']}")
        if model.plan is not None:
            plans = [vars(model.plan), *(answer["plan"] for answer in answers if answer["plan"])]
            model.plan = replace(model.plan, **{name: min(p[name] for p in plans) for name in LIMITS})
        return model

    def new_cache(self, *, quantized: bool = False) -> Cache:
        cache = LedCache.of(super().new_cache(quantized=quantized), self.followers)
        with suppress(GenerationError):  # whoever reads into it hears that the others are lost
            self.followers.tell("cache", self.number, cache.number, quantized)
        return cache

    def hidden(self, ids: Any, cache: Cache) -> mx.array:
        if not isinstance(cache, LedCache):
            raise TypeError("a cache of one rank alone")
        ids = ids if isinstance(ids, mx.array) else mx.array(list(ids))
        self.followers.tell("hidden", self.number, cache.number, ids.size)
        with self.followers.in_step():
            x = super().hidden(self.followers.ranks.broadcast(ids.astype(mx.int32)), cache)
            mx.async_eval(x, *cache.arrays())
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        if not self.gathers:
            return super().logits(hidden)
        self.followers.tell("logits", self.number, hidden.shape[1])
        with self.followers.in_step():
            logits = super().logits(self.followers.ranks.broadcast(hidden))
            mx.async_eval(logits)
        return logits


class LedCache(Cache):
    """A cache whose other parts follow."""

    followers: Followers
    number: int

    @classmethod
    def of(cls, cache: Cache, followers: Followers) -> "LedCache":
        led = cls(cache.layers, cache.length, cache.hidden, cache.ahead, cache.ahead_end)
        led.followers, led.number = followers, followers.allot()
        followers.drop(led.number, when=led)
        return led

    def copy(self) -> Cache:
        twin = LedCache.of(super().copy(), self.followers)
        self.followers.tell("copy", self.number, twin.number)
        return twin


def tell_dropped() -> None:
    """Have the followers of this process, if there are any, drop what was collected here."""
    for followers in _leading:
        with suppress(GenerationError):  # what is lost holds nothing any more
            followers.tell_dropped()


Load = Callable[[str], Model]


def follow(load: Load | None = None) -> None:
    """Do what rank 0 does, with this rank's part, until rank 0 ends.

    `load` makes the part of what rank 0 names, by default of a folder. Raises GenerationError where rank 0
    cannot be reached or the computation fails, UsageError where this process was started alone.
    """
    ranks = joined()
    if ranks is None:
        raise UsageError("a follower was started without others: mlx.launch -n 2 -- qchat ...")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what ctrl+c ends
    port, *secret = ranks.agree([0] * (1 + SECRET_WORDS))
    try:
        leader = socket.create_connection((_leader_address(), port), CONNECT_SECONDS)
    except OSError as error:
        raise GenerationError(f"rank 0 cannot be reached: {error.strerror or error}") from error
    leader.settimeout(None)
    follower = _Follower(ranks, load or _load_folder)
    told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(leader, told), name="leader", daemon=True).start()
    with suppress(OSError):  # rank 0 may be gone before it has heard the answer
        _say(leader, [ranks.rank, *secret])
        while (line := told.get()) is not None:
            try:
                answer = follower.do(json.loads(line))
            except RuntimeError as error:  # what MLX raises
                raise GenerationError(f"rank {ranks.rank}: {' '.join(str(error).split())}") from error
            if answer is not None:
                _say(leader, answer)


def _listen(leader: socket.socket, told: "queue.SimpleQueue[str | None]") -> None:
    """Pass on what rank 0 tells. After its death a sum that it does not join would never end."""
    with suppress(OSError), leader.makefile("r") as lines:
        for line in lines:
            told.put(line)
    told.put(None)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _say(leader: socket.socket, value: Any) -> None:
    leader.sendall(json.dumps(value).encode() + b"\n")


def _load_folder(path: str) -> Model:
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"there is no folder {path} on this machine: every rank needs it at the same place")
    return Model.load(folder, ModelConfig.load(folder))


class _Follower:
    """A rank's models and caches, by the numbers that rank 0 gave them."""

    def __init__(self, ranks: Ranks, load: Load):
        self._ranks, self._load = ranks, load
        self._models: dict[int, Model] = {}
        self._caches: dict[int, Cache] = {}

    def do(self, told: list[Any]) -> dict[str, Any] | None:
        """One operation; what rank 0 wants to hear of it."""
        operation, *arguments, dropped = told
        for number in dropped:
            self._caches.pop(number, None)
            if self._models.pop(number, None) is not None:
                gc.collect()  # its layers and their fused functions hold each other
                mx.clear_cache()
        return _OPERATIONS[operation](self, *arguments)

    def _make(self, number: int, what: str) -> dict[str, Any]:
        try:
            model = self._models[number] = self._load(what)
        except (QchatError, MemoryError, RuntimeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            code = DoesNotFit.exit_code if isinstance(error, MemoryError) else getattr(error, "exit_code", 1)
            return {"error": text, "code": code, "plan": None}
        plan = model.plan and {name: vars(model.plan)[name] for name in LIMITS}
        return {"error": "", "code": 0, "plan": plan}

    def _drop(self) -> None:
        """What is to be dropped comes with every operation."""

    def _end(self) -> dict[str, Any]:
        mx.synchronize()
        return {}

    def _cache(self, model: int, number: int, quantized: bool) -> None:
        self._caches[number] = self._models[model].new_cache(quantized=quantized)

    def _copy(self, number: int, twin: int) -> None:
        self._caches[twin] = self._caches[number].copy()

    def _hidden(self, model: int, number: int, tokens: int) -> None:
        kept = self._caches[number]
        ids = self._ranks.broadcast(mx.zeros(tokens, mx.int32))
        x = self._models[model].hidden(ids, kept)
        if tokens <= MAX_ROWS:
            mx.async_eval(x, *kept.arrays())
            return
        mx.eval(x, *kept.arrays())
        mx.clear_cache()

    def _logits(self, number: int, tokens: int) -> None:
        model = self._models[number]
        nothing = mx.zeros((1, tokens, model.config.hidden_size), model.policy.activations)
        mx.async_eval(model.logits(self._ranks.broadcast(nothing)))


_OPERATIONS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "load": _Follower._make,
    "cache": _Follower._cache,
    "copy": _Follower._copy,
    "hidden": _Follower._hidden,
    "logits": _Follower._logits,
    "drop": _Follower._drop,
    "end": _Follower._end,
}


def _leader_address() -> str:
    """The address of rank 0, which `mlx.launch` tells every rank. Raises UsageError for other backends."""
    if hosts := addresses():
        return hosts[0]
    if host := os.environ.get("NCCL_HOST_IP"):
        return host
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    raise UsageError("ranks were started by a backend other than ring, nccl and jaccl")
