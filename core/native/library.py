"""The compiled library of this process: found, compiled in the background, loaded, and its functions.

Environment: QCHAT_NATIVE (`auto`, `on`, `off`): `auto` uses the library on a Linux CPU once it is there, `on`
waits for the compiler and raises where there is no library, `off` leaves everything to MLX.
QCHAT_NATIVE_THREADS: how many threads compute; as a rule one per physical core that the process may use.
"""

import ctypes
import os
import sys
from ctypes import POINTER, c_float, c_int, c_int32, c_int64
from pathlib import Path

from ..errors import UsageError
from ..machine.backend import mx, on_gpu
from ..machine.files import cache_path
from . import compiler
from .structures import SIZES, DeltaNet, Matrix, Memory, Network, address

MAX_ROWS = 8  # tokens of one call

CPUS = Path("/sys/devices/system/cpu")


class Library:
    """The functions of one compiled file. Raises OSError for a file that is no library of ours."""

    def __init__(self, path: Path):
        self.path = path
        self._lib = lib = ctypes.CDLL(str(path))
        try:
            lib.qchat_sizes.argtypes = [POINTER(c_int64)]
            lib.qchat_takes.argtypes = [POINTER(Matrix)]
            lib.qchat_step.argtypes = [
                POINTER(Network),
                POINTER(Memory),
                POINTER(c_int32),
                c_int,
                c_int64,
                c_int64,
                POINTER(c_float),
            ]
            lib.qchat_product.argtypes = [POINTER(Matrix), ctypes.c_void_p, c_int, POINTER(c_float)]
            pointers = [ctypes.c_void_p] * 6
            lib.qchat_delta_rule.argtypes = [POINTER(DeltaNet), c_float, c_int, *pointers]
            lib.qchat_delta_commit.argtypes = [POINTER(DeltaNet), c_int, *pointers[:4]]
            lib.qchat_widen.argtypes = [POINTER(Matrix), ctypes.c_void_p]
            pointer = ctypes.c_void_p
            lib.qchat_norm.argtypes = [pointer, pointer, c_int, c_int, c_float, pointer]
            lib.qchat_gate.argtypes = [pointer, pointer, c_int, c_int, pointer]
            lib.qchat_softmax.argtypes = [pointer, c_int, c_int, c_int]
        except AttributeError as error:
            raise OSError(f"{path} lacks a function: {error}") from error
        sizes = (c_int64 * 4)()
        lib.qchat_sizes(sizes)
        if list(sizes) != SIZES:
            raise OSError(f"{path} has structures of {list(sizes)} bytes, wanted {SIZES}")
        self.threads: int = lib.qchat_threads(_threads())

    def takes(self, matrix: Matrix) -> bool:
        """Whether weights of this form can be read."""
        return bool(self._lib.qchat_takes(matrix))

    def step(
        self, network: Network, memories: ctypes.Array, ids: list[int], position: int, shift: int = 0
    ) -> mx.array:
        """Read `ids`, MAX_ROWS at most; hidden states [1, T, hidden] after the final norm, float32.

        The first id has `position` others before it, and is rotated by `shift` more.

        Raises ValueError for an id outside the vocabulary, MemoryError.
        """
        count = len(ids)
        if not all(0 <= id < network.vocabulary for id in ids):
            raise ValueError(f"ids {ids} are not all below {network.vocabulary:,}")
        found = (c_float * (count * network.hidden))()
        if self._lib.qchat_step(network, memories, (c_int32 * count)(*ids), count, position, shift, found):
            raise MemoryError("no memory for one decode step")
        return _array(found, (1, count, network.hidden))

    def product(self, matrix: Matrix, x: mx.array) -> mx.array:
        """x [T, K] float32, T at most MAX_ROWS, to [T, N] float32. Raises MemoryError."""
        x = mx.contiguous(x)
        mx.eval(x)
        found = (c_float * (x.shape[0] * matrix.rows))()
        if self._lib.qchat_product(matrix, address(x), x.shape[0], found):
            raise MemoryError("no memory for a product")
        return _array(found, (x.shape[0], matrix.rows))

    def delta_rule(self, net: DeltaNet, eps: float, inputs: list[mx.array], state: mx.array) -> mx.array:
        """The gated delta net between its projections, [T, Hv * Dv]; writes `state` [Hv, Dk, Dv] in place.

        `inputs` are the convolution's window [K-1+T, channels], z [T, Hv * Dv], a and b [T, Hv], all float32.
        Raises MemoryError.
        """
        window, z, a, b = inputs = [mx.contiguous(array) for array in inputs]
        found = mx.zeros(z.shape)
        mx.eval(found, state, *inputs)
        places = [address(array) for array in (window, z, a, b, state, found)]
        if self._lib.qchat_delta_rule(net, eps, z.shape[0], *places):
            raise MemoryError(f"no memory for {z.shape[0]} tokens of a delta net")
        return found

    def commit_delta(
        self, net: DeltaNet, count: int, keys: mx.array, decays: mx.array, updates: mx.array, state: mx.array
    ) -> None:
        """Write the state [1, Hv, Dk, Dv] after the first `count` tokens of a tentative step in place.

        `keys`, `decays` and `updates` are what that step left; `net` gives the sizes.
        """
        mx.eval(state)
        places = [address(array) for array in (keys, decays, updates, state)]
        self._lib.qchat_delta_commit(net, count, *places)

    def norm(self, x: mx.array, weight: mx.array, eps: float) -> mx.array:
        """Return the RMS norm of the rows of x [..., D] times weight [D], all float32."""
        x, weight, found = mx.contiguous(x), mx.contiguous(weight), mx.zeros(x.shape)
        mx.eval(x, weight, found)
        rows, width = x.size // x.shape[-1], x.shape[-1]
        self._lib.qchat_norm(address(x), address(weight), rows, width, eps, address(found))
        return found

    def gate(self, gate: mx.array, up: mx.array) -> mx.array:
        """Return silu(gate) * up, all of one shape and float32."""
        gate, up, found = mx.contiguous(gate), mx.contiguous(up), mx.zeros(up.shape)
        mx.eval(gate, up, found)
        rows, width = up.size // up.shape[-1], up.shape[-1]
        self._lib.qchat_gate(address(gate), address(up), rows, width, address(found))
        return found

    def softmax(self, scores: mx.array) -> mx.array:
        """Return the softmax of scores [..., T, S] float32 over what each of the last T positions may see.

        Computed in place: nobody else may hold the scores.
        """
        scores = mx.contiguous(scores)
        mx.eval(scores)
        tokens, width = scores.shape[-2:]
        self._lib.qchat_softmax(address(scores), scores.size // width, tokens, width)
        return scores

    def widen(self, matrix: Matrix) -> mx.array:
        """The matrix as float32 [N, K]."""
        found = mx.zeros((matrix.rows, matrix.columns))
        mx.eval(found)
        self._lib.qchat_widen(matrix, address(found))
        return found


def _array(found: ctypes.Array, shape: tuple[int, ...]) -> mx.array:
    return mx.array(memoryview(found).cast("B").cast("f")).reshape(shape)  # pyright: ignore[reportArgumentType]


def choice() -> str:
    """QCHAT_NATIVE. Raises UsageError for another word."""
    value = os.environ.get("QCHAT_NATIVE", "auto")
    if value not in ("auto", "on", "off"):
        raise UsageError(f"QCHAT_NATIVE is {value!r}, wanted auto, on, off")
    return value


def wanted() -> bool:
    """Whether this machine's processor computes, and may do so by the library. Raises UsageError."""
    value = choice()
    return not on_gpu() and (value == "on" or (value == "auto" and sys.platform == "linux"))


class Finder:
    """Looks for the library whenever it is asked, and has it compiled if nobody has.

    `notice` says in one sentence why there is none and will be none.
    """

    def __init__(self):
        self.notice: str | None = None
        self._found: Library | None = None
        self._started = False

    def find(self) -> Library | None:
        """The library, if it is there by now. With QCHAT_NATIVE=on waits for it; raises UsageError if that
        comes to nothing."""
        if self._found or self.notice:
            return self._found
        try:
            self._look()
        except OSError as error:
            self._give_up(str(error))
        if choice() == "on" and self._found is None:
            raise UsageError(f"QCHAT_NATIVE is on, and {self.notice}")
        return self._found

    def _look(self) -> None:
        folder, program = cache_path("native"), compiler.find_compiler()
        if folder is None or program is None:
            self._give_up("no C compiler was found" if folder else "there is no home to keep it in")
            return
        path = compiler.library_path(folder, program)
        if choice() == "on" and not path.exists() and not compiler.failure(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            compiler.compile_now(path, program)
        failed = compiler.failure(path)
        if path.exists():
            self._found = Library(path)
        elif failed:
            self._give_up(failed)
        elif not self._started:
            self._started = True
            compiler.start(path, program)

    def _give_up(self, reason: str) -> None:
        self.notice = f"the decode step in C is not used, and decoding is slower: {' '.join(reason.split())}"


finder = Finder()


def _threads() -> int:
    """QCHAT_NATIVE_THREADS, or one per physical core. Raises UsageError."""
    value = os.environ.get("QCHAT_NATIVE_THREADS", "")
    if not value:
        return physical_cores()
    if not value.isdecimal() or not int(value):
        raise UsageError(f"QCHAT_NATIVE_THREADS is {value!r}, wanted a number from 1")
    return int(value)


def physical_cores() -> int:
    """Physical cores among the processors that this process may use."""
    usable = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))
    cores: set[str] = set()
    for number in usable:
        try:
            cores.add((CPUS / f"cpu{number}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(number))
    return max(len(cores), 1)
