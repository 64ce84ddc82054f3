"""A decode step of the whole network as one CUDA graph, which the host launches with a single call.

The kernels are those of `FusedDecoder` between an embedding and a head, recorded once (`kernels.recording`)
for states in a home of their own. A cache's states move in before its first step, and out when the cache is
copied or another one moves in. There are two homes, of which each step reads one and writes the other. Keys
and values stay in the cache's arrays, whose addresses are parameters of the graph; they are written behind
those that anyone else reads.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import NamedTuple
from weakref import ReferenceType, ref

from ..errors import UsageError
from ..kernels import rows
from ..kernels.cuda_driver import DriverError, Graph, driver
from ..kernels.decode_attention import WORDS, split_count
from ..kernels.launch import backend
from ..kernels.recording import (
    Buffers,
    Recording,
    addresses,
    copy_after,
    graph_of,
    read_with_addresses,
    signal,
)
from ..machine.backend import mx
from ..ops import fused_matvec
from ..ops.agreement import relative_rms
from ..ops.fused_matvec import Norm, Weight
from .cache import Cache, DeltaState, KVCache, give_back
from .fused_layers import FusedAttentionLayer, FusedDeltaLayer

ALIGNMENT = 256  # bytes
SCALARS = 4  # parameters of a step before those of the caches
LOWER = 0xFFFFFFFF  # 32 bits
LIMIT = 1e-3  # relative RMS of a step's output between the graph and launches of the same kernels

Arrays = list[mx.array]


class Ends(NamedTuple):
    """What comes before and after the layers: the embedding's table, the final norm and the head."""

    table: Weight
    norm: Norm
    head: Weight


class Step(NamedTuple):
    """A recorded step from one home to the other, its output x [1, hidden] and its logits [1, V]."""

    graph: Graph
    recording: Recording  # which keeps the arrays of the graph
    x: mx.array
    logits: mx.array


def wanted() -> bool:
    """Whether steps should be graphs where they can be. Raises UsageError for a bad QCHAT_GRAPHS."""
    choice = os.environ.get("QCHAT_GRAPHS", "auto")
    if choice not in ("auto", "off"):
        raise UsageError(f"QCHAT_GRAPHS is {choice!r}, wanted auto, off")
    return choice == "auto" and backend() == "cuda"


