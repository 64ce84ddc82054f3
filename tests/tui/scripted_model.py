"""The real engine process, whose model's first reply thinks, answers and calls a tool: run as a file.

Its idle work fails once, it always has something to do in the background, and it measures little.
"""

import sys
from collections import deque

from qchat.core.engine.engine import Engine
from qchat.core.generation.decode import Decoder
from qchat.core.measuring import bench
from qchat.core.worker import methods
from qchat.core.worker.process import main

# as the template of the tiny model writes calls
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
REPLY = f"I must look.\n</think>\n\nOne moment.\n\n{CALL}<|im_end|>"


def script_reply() -> None:
    """Have the first decoder draw the ids of REPLY."""
    load, draw = Engine.load, Decoder.next
    ids: deque[int] = deque()

    def load_and_prepare(*args, **options) -> Engine:
        engine = load(*args, **options)
        if Engine.load is load_and_prepare:
            ids.extend(engine.tokenizer.encode(REPLY))
            Engine.load = load
        return engine

    def draw_scripted(self: Decoder) -> int:
        if ids:
            self.force(ids.popleft())
        return draw(self)

    Engine.load, Decoder.next = load_and_prepare, draw_scripted


def fail_once() -> None:
    """Have the first measurement of the bandwidth fail, so that idle work does."""
    measure = methods.copy_bandwidth

    def fail() -> float:
        methods.copy_bandwidth = measure
        raise RuntimeError("no bandwidth")

    methods.copy_bandwidth = fail


def tell_of_compiling(self: methods.EngineMethods, engine: Engine) -> None:
    """Report the compilation of kernels without compiling any."""
    del engine
    self._background(methods.COMPILING)


if __name__ == "__main__":
    script_reply()
    fail_once()
    methods.EngineMethods._fuse = tell_of_compiling
    bench.PREFILL_LENGTHS, bench.SUSTAINED_TOKENS = (64,), 32
    sys.exit(main())
