"""The runtime: load a model folder, hold a conversation with it. Names are imported when first used."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bench import Steps as Steps
    from .bench import measure as measure
    from .bench import measure_random as measure_random
    from .errors import QchatError as QchatError
    from .evaluate import evaluate_model as evaluate_model
    from .export import export_conversation as export_conversation
    from .export import import_conversation as import_conversation
    from .followers import follow as follow
    from .inspection import inspect_model as inspect_model
    from .measurements import Measurements as Measurements
    from .planner import plan_folder as plan_folder
    from .planner import plan_table as plan_table
    from .quant.calibrate import calibrate_model as calibrate_model
    from .quant.convert import UNQUANTIZED as UNQUANTIZED
    from .quant.convert import Conversion as Conversion
    from .quant.convert import convert as convert
    from .quant.convert import plan_json as plan_json
    from .quant.convert import plan_text as plan_text
    from .quant.plan import load_config as load_config
    from .quant.recipes import Options as Options
    from .ranks import follows as follows
    from .session import Engine as Engine
    from .session import Reply as Reply
    from .session import Session as Session
    from .session import load_session as load_session
    from .store import Store as Store

# the small model that answers when none is named
EMBEDDED_MODEL = Path(__file__).parent / "embedded"

_HOMES = {
    "Engine": "session",
    "Reply": "session",
    "Session": "session",
    "load_session": "session",
    "QchatError": "errors",
    "Options": "quant.recipes",
    "calibrate_model": "quant.calibrate",
    "Store": "store",
    "evaluate_model": "evaluate",
    "export_conversation": "export",
    "import_conversation": "export",
    "inspect_model": "inspection",
    "Steps": "bench",
    "measure": "bench",
    "measure_random": "bench",
    "load_config": "quant.plan",
    "Measurements": "measurements",
    "follow": "followers",
    "follows": "ranks",
    "plan_folder": "planner",
    "plan_table": "planner",
    **dict.fromkeys(("UNQUANTIZED", "Conversion", "convert", "plan_json", "plan_text"), "quant.convert"),
}
__all__ = ["EMBEDDED_MODEL", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"qchat.core has no {name}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
