"""What a request may be answered with instead of a reply: a status, a code and one sentence."""

from dataclasses import dataclass, field

from ...core.errors import QchatError
from ..chat.client import EngineDied, EngineError

# statuses of errors that an engine reports, by the name of their class; all others are its own fault
STATUSES = {"UsageError": 400, "TemplateError": 400, "ContextLengthExceeded": 400, "TokenizerError": 400}
CODES = {"ContextLengthExceeded": "context_length_exceeded"}


@dataclass
class RequestError(Exception):
    """An answer with an error `status`; `code` is a word for programs, `param` the field that is wrong."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


def as_request_error(error: QchatError) -> RequestError:
    """Return what a client is told of an engine's error."""
    if isinstance(error, EngineDied):
        return RequestError(503, f"{error}: it is started again with the next request", "engine_died")
    kind = error.kind if isinstance(error, EngineError) else type(error).__name__
    return RequestError(STATUSES.get(kind, 500), str(error), CODES.get(kind))