class StepGraph:
    """The step of one model and one token; `notice` says why it is not used and will not be."""

    def __init__(self, layers: Sequence[FusedAttentionLayer | FusedDeltaLayer], ends: Ends):
        self.notice: str | None = None
        self._layers, self._ends = layers, ends
        self._key_likes = [layer.key_like for layer in layers if isinstance(layer, FusedAttentionLayer)]
        # of a step: its number, its id, the id's position, that of its rotation, and where the caches of all
        # attentions are
        self._parameters = mx.zeros((SCALARS + WORDS * len(self._key_likes),), mx.uint32)
        self._done, self._number = mx.zeros((1,), mx.uint32), 0  # the last step that has ended, has begun
        self._buffers = Buffers()
        self._steps: dict[tuple[int, int], Step] = {}
        self._homes: list[Home] = []
        self._turn = 0  # the home whose states are the latest
        self._tenants: list[ReferenceType[DeltaState]] = []
        self._places: list[int] = []  # of what the graphs read and write
        self._last: Arrays = []  # what the last step returned
        self._parts: Arrays = []  # the keys and values that it writes
        self._sources: Arrays = []  # what is copied home
        self._trusted = False

    @classmethod
    def of(cls, layers: Sequence[FusedAttentionLayer | FusedDeltaLayer], ends: Ends) -> "StepGraph | None":
        """Return the step between these ends; None where it is not wanted, or kernels cannot read them."""
        attend = any(isinstance(layer, FusedAttentionLayer) for layer in layers)
        fits = attend and fused_matvec.supports(ends.table) and fused_matvec.supports(ends.head)
        return cls(layers, ends) if fits and wanted() and fused_matvec.uses_own_matvec() else None

    def takes(self, ids: mx.array, cache: Cache) -> bool:
        """Whether `read` takes these ids."""
        return self.notice is None and ids.size == 1 and not cache.quantized

    def read(
        self, token: mx.array, cache: Cache, plain: Callable[[mx.array, Cache], mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """Read one id [1] into the layers of `cache`; the device may still compute when this returns.

        Returns x [1, hidden] before the final norm, and logits [1, V] float32 or None. `plain` does the same
        by launches: the first time, as later steps are graphs only if that gives the same x, and where a
        graph cannot be made or launched.
        """
        twin = cache if self._trusted else cache.copy()
        expected = None if self._trusted else plain(token, cache)
        try:
            x, logits = self._step_on(token, twin)
            if expected is None:
                return x, logits
            error = relative_rms(x, expected)
            self._trusted = error < LIMIT  # not for NaN
            if not self._trusted:
                self._give_up(f"it would be off by {error:.2g}")
        except DriverError as problem:
            self._give_up(str(problem))
            if expected is None:
                for memory in cache.layers:
                    if isinstance(memory, KVCache):
                        memory.trim(1)
                expected = plain(token, cache)
        return expected, None

    def _give_up(self, reason: str) -> None:
        self.notice = f"a step is not a CUDA graph here, which is slower: {reason}"

    def _step_on(self, token: mx.array, cache: Cache) -> tuple[mx.array, mx.array]:
        """Do what `read` does, as a graph. Raises DriverError."""
        states = [memory for memory in cache.layers if isinstance(memory, DeltaState)]
        keys = [memory for memory in cache.layers if isinstance(memory, KVCache)]
        parts = [
            part
            for memory, like in zip(keys, self._key_likes, strict=True)
            for part in memory.extend(1, [like, like])
        ]
        self._move_in(states)
        own = [self._parameters, self._done, *(home.whole for home in self._homes)]
        # the last step's results are computed before this one writes in their place
        number, places = read_with_addresses(token, [*own, *parts], self._last)
        self._check(places[: len(own)])
        self._number = (self._number + 1) & LOWER
        scalars = [self._number, number, cache.length, cache.length + cache.shift]
        driver().write(places[0], [*scalars, *words_of(parts, places[len(own) :])])
        step = self._step(split_count(max(part.shape[2] for part in parts)))
        step.graph.run()
        self._parts = parts
        self._turn = 1 - self._turn
        self._lend(states)
        x, logits = self._last = copy_after(self._done, self._number, [step.x, step.logits])
        return x, logits

    def _move_in(self, states: list[DeltaState]) -> None:
        """Copy states that are not at home to the latest home."""
        if self._homes and all(
            one.state is state for one, (_, state) in zip(states, self._homes[self._turn].states, strict=True)
        ):
            return
        give_back([one for one in (tenant() for tenant in self._tenants) if one is not None])
        self._sources = [mx.contiguous(array) for memory in states for array in memory.arrays()]
        self._homes = self._homes or [Home.like(self._sources), Home.like(self._sources)]
        targets = list(chain.from_iterable(self._homes[self._turn].states))
        places = addresses([*self._sources, *targets])
        for array, source, target in zip(self._sources, places, places[len(targets) :], strict=False):
            driver().copy(target, source, array.nbytes)

    def _lend(self, states: list[DeltaState]) -> None:
        """Point `states` at the arrays of the latest home."""
        for memory, (conv, state) in zip(states, self._homes[self._turn].states, strict=True):
            memory.conv, memory.state, memory.lent = conv, state, state
        self._tenants = [ref(memory) for memory in states]

    def _check(self, places: list[int]) -> None:
        """Drop graphs for other places than these: MLX moves an array when the host reads it."""
        if places != self._places:
            self._steps.clear()
            self._places = places

    def _step(self, splits: int) -> Step:
        """Return the step from the latest home, with so many splits of the context."""
        key = (splits, self._turn)
        if key not in self._steps:
            self._steps[key] = self._record(splits)
        return self._steps[key]

    def _record(self, splits: int) -> Step:
        number, token, offset, turned = (self._parameters[n : n + 1] for n in range(SCALARS))
        before, after = (iter(self._homes[turn].states) for turn in (self._turn, 1 - self._turn))
        found = iter(range(SCALARS, self._parameters.size, WORDS))
        recording = Recording(self._buffers)
        with recording.active():
            x = rows.embed(token, self._ends.table)
            for layer in self._layers:
                if isinstance(layer, FusedDeltaLayer):
                    conv, state = next(after)
                    with recording.into(new_conv=conv, new_state=state):
                        x, *_ = layer.forward_fused(x, *next(before))
                else:
                    first = next(found)
                    found_at = self._parameters[first : first + WORDS]
                    x = layer.after(x, layer.attend_in_place(x, turned, offset, found_at, splits))
            logits = fused_matvec.logits(x, self._ends.head, norm=self._ends.norm)
            signal(self._done, number, recording)
        return Step(graph_of(recording, driver()), recording, x, logits)


def words_of(parts: Arrays, places: list[int]) -> Iterator[int]:
    """Yield the WORDS that describe each cache: `parts` are keys and values of each, at `places`."""
    for part, keys, values in zip(parts[::2], places[::2], places[1::2], strict=True):
        yield from (keys & LOWER, keys >> 32, values & LOWER, values >> 32, part.shape[2])


class Home(NamedTuple):
    """Room for the states of all delta nets: one array, and the two states of each net as views of it."""

    whole: mx.array
    states: list[tuple[mx.array, mx.array]]

    @classmethod
    def like(cls, arrays: Arrays) -> "Home":
        """Return room for `arrays`, two per net."""
        ends = list(accumulate((aligned_nbytes(array) for array in arrays), initial=0))
        whole = mx.zeros((ends[-1],), mx.uint8)
        views = [
            whole[end : end + array.nbytes].view(array.dtype).reshape(array.shape)
            for array, end in zip(arrays, ends, strict=False)
        ]
        mx.eval(whole, views)
        return cls(whole, list(zip(views[::2], views[1::2], strict=True)))


def aligned_nbytes(array: mx.array) -> int:
    """Return the array's bytes up to the next multiple of ALIGNMENT."""
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT
