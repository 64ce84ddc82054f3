"""One model on several ranks: rank 0 leads and serves all requests, the others follow its operations.

Before each operation on its part of a model, rank 0 sends the others a line over a socket: the operation, the
cache and the number of tokens. Ids and hidden states are broadcast as a sum over ranks, so no rank waits for
a value on its host. Conversations, sampling and files exist on rank 0 only, as if it ran the model alone.
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
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import Progress
from ..errors import DoesNotFit, GenerationError, ModelError, QchatError, UsageError
from ..machine.backend import mx, on_gpu
from ..model.cache import Cache
from ..model.network import Model
from ..ops.fused_matvec import MAX_FUSED_ROWS
from .loading import load_folder
from .ranks import Ranks, addresses, join_ranks

# ranks of one cluster connect at once or not at all
CONNECT_SECONDS, GREETING_SECONDS = 30.0, 3.0
SECRET_WORDS = 4
GRACE_SECONDS = 5.0
# an error of another rank is raised here by its exit code
ERRORS_BY_CODE = {kind.exit_code: kind for kind in (UsageError, ModelError, DoesNotFit)}
# fields of a memory plan for which the smallest value of all ranks counts
PLAN_LIMITS = ("context", "chunk", "free_nbytes")
DISCONNECTED = "another rank has disconnected: restart all ranks"


def load_model(folder: Path, config: ModelConfig, progress: Progress | None = None) -> Model:
    """Load the model in `folder`, on all ranks if there are several, and compile its kernels.

    Raises as `load_folder` does, for other ranks too, and GenerationError where one has disconnected.
    """
    ranks = join_ranks()
    if ranks is None:
        model = load_folder(Model, folder, config, progress)
    elif ranks.rank:
        raise UsageError(
            f"rank {ranks.rank} was to load a model by itself: it is to call qchat.core.follow()"
        )
    else:
        source = str(folder.resolve())
        load = partial(load_folder, LeaderModel, folder, config)
        model = LeaderModel.load_on_ranks(ranks, source, load, progress)
    if on_gpu():
        if progress:
            progress(model.nbytes, model.nbytes, "kernels")
        model.warm_up()
    return model


class Followers:
    """Rank 0's connections to all other ranks."""

    def __init__(self, ranks: Ranks):
        """Wait for the others to connect. Raises GenerationError where they do not."""
        self.ranks = ranks
        self._numbers = 0
        self._to_drop: deque[int] = deque()
        by_rank: dict[int, socket.socket] = {}
        secret = [secrets.randbits(31) for _ in range(SECRET_WORDS)]
        try:
            with socket.create_server((_leader_address(), 0)) as server:
                server.settimeout(CONNECT_SECONDS)
                ranks.broadcast_ints([server.getsockname()[1], *secret])
                while len(by_rank) < ranks.size - 1:
                    follower = server.accept()[0]
                    if (rank := _authenticate(follower, secret)) is None:
                        follower.close()
                    else:
                        by_rank[rank] = follower
        except OSError as error:
            raise GenerationError(f"cannot reach the other ranks: {error.strerror or error}") from error
        self._sockets = [by_rank[rank] for rank in sorted(by_rank)]

    def next_number(self) -> int:
        """Return a new number for a model or a cache."""
        self._numbers += 1
        return self._numbers

    def drop(self, number: int, when: object = None) -> None:
        """Have the others drop a model or cache with the next operation, or once `when` is collected here."""
        if when is None:
            self._to_drop.append(number)
        else:
            weakref.finalize(when, self._to_drop.append, number)

    def send(self, operation: str, *arguments: Any) -> None:
        """Have all others execute `operation`. Raises GenerationError where one has disconnected."""
        if not self._sockets:
            raise GenerationError("the ranks are out of step: restart all of them")
        dropped = [self._to_drop.popleft() for _ in range(len(self._to_drop))]
        line = json.dumps([operation, *arguments, dropped]).encode() + b"\n"
        try:
            for follower in self._sockets:
                follower.sendall(line)
        except OSError as error:
            raise GenerationError(DISCONNECTED) from error

    def receive_answers(self) -> list[dict[str, Any]]:
        """Return each rank's answer to the last operation. Raises GenerationError if one has disconnected."""
        found = []
        for follower in self._sockets:
            with follower.makefile("r") as lines:
                line = lines.readline()
            if not line:
                raise GenerationError(DISCONNECTED)
            found.append(json.loads(line))
        return found

    @contextmanager
    def disconnect_on_error(self) -> Iterator[None]:
        """Disconnect the others after an operation fails here, because they wait for the rest of it."""
        try:
            yield
        except BaseException:
            for follower in self._sockets:
                follower.close()
            self._sockets = []
            raise

    def send_drops(self) -> None:
        """Have the others drop now what waits for the next operation."""
        if self._to_drop:
            self.send("drop")

    def stop(self) -> None:
        """Stop the others once all operations have finished; waits a few seconds for their answers."""
        with suppress(GenerationError, OSError, RuntimeError):
            self.send("end")
            mx.synchronize()
            for follower in self._sockets:
                follower.settimeout(GRACE_SECONDS)
            self.receive_answers()


def _authenticate(follower: socket.socket, secret: list[int]) -> int | None:
    """Return the rank of a new connection; None for one that does not know the secret."""
    follower.settimeout(GREETING_SECONDS)
    with suppress(OSError, ValueError), follower.makefile("r") as lines:
        match json.loads(lines.readline(1000)):
            case [int(rank), *words] if words == secret:
                follower.settimeout(None)
                follower.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return rank
    return None


_running: list[Followers] = []


def _connect_followers(ranks: Ranks) -> Followers:
    """Return this process's connections to the other ranks; connect on first use."""
    if not _running:
        _running.append(Followers(ranks))
        atexit.register(stop_followers)
    return _running[0]


def stop_followers() -> None:
    """Stop the followers of this process, if there are any."""
    for followers in _running:
        followers.stop()


class LeaderModel(Model):
    """Rank 0's part of a model; the other ranks repeat its operations on theirs."""

    followers: Followers
    number: int
    shared = True

    @classmethod
    def load_on_ranks(
        cls,
        ranks: Ranks,
        source: str,
        load: Callable[[Progress], "LeaderModel"],
        progress: Progress | None = None,
    ) -> "LeaderModel":
        """Have every rank load its part of `source`, this one with `load`. Raises as `load_model` does.

        The others start at the first progress here: by then a previous model has freed its memory.
        """
        followers = _connect_followers(ranks)
        number, sent = followers.next_number(), False

        def report(done: int, total: int, tensor: str) -> None:
            nonlocal sent
            if progress:
                progress(done, total, tensor)
            if not sent:
                sent = True
                followers.send("load", number, source)

        try:
            model = load(report)
            if not sent:
                report(0, 0, "")
        except BaseException:
            if sent:
                followers.receive_answers()
                followers.drop(number)
            raise
        followers.drop(number, when=model)
        model.followers, model.number = followers, number
        model._apply_answers(followers.receive_answers())
        return model

    def _apply_answers(self, answers: list[dict[str, Any]]) -> None:
        """Raise the first error of another rank; limit the memory plan to the smallest of all ranks."""
        for rank, answer in enumerate(answers, 1):
            if answer["error"]:
                raise ERRORS_BY_CODE.get(answer["code"], GenerationError)(f"rank {rank}: {answer['error']}")
        if self.plan is not None:
            plans = [vars(self.plan), *(answer["plan"] for answer in answers if answer["plan"])]
            self.plan = replace(self.plan, **{name: min(p[name] for p in plans) for name in PLAN_LIMITS})

    def new_cache(self, *, quantized: bool = False) -> Cache:
        cache = LeaderCache.wrap(super().new_cache(quantized=quantized), self.followers)
        with suppress(GenerationError):  # the first read into the cache raises it
            self.followers.send("cache", self.number, cache.number, quantized)
        return cache

    def hidden(self, ids: Any, cache: Cache) -> mx.array:
        if not isinstance(cache, LeaderCache):
            raise TypeError("the cache belongs to one rank alone: make it with new_cache")
        ids = ids if isinstance(ids, mx.array) else mx.array(list(ids))
        self.followers.send("hidden", self.number, cache.number, ids.size)
        with self.followers.disconnect_on_error():
            x = super().hidden(self.followers.ranks.broadcast(ids.astype(mx.int32)), cache)
            mx.async_eval(x, *cache.arrays())
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        if not self.gathers:
            return super().logits(hidden)
        self.followers.send("logits", self.number, hidden.shape[1])
        with self.followers.disconnect_on_error():
            logits = super().logits(self.followers.ranks.broadcast(hidden))
            mx.async_eval(logits)
        return logits


