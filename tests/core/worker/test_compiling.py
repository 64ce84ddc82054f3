"""When the engine process has kernels compiled: after its first reply, in the background, with a notice."""

import threading
from types import SimpleNamespace
from typing import Any, cast

from qchat.core.worker.methods import COMPILING, Desk


class ScriptedChild:
    """A process that ends when it is told to."""

    def __init__(self, code: int):
        self.over, self.code = threading.Event(), code

    def wait(self) -> int:
        self.over.wait()
        return self.code


class ScriptedPrecompiler:
    def __init__(self, code: int = 0):
        self.child, self.begun, self.made = ScriptedChild(code), 0, False

    @property
    def compiling(self) -> bool:
        return self.begun > 0 and not self.child.over.is_set()

    def load(self) -> bool:
        return self.made

    def begin(self) -> ScriptedChild:
        self.begun += 1
        return self.child


def desk_with(precompiler: ScriptedPrecompiler, *, replied: bool = True) -> tuple[Any, Any, list[str], Any]:
    """A desk, its engine, what it said, and the event that is set when it asks to be woken."""
    said: list[str] = []
    woken = threading.Event()
    desk = Desk(lambda _: None, lambda: False, background=said.append, wake=woken.set)
    desk._replied = replied
    return desk, cast(Any, SimpleNamespace(precompiler=precompiler)), said, woken


def test_the_first_reply_has_the_machine_to_itself():
    precompiler = ScriptedPrecompiler()
    desk, engine, said, _ = desk_with(precompiler, replied=False)
    desk._fuse(engine)
    assert (precompiler.begun, said) == (0, [""])


def test_compiling_is_told_and_its_end_wakes_the_engine():
    precompiler = ScriptedPrecompiler()
    desk, engine, said, woken = desk_with(precompiler)
    desk._fuse(engine)
    desk._fuse(engine)
    assert (precompiler.begun, said) == (1, [COMPILING])
    precompiler.made = True
    precompiler.child.over.set()
    assert woken.wait(10)
    desk._fuse(engine)
    assert said == [COMPILING, ""]


def test_a_compiler_that_fails_is_not_started_again_at_once():
    precompiler = ScriptedPrecompiler(code=1)
    desk, engine, said, woken = desk_with(precompiler)
    desk._fuse(engine)
    precompiler.child.over.set()
    waiter = next((one for one in threading.enumerate() if one.name.startswith("kernels")), None)
    if waiter is not None:
        waiter.join(10)
    assert said == [COMPILING, ""]
    assert not woken.is_set()
