"""`qchat doctor`: this machine and its verdicts on one model's operations, fit for a bug report.

Names no folders, users or models. Tries what no load has tried so far, in the same child process as a load.
"""

import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig
from ..checkpoint.weights import load_weights
from ..kernels.compile_cache import compiler_version
from ..kernels.launch import backend, may_try, tuned
from ..machine.backend import choose_policy, mx, on_gpu
from ..machine.device import copy_bandwidth, device_free_nbytes, device_limit_nbytes
from ..machine.memory import host_total_nbytes
from ..ops.candidates import Dimensions
from ..ops.tuning import Tuner
from ..ops.verdicts import Result, winners

GB = 10**9
VARIABLES = ("ACTIVATIONS", "DENSE", "COMPILE", "NATIVE", "DELTA", "KERNELS", "PRODUCTS", "TUNE", "BLAS")
COLUMNS = ("operation", "shape", "form", "error", "ms", "verdict")


@dataclass(frozen=True)
class Diagnosis:
    """Facts about the machine by name, and what became of every form of every operation."""

    facts: Mapping[str, str]
    results: tuple[Result, ...]
    complete: bool

    def as_json(self) -> dict[str, Any]:
        chosen = winners(self.results)
        rows = [{**asdict(one), "verdict": _verdict(one, chosen, self.results)} for one in self.results]
        return {"facts": dict(self.facts), "complete": self.complete, "forms": rows}

    def as_text(self) -> str:
        """Return aligned lines: facts, then a table."""
        width = max(map(len, self.facts))
        facts = [f"{name:{width}}  {value}" for name, value in self.facts.items()]
        chosen = winners(self.results)
        rows = [COLUMNS, *(_row(one, _verdict(one, chosen, self.results)) for one in self.results)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
        table = [line.rstrip() for line in lines]
        left = [] if self.complete else ["", "Not everything was tried."]
        return "\n".join([*facts, "", *(table if self.results else ["no forms were tried"]), *left])


def diagnose(folder: Path, report: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Try every form of the operations of the model in `folder`, unless that was done; `report` is told so.

    Raises ModelError and its children, UsageError for a bad environment variable.
    """
    config = ModelConfig.load(folder)
    weights = load_weights(folder, config)
    policy = choose_policy(weights.parameters)
    tuner = Tuner(Dimensions.of(config, weights.tensors, policy))
    if tuned() and not tuner.complete:
        report("trying every form of this model's operations")
        tuner.wait()
    tuner.adopt()
    results = tuner.results if tuned() else []
    layers = f"{config.num_hidden_layers} layers{', experts' if config.is_moe else ''}"
    facts = {
        **_machine(),
        "activations": f"{tuner.dimensions.dtype}, weights {'dense' if policy.dense else 'as stored'}",
        "model": f"{config.model_type}, {layers}, {weights.nbytes / GB:.2f} GB",
        "own kernels": _own_kernels(),
        "environment": _environment(),
    }
    return Diagnosis(facts, tuple(results), tuner.complete)


def _machine() -> dict[str, str]:
    device = mx.device_info()
    kind = "GPU" if on_gpu() else "CPU"
    memory = f"{host_total_nbytes() / GB:.1f} GB"
    limits = f"{device_limit_nbytes() / GB:.1f} GB on the device, {device_free_nbytes() / GB:.1f} GB free"
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "mlx": version("mlx"),
        "device": f"{device.get('device_name')} ({device.get('architecture')}), {kind}",
        "memory": f"{memory} in the machine, {limits}",
        "bandwidth": f"{copy_bandwidth() / GB:,.0f} GB/s in a copy",
        **({"compiler": f"NVRTC {compiler_version()}"} if may_try() == "cuda" else {}),
    }


def _own_kernels() -> str:
    if may_try() is None:
        return "none for this device"
    return "used where they win" if backend() else "not used"


def _environment() -> str:
    """Return the variables that are set; of a value that is a path only that it is one."""
    found = {name: os.environ[f"QCHAT_{name}"] for name in VARIABLES if f"QCHAT_{name}" in os.environ}
    said = [f"QCHAT_{name}={'(a path)' if '/' in value else value}" for name, value in found.items()]
    return ", ".join(said) or "nothing set"


def _verdict(result: Result, chosen: Mapping[tuple[str, str], str], results: tuple[Result, ...]) -> str:
    """Return what was decided about a form, and why."""
    if result.failure:
        return f"not used: {result.failure}"
    key = result.operation, result.shape
    if chosen.get(key) != result.form:
        best = next((one for one in results if one.key == (*key, chosen.get(key))), None)
        if best and best.seconds and result.seconds and result.seconds < best.seconds:
            return "not clearly faster"
        return "slower" if best else "not decided"
    return "chosen"


def _row(result: Result, verdict: str) -> tuple[str, ...]:
    error = "-" if result.error is None else f"{result.error:.1e}"
    ms = "-" if result.seconds is None else f"{1e3 * result.seconds:.3f}"
    return result.operation, result.shape, result.form, error, ms, verdict
