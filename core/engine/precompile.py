"""Compiles the fused kernels of a model on a CPU ahead of their use, in a child process of low priority.

`python -m qchat.core.engine.precompile FOLDER` builds one layer of each kind in the model folder and runs a
prompt and a step through them, so that MLX compiles what replies will need. The kernels are kept with the
user's caches, for all processes. The engine runs unfused meanwhile, and loads them when it is idle.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..checkpoint.config import ModelConfig
from ..checkpoint.packed import Packed
from ..checkpoint.weights import Tensor, Weights, load_weights
from ..errors import QchatError
from ..machine import fusion
from ..machine.backend import DTYPES, Policy, choose_policy, mx, on_gpu
from ..machine.files import cache_path
from ..machine.fusion import Kernels, kernel_home, loading, mlx_folder
from ..model.network import Model
from ..ops.candidates import Dimensions
from ..ops.gated_delta import delta_forms
from ..ops.tuning import settle

# enough for several chunks of the delta rule; what a template puts before a reply is a few more
PROMPT_TOKENS, FEW_TOKENS = 64, 4
NICENESS = 19
COMMAND = (sys.executable, "-P", "-m", "qchat.core.engine.precompile")
SOURCES = ("model", "ops")


_precompilers: "weakref.WeakSet[Precompiler]" = weakref.WeakSet()


class Precompiler:
    """The fused kernels of one loaded model: uses those that exist, has a child process make the others."""

    def __init__(self, model: Model, folder: Path):
        self._model, self._folder = model, folder
        self._kernels = None if on_gpu() or model.shared else kernels_for(model.config, model.policy)
        self._child: subprocess.Popen[bytes] | None = None
        self.loaded = False
        _precompilers.add(self)

    @property
    def compiling(self) -> bool:
        """Whether the child process is still at work."""
        return self._child is not None and self._child.poll() is None

    def load(self) -> bool:
        """Let functions run fused if all kernels were compiled before; returns whether they do."""
        layers = self._kernels.layers() if self._kernels and fusion.choice() != "off" else None
        if self._kernels and layers is not None and not self.loaded:
            with loading(self._kernels.home):
                rehearse(self._model, layers)
            self.loaded = True
        return self.loaded

    def begin(self, *, wait: bool = False) -> subprocess.Popen[bytes] | None:
        """Start the child process if there is a compiler and work for it; it outlives this process."""
        if self._kernels is None or self.loaded or self.compiling or fusion.choice() == "off":
            return None
        if not fusion.has_compiler() or self._kernels.failed_lately() or self._kernels.layers() is not None:
            return None
        policy = self._model.policy
        dtype = next(name for name, value in DTYPES.items() if value == policy.activations)
        environment = {
            "QCHAT_ACTIVATIONS": dtype,
            "QCHAT_DENSE": "on" if policy.dense else "off",
            "QCHAT_COMPILE": "on",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        quiet = subprocess.DEVNULL
        with suppress(OSError):  # what cannot be started is not needed
            self._child = subprocess.Popen(
                [*COMMAND, *(["--wait"] if wait else []), str(self._folder)],
                env=os.environ | environment,
                stdin=quiet,
                stdout=quiet,
                stderr=quiet,
                start_new_session=True,
            )
        return self._child

    def wait(self) -> None:
        """Compile what is missing, then let functions run fused."""
        if not self.load() and (child := self.begin(wait=True)):
            child.wait()
            self.load()


def compile_for_later() -> bool:
    """Start the child processes for the models loaded here; returns whether there is anything to compile."""
    return any(precompiler.begin() for precompiler in list(_precompilers))


def kernels_for(config: ModelConfig, policy: Policy) -> Kernels | None:
    """The kernels that models of this config share; None without a folder that nobody else can write to."""
    home = kernel_home(cache_path("cpu-kernels"))
    if home is None:
        return None
    core = Path(__file__).parents[1]
    sources = [path for name in SOURCES for path in sorted((core / name).glob("*.py"))]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    heads = config.linear_num_key_heads, config.linear_num_value_heads
    dims = config.linear_key_head_dim, config.linear_value_head_dim
    forms = delta_forms(heads[0], dims[0], heads[1], dims[1])
    return Kernels(home, f"{config.raw}{policy.activations}{policy.dense}{forms}{code}")


def rehearse(model: Model, layers: Sequence[int]) -> None:
    """Run a prompt, a few more tokens and then a step through these layers."""
    cache, config = model.new_cache(), model.config
    many = -(-fusion.MANY_VALUES // config.linear_num_value_heads)
    for length in (max(PROMPT_TOKENS, many), FEW_TOKENS, 1):
        x = mx.zeros((1, length, config.hidden_size), model.policy.activations)
        for number in layers:
            x = model.layers[number](x, cache.layers[number])
        mx.eval(x, cache.arrays())


def distinct_layers(config: ModelConfig, tensors: Mapping[str, Tensor]) -> list[int]:
    """The first layer of each kind: layers of one kind differ in the values of their weights alone."""
    first: dict[object, int] = {}
    for number, kind in enumerate(config.layer_types):
        prefix = f"layers.{number}."
        names = sorted(name for name in tensors if name.startswith(prefix))
        first.setdefault((kind, *((name[len(prefix) :], _form(tensors[name])) for name in names)), number)
    return sorted(first.values())


def _form(tensor: Tensor) -> object:
    if isinstance(tensor, Packed):
        return tensor.geometry, tuple(tensor.scales.shape)
    return str(tensor.dtype), tuple(tensor.shape)


def excerpt(config: ModelConfig, weights: Weights, layers: Sequence[int], policy: Policy) -> Model:
    """A model of nothing but these layers of another."""
    tensors: dict[str, Tensor] = {
        "embed_tokens": mx.zeros((1, config.hidden_size)),
        "norm": mx.zeros(config.hidden_size),
    }
    for place, number in enumerate(layers):
        prefix = f"layers.{number}."
        tensors |= {
            f"layers.{place}.{name[len(prefix) :]}": tensor
            for name, tensor in weights.tensors.items()
            if name.startswith(prefix)
        }
    smaller = replace(
        config,
        layer_types=tuple(config.layer_types[number] for number in layers),
        num_hidden_layers=len(layers),
        vocab_size=1,
        tie_word_embeddings=True,
    )
    return Model(smaller, Weights(tensors, (), False), policy)


def precompile(folder: Path, *, wait: bool = False) -> bool:
    """Compile the kernels of the model in `folder` if they are missing; returns whether they are there now.

    With `wait` it waits for another process that compiles, else it returns False. Raises ModelError and its
    children, and what MLX raises where the compiler fails.
    """
    config = ModelConfig.load(folder)
    weights = load_weights(folder, config)
    config = weights.settle(config)
    policy = choose_policy(weights.parameters)
    settle(Dimensions.of(config, weights.tensors, policy))  # the forms that the kernels depend on
    kernels = kernels_for(config, policy)
    if kernels is None:
        return False
    with (kernels.home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        if kernels.layers() is not None:
            return True
        for left in kernels.home.glob("work-*"):  # of processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        layers = distinct_layers(config, weights.tensors)
        with tempfile.TemporaryDirectory(dir=kernels.home, prefix="work-") as work:
            _link_known(kernels.folder, Path(work))
            try:
                with loading(Path(work)):
                    rehearse(excerpt(config, weights, layers, policy), range(len(layers)))
            except RuntimeError:  # what MLX raises
                kernels.note_failure()
                raise
            kernels.keep(Path(work), layers)
    return True


def _link_known(known: Path, work: Path) -> None:
    """Let MLX find in `work` what earlier models needed as well."""
    target = mlx_folder(work)
    target.mkdir(parents=True)
    for file in known.glob("*.so"):
        (target / file.name).symlink_to(file)


def main() -> None:
    """Precompile the folder named on the command line; exit code 0 if its kernels are there afterwards."""
    wait, folder = "--wait" in sys.argv, Path(sys.argv[-1])
    os.nice(0 if wait else NICENESS)
    try:
        done = precompile(folder, wait=wait)
    except (QchatError, RuntimeError) as error:
        sys.exit(str(error))
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