class LeaderCache(Cache):
    """Rank 0's part of a cache; the other ranks hold theirs under the same number."""

    followers: Followers
    number: int

    @classmethod
    def wrap(cls, cache: Cache, followers: Followers) -> "LeaderCache":
        """Give `cache` a number on the other ranks, which drop theirs once it is collected here."""
        wrapped = cls(cache.layers, cache.length, cache.hidden, cache.draft, cache.draft_end)
        wrapped.followers, wrapped.number = followers, followers.next_number()
        followers.drop(wrapped.number, when=wrapped)
        return wrapped

    def copy(self) -> Cache:
        twin = LeaderCache.wrap(super().copy(), self.followers)
        self.followers.send("copy", self.number, twin.number)
        return twin

    def share(self, other: Cache) -> None:
        super().share(other)
        self._change_on_followers("share", other)

    def own(self) -> None:
        super().own()
        self._change_on_followers("own")

    def reclaim(self) -> None:
        super().reclaim()
        self._change_on_followers("reclaim")

    def drop_states(self) -> None:
        super().drop_states()
        self._change_on_followers("drop_states")

    def take_states(self, other: Cache) -> None:
        super().take_states(other)
        self._change_on_followers("take_states", other)

    def _change_on_followers(self, method: str, *others: Cache) -> None:
        numbers = [other.number for other in others if isinstance(other, LeaderCache)]
        if len(numbers) < len(others):
            raise TypeError("the cache belongs to one rank alone, and this one to all")
        self.followers.send("change", self.number, method, *numbers)


def drop_collected() -> None:
    """Have the followers of this process, if there are any, drop now what was collected here."""
    for followers in _running:
        with suppress(GenerationError):  # a disconnected rank holds nothing any more
            followers.send_drops()


Load = Callable[[str], Model]


def follow(load: Load | None = None) -> None:
    """Repeat rank 0's operations on this rank's part of its models, until rank 0 ends.

    `load` loads the part from the source that rank 0 names, by default a folder. Raises GenerationError where
    rank 0 cannot be reached or an operation fails, UsageError where this process is the only rank.
    """
    ranks = join_ranks()
    if ranks is None:
        raise UsageError("this process is the only rank: start several with mlx.launch -n 2 -- qchat ...")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what ctrl+c does
    port, *secret = ranks.broadcast_ints([0] * (1 + SECRET_WORDS))
    try:
        leader = socket.create_connection((_leader_address(), port), CONNECT_SECONDS)
    except OSError as error:
        raise GenerationError(f"cannot reach rank 0: {error.strerror or error}") from error
    leader.settimeout(None)
    follower = _Follower(ranks, load or _load_folder)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(leader, lines), name="leader", daemon=True).start()
    with suppress(OSError):  # rank 0 may end before it receives the answer
        _send_json(leader, [ranks.rank, *secret])
        while (line := lines.get()) is not None:
            try:
                answer = follower.execute(json.loads(line))
            except RuntimeError as error:  # what MLX raises
                raise GenerationError(f"rank {ranks.rank}: {' '.join(str(error).split())}") from error
            if answer is not None:
                _send_json(leader, answer)


