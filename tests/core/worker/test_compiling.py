"""When the engine process has kernels compiled: after its first reply, in the background, with a notice."""

import threading
from types import SimpleNamespace
from typing import Any, cast

from qchat.core.worker.methods import COMPILING, EngineMethods


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


def methods_with(
    precompiler: ScriptedPrecompiler, *, replied: bool = True
) -> tuple[Any, Any, list[str], Any]:
    """Engine methods, their engine, what they report, and the event that is set when they ask to be woken."""
    said: list[str] = []
    woken = threading.Event()
    methods = EngineMethods(lambda _: None, lambda: False, background=said.append, wake=woken.set)
    methods._replied = replied
    return methods, cast(Any, SimpleNamespace(precompiler=precompiler)), said, woken


def test_the_first_reply_has_the_machine_to_itself():
    precompiler = ScriptedPrecompiler()
    methods, engine, said, _ = methods_with(precompiler, replied=False)
    methods._fuse(engine)
    assert (precompiler.begun, said) == (0, [""])


def test_compiling_is_told_and_its_end_wakes_the_engine():
    precompiler = ScriptedPrecompiler()
    methods, engine, said, woken = methods_with(precompiler)
    methods._fuse(engine)
    methods._fuse(engine)
    assert (precompiler.begun, said) == (1, [COMPILING])
    precompiler.made = True
    precompiler.child.over.set()
    assert woken.wait(10)
    methods._fuse(engine)
    assert said == [COMPILING, ""]


def test_a_compiler_that_fails_is_not_started_again_at_once():
    precompiler = ScriptedPrecompiler(code=1)
    methods, engine, said, woken = methods_with(precompiler)
    methods._fuse(engine)
    precompiler.child.over.set()
    waiter = next((one for one in threading.enumerate() if one.name.startswith("kernels")), None)
    if waiter is not None:
        waiter.join(10)
    assert said == [COMPILING, ""]
    assert not woken.is_set()
