"""The runtime: load a model folder, hold a conversation with it. Names are imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .allocation.allocate import Budget as Budget
    from .allocation.allocate import allocate as allocate
    from .calls.answer_schema import read_schema as read_schema
    from .conversation.session import Reply as Reply
    from .conversation.session import Session as Session
    from .conversation.session import load_session as load_session
    from .conversion.convert import UNQUANTIZED as UNQUANTIZED
    from .conversion.convert import Conversion as Conversion
    from .conversion.convert import convert as convert
    from .conversion.convert import plan_json as plan_json
    from .conversion.inspection import inspect_model as inspect_model
    from .engine.engine import Engine as Engine
    from .engine.followers import follow as follow
    from .engine.launcher import follows as follows
    from .engine.launcher import is_rank as is_rank
    from .engine.precompile import compile_for_later as compile_for_later
    from .errors import QchatError as QchatError
    from .hub.catalog import BUILT_IN_MODEL as BUILT_IN_MODEL
    from .machine.subnormals import flushing as flushing
    from .measuring.bench import BenchRun as BenchRun
    from .measuring.bench import measure as measure
    from .measuring.bench import measure_random as measure_random
    from .measuring.calibrate import calibrate_model as calibrate_model
    from .measuring.doctor import diagnose as diagnose
    from .measuring.evaluate import evaluate_model as evaluate_model
    from .measuring.evaluate import evaluate_models as evaluate_models
    from .measuring.measurements import Measurements as Measurements
    from .model.memory_plan import plan_folder as plan_folder
    from .prompt_cache.live_state import LiveState as LiveState
    from .quant.plan import load_config as load_config
    from .quant.recipe_file import BUILTIN as BUILTIN
    from .quant.recipes import Options as Options
    from .storage.export import export_conversation as export_conversation
    from .storage.importer import import_conversation as import_conversation
    from .storage.store import Store as Store
    from .worker.jobs import run_job as run_job

_HOMES = {
    "BUILTIN": "quant.recipe_file",
    "BUILT_IN_MODEL": "hub.catalog",
    "Budget": "allocation.allocate",
    "Engine": "engine.engine",
    "LiveState": "prompt_cache.live_state",
    "Measurements": "measuring.measurements",
    "Options": "quant.recipes",
    "QchatError": "errors",
    "Reply": "conversation.session",
    "Session": "conversation.session",
    "BenchRun": "measuring.bench",
    "Store": "storage.store",
    "allocate": "allocation.allocate",
    "compile_for_later": "engine.precompile",
    "calibrate_model": "measuring.calibrate",
    "diagnose": "measuring.doctor",
    "evaluate_model": "measuring.evaluate",
    "evaluate_models": "measuring.evaluate",
    "export_conversation": "storage.export",
    "flushing": "machine.subnormals",
    "follow": "engine.followers",
    "follows": "engine.launcher",
    "import_conversation": "storage.importer",
    "inspect_model": "conversion.inspection",
    "is_rank": "engine.launcher",
    "load_config": "quant.plan",
    "load_session": "conversation.session",
    "measure": "measuring.bench",
    "measure_random": "measuring.bench",
    "plan_folder": "model.memory_plan",
    "read_schema": "calls.answer_schema",
    "run_job": "worker.jobs",
    **dict.fromkeys(("UNQUANTIZED", "Conversion", "convert", "plan_json"), "conversion.convert"),
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"qchat.core has no {name}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
