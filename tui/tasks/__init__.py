"""Tasks: what `qchat NAME` and `/NAME` both do, with the same options and the same words.

Owns each task's options, what it asks of the engine, and its report. Never prints, paints or starts engines.
"""

from .base import EngineTask, LocalTask, Task
from .bench import Bench
from .calibrate import Calibrate
from .compare import Compare
from .convert import Convert
from .eval import Eval
from .inspect import Inspect
from .models import Models
from .plan import Plan
from .sessions import Sessions

__all__ = ["TASKS", "EngineTask", "LocalTask", "Task"]

# in the order of use, which is that of the chat's commands
TASKS: tuple[EngineTask | LocalTask, ...] = (
    Sessions(),
    Models(),
    Convert(),
    Compare(),
    Bench(),
    Eval(),
    Calibrate(),
    Inspect(),
    Plan(),
)
