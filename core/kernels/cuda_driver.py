"""CUDA's driver through ctypes: launches that a stream captures once and then repeats as one graph."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache

DRIVER = "libcuda.so.1"
NON_BLOCKING = 1  # a stream that does not wait for the default one
RELAXED = 2  # a capture that lets other calls of the driver run meanwhile


class DriverError(RuntimeError):
    """A call of the driver failed, as an operation of MLX would: with a RuntimeError."""


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
        ("shared_nbytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


# programmatic stream serialization: a kernel may start before the last one has ended, and waits for it inside
EARLY = LaunchAttribute(id=6, value=(ctypes.c_int * 16)(1))


class Driver:
    """The driver in the context that MLX has made current on this thread, and a stream of its own."""

    def __init__(self) -> None:
        """Raises DriverError where there is no driver or no device."""
        try:
            self._library = ctypes.CDLL(DRIVER)
        except OSError as error:
            raise DriverError(str(error)) from None
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._use_context()
        self._stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(self._stream), NON_BLOCKING)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(f"{name}: {text.value.decode() if text.value else code}")

    def _use_context(self) -> None:
        """Make the device's primary context current where this thread has none yet."""
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self._call("cuInit", 0)
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context:
            self._call("cuDeviceGet", ctypes.byref(device), 0)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._call("cuCtxSetCurrent", context)

    def function(self, name: str, code: bytes) -> ctypes.c_void_p:
        """Return the function `name` of the machine code; it is loaded once."""
        if name not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), code)
            self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            self._functions[name] = function
        return self._functions[name]

    def launch(
        self,
        function: ctypes.c_void_p,
        blocks: tuple[int, int, int],
        threads: int,
        addresses: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """Launch `function` with pointers and then ints as its arguments, on this stream."""
        values = [*map(ctypes.c_uint64, addresses), *map(ctypes.c_int32, lengths)]
        places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        config = LaunchConfig(*blocks, threads, 1, 1, 0, self._stream, ctypes.pointer(EARLY), 1)
        self._call("cuLaunchKernelEx", ctypes.byref(config), function, places, None)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device's memory, on this stream."""
        self._call(
            "cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), nbytes, self._stream
        )

    def write(self, target: int, words: Sequence[int]) -> None:
        """Copy 32-bit words to the device's memory, on this stream."""
        values = (ctypes.c_uint32 * len(words))(*words)
        nbytes = ctypes.sizeof(values)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(target), values, nbytes, self._stream)

    @contextmanager
    def captured(self) -> Iterator["Graph"]:
        """Make what is launched meanwhile a graph, in place of running it; the graph is ready afterwards."""
        graph = Graph(self)
        self._call("cuStreamBeginCapture_v2", self._stream, RELAXED)
        try:
            yield graph
        except BaseException:
            with suppress(DriverError):
                self._call("cuGraphDestroy", self._end_capture())
            raise
        made = self._end_capture()
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(graph.handle), made, ctypes.c_uint64(0))
        finally:
            self._call("cuGraphDestroy", made)

    def _end_capture(self) -> ctypes.c_void_p:
        """Return what was captured."""
        made = ctypes.c_void_p()
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(made))
        return made

    def run(self, graph: "Graph") -> None:
        """Launch a graph on this stream."""
        self._call("cuGraphLaunch", graph.handle, self._stream)

    def destroy(self, graph: "Graph") -> None:
        if graph.handle:
            self._call("cuGraphExecDestroy", graph.handle)


class Graph:
    """Launches that the driver repeats in their order, with the same arguments."""

    def __init__(self, driver: Driver):
        self.handle, self._driver = ctypes.c_void_p(), driver

    def run(self) -> None:
        self._driver.run(self)

    def __del__(self) -> None:
        with suppress(DriverError):  # which may shut down before this process ends
            self._driver.destroy(self)


@cache
def driver() -> Driver:
    """Return this process's driver. Raises DriverError."""
    return Driver()