def _receive(leader: socket.socket, lines: "queue.SimpleQueue[str | None]") -> None:
    """Put the lines of rank 0 into `lines`; end this process soon after rank 0 ends.

    A sum over ranks that rank 0 does not join would never finish.
    """
    with suppress(OSError), leader.makefile("r") as file:
        for line in file:
            lines.put(line)
    lines.put(None)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _send_json(leader: socket.socket, value: Any) -> None:
    leader.sendall(json.dumps(value).encode() + b"\n")


def _load_folder(path: str) -> Model:
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"there is no folder {path} on this machine: every rank needs it at the same path")
    return load_folder(Model, folder, ModelConfig.load(folder))


class _Follower:
    """This rank's models and caches by the numbers that rank 0 gave them."""

    def __init__(self, ranks: Ranks, load: Load):
        self._ranks, self._load = ranks, load
        self._models: dict[int, Model] = {}
        self._caches: dict[int, Cache] = {}

    def execute(self, line: list[Any]) -> dict[str, Any] | None:
        """Execute one operation; returns the answer to rank 0, if it needs one."""
        operation, *arguments, dropped = line
        for number in dropped:
            self._caches.pop(number, None)
            if self._models.pop(number, None) is not None:
                gc.collect()  # its layers and their fused functions hold each other
                mx.clear_cache()
        return _OPERATIONS[operation](self, *arguments)

    def _load_model(self, number: int, source: str) -> dict[str, Any]:
        try:
            model = self._models[number] = self._load(source)
        except (QchatError, MemoryError, RuntimeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            code = DoesNotFit.exit_code if isinstance(error, MemoryError) else getattr(error, "exit_code", 1)
            return {"error": text, "code": code, "plan": None}
        plan = model.plan and {name: vars(model.plan)[name] for name in PLAN_LIMITS}
        return {"error": "", "code": 0, "plan": plan}

    def _drop(self) -> None:
        """Do nothing: every operation lists what to drop."""

    def _end(self) -> dict[str, Any]:
        mx.synchronize()
        return {}

    def _cache(self, model: int, number: int, quantized: bool) -> None:
        self._caches[number] = self._models[model].new_cache(quantized=quantized)

    def _copy(self, number: int, twin: int) -> None:
        self._caches[twin] = self._caches[number].copy()

    def _change(self, number: int, method: str, *others: int) -> None:
        """Change the keys and values that a cache shares: `method` is one of LeaderCache's."""
        getattr(self._caches[number], method)(*(self._caches[other] for other in others))

    def _hidden(self, model: int, number: int, tokens: int) -> None:
        cache = self._caches[number]
        ids = self._ranks.broadcast(mx.zeros(tokens, mx.int32))
        x = self._models[model].hidden(ids, cache)
        if tokens <= MAX_FUSED_ROWS:
            mx.async_eval(x, *cache.arrays())
            return
        mx.eval(x, *cache.arrays())
        mx.clear_cache()

    def _logits(self, number: int, tokens: int) -> None:
        model = self._models[number]
        placeholder = mx.zeros((1, tokens, model.config.hidden_size), model.policy.activations)
        mx.async_eval(model.logits(self._ranks.broadcast(placeholder)))


_OPERATIONS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "load": _Follower._load_model,
    "cache": _Follower._cache,
    "copy": _Follower._copy,
    "change": _Follower._change,
    "hidden": _Follower._hidden,
    "logits": _Follower._logits,
    "drop": _Follower._drop,
    "end": _Follower._end,
}


def _leader_address() -> str:
    """Return the address of rank 0, which `mlx.launch` sets. Raises UsageError for an unknown backend."""
    if hosts := addresses():
        return hosts[0]
    if host := os.environ.get("NCCL_HOST_IP"):
        return host
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    raise UsageError("ranks were started by a backend other than ring, nccl and jaccl")
