"""The results of the protocol's methods as frozen values, and the type of each.

An engine process sends them as JSON, and a front end decodes them into the same types. Owns what a result
holds, not how a line is written. Imports no MLX.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..conversation.summary import CacheSummary, ConversationState, Turn
from ..events import Memory
from .protocol import JOB_METHODS


@dataclass(frozen=True)
class Empty:
    """The result of a method that returns nothing."""


@dataclass(frozen=True)
class StateResult:
    """The conversation after the call."""

    state: ConversationState


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model; `nbytes` is the size of its weights, `bytes_per_token` what a decode step reads.

    `context_limit` is in tokens, at most `max_position_embeddings`. `moe` and `mtp` tell whether there
    are experts and a draft head. `parameters` are the sampling settings of a request that gives none.
    `template` is the source of the chat template.
    """

    name: str
    path: str
    nbytes: int
    bits_per_weight: float
    max_position_embeddings: int
    context_limit: int
    moe: bool
    mtp: bool
    can_preserve_thinking: bool
    thinks_by_default: bool
    notices: tuple[str, ...]
    forms: dict[str, str]
    parameters: dict[str, float | int | None]
    template: str
    bytes_per_token: int


@dataclass(frozen=True)
class LoadResult(StateResult):
    """The loaded model, and the conversation that goes on with it."""

    model: ModelInfo


@dataclass(frozen=True)
class UndoResult(StateResult):
    """The question that was taken back, and the conversation without it."""

    question: str


@dataclass(frozen=True)
class PromptResult:
    """The text that the model reads, special tokens included, and its length in tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class RepliesResult:
    """Every reply of the conversation, on all of its branches, oldest first."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class CountResult:
    """The length of a text in tokens."""

    tokens: int


@dataclass(frozen=True)
class MemoryResult(Memory):
    """MLX's memory, and the bytes of the weights, the live state, the snapshots and their budget."""

    weights_nbytes: int
    context_nbytes: int
    snapshot_nbytes: int
    snapshot_budget_nbytes: int


@dataclass(frozen=True)
class SaveResult:
    """Whether the live state was written."""

    saved: bool


Result = (
    Empty
    | StateResult
    | CacheSummary
    | PromptResult
    | RepliesResult
    | CountResult
    | MemoryResult
    | SaveResult
)

# the type of each method's result; jobs return objects of their own
RESULTS: Mapping[str, Any] = {
    "load": LoadResult,
    "unload": Empty,
    "send": StateResult,
    "retry": StateResult,
    "edit": StateResult,
    "answer_tools": StateResult,
    "undo": UndoResult,
    "fork": StateResult,
    "switch": StateResult,
    "reset": StateResult,
    "prime": StateResult,
    "set_system": StateResult,
    "set_tools": StateResult,
    "history": StateResult,
    "open": StateResult,
    "rename": StateResult,
    "state": StateResult,
    "explain": CacheSummary,
    "prompt": PromptResult,
    "replies": RepliesResult,
    "score": Empty,
    "count": CountResult,
    "complete": Empty,
    "count_messages": CountResult,
    "memory": MemoryResult,
    "save_state": SaveResult,
    "shutdown": Empty,
    "cancel": Empty,
    "close_thought": Empty,
    **dict.fromkeys(JOB_METHODS, dict[str, Any]),
}
