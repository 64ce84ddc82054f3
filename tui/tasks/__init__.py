"""Tasks: what `qchat NAME` and `/NAME` both do, with the same options and the same words.

Owns each task's options, what it asks of the engine, and its report. Never prints, paints or starts engines.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import EngineTask, LocalTask

# one line a task: its module, and the first line of its help, so that lists of commands import none of them
TASKS = {
    "sessions": "List, search, show, export and delete conversations.",
    "models": "List local and published models, or delete a local one.",
    "convert": "Make a quantized model of MODEL in FOLDER, or plan one.",
    "compare": "Have models A and B answer TEXT; show speeds and divergence.",
    "bench": "Measure the speed of models, alone or against mlx-lm.",
    "eval": "Measure how well models predict text, alone or against another.",
    "calibrate": "Measure which inputs of a model matter, for --imatrix-path.",
    "inspect": "Show what a model folder holds, by class of tensors.",
    "plan": "Show the memory that a model needs and the context that fits.",
}


def load_task(name: str) -> "EngineTask | LocalTask":
    """Return one of TASKS, imported when it is first used."""
    return import_module(f".{name}", __name__).TASK
