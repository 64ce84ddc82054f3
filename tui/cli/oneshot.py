"""One prompt, one reply: the answer on stdout as it arrives, or as JSON; everything else on stderr.

Refuses to mix: stdout holds the answer and nothing but it. ctrl+c stops the reply and keeps what there is.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ...core.conversation.summary import ToolResult
from ...core.errors import GenerationError
from ...core.events import Done, Event, Notice, Prefill, Text, Thought, to_json
from ..text.output import note, write
from ..text.statusline import StatusLine

if TYPE_CHECKING:
    from ...core import Session, Store
    from .oneshot_tools import OneShotTools

PROGRESS_AFTER_SECONDS = 1.0
Shown = Event | ToolResult  # what a view may show
EXIT_CODES = {"stop": 0, "length": 0, "cancelled": 130, "error": 1}


@dataclass(frozen=True)
class Request:
    """What the command line asked for; `settings` are named as the session names them."""

    model: str
    text: str
    pictures: Sequence[str] = ()  # files
    form: Literal["text", "json", "jsonl"] = "text"
    extract: str | None = None  # print only the first code block, in this language unless it is empty
    show_thinking: bool = False
    stats: bool = False
    quiet: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    store: "Store | None" = None  # where the `conversation` lies that this goes on with
    conversation: int | None = None
    tools: "OneShotTools | None" = None

    @property
    def content(self) -> str | list[Any]:
        """What is asked: the text, after the pictures."""
        pictures = [{"type": "image", "image": path} for path in self.pictures]
        return [*pictures, self.text] if pictures else self.text

    def tell(self, sentence: str) -> None:
        """Note something on stderr, unless --quiet was given."""
        if not self.quiet:
            note(sentence)


class Cancellable(Protocol):
    def cancel(self) -> None: ...


def run(request: Request) -> int:
    """Load the model, stream its reply, return the exit code. Raises QchatError and BrokenPipeError."""
    with request.tools or nullcontext():
        session = _session(request)
        done = _reply(request, session)
    _close(request, done)
    if request.store is not None:
        session.save_state()
    _compile_for_later(request)
    if request.tools is not None and request.tools.cancelled:
        return EXIT_CODES["cancelled"]
    return 1 if _is_half_a_document(request, done) else EXIT_CODES[done.finish_reason]


def _reply(request: Request, session: "Session") -> Done:
    """Show the reply to the prompt, and those to the results of tools; return the last end."""
    show, progress, tools = _view(request), _Progress(request), request.tools
    if tools is not None:
        session.set_tools(tools.schemas())
    done, events = None, session.stream(request.content)
    with stopped_by_interrupt(session if tools is None else tools.beside(session)):
        while events is not None:
            for event in events:
                progress.follow(event)
                if isinstance(event, Done):
                    done = event
                else:
                    show(event)
            if done is None:
                raise GenerationError("the reply ended without its closing event")
            results = tools.answer(done, session) if tools is not None else []
            if results and request.form != "json" and request.extract is None:
                for shown in (done, *results):
                    show(shown)
            events = session.answer_tools([result.text for result in results]) if results else None
    if done is None:
        raise GenerationError("no reply was asked for")
    show(done)
    return done


def _compile_for_later(request: Request) -> None:
    """Start a process that compiles the kernels that this run lacked, for later runs."""
    from ...core import compile_for_later

    if compile_for_later() and request.stats:
        note("faster kernels are being compiled in the background: later runs will use them")


def _session(request: Request) -> "Session":
    from ...core import Engine, Session, load_session

    options = {**request.settings, **({"constrain_calls": True} if request.tools else {})}
    if request.store is None or request.conversation is None:
        return load_session(request.model, **options)
    engine = Engine.load(request.model)
    return Session.reopen(engine, request.store, request.conversation, **options)


@contextmanager
def stopped_by_interrupt(session: Cancellable) -> Iterator[None]:
    """Make the first ctrl+c stop `session`; a second one raises KeyboardInterrupt at once."""

    def stop(_signal: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        session.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Progress:
    """Shows the prefill progress on a terminal, once it takes noticeably long."""

    def __init__(self, request: Request) -> None:
        self._begin = time.monotonic()
        self._line = StatusLine(quiet=request.quiet)

    def follow(self, event: Event) -> None:
        seconds = time.monotonic() - self._begin
        if not isinstance(event, Prefill) or event.done >= event.total:
            self._line.clear()
        elif seconds > PROGRESS_AFTER_SECONDS:
            self._line.show(f"reading the prompt: {event.done:,} of {event.total:,} tokens")


class TextView:
    """Writes the answer to stdout as it arrives, and the thought to stderr if wanted."""

    def __init__(self, request: Request):
        self._request = request
        self._answer_end = self._thought_end = ""

    def __call__(self, event: Shown) -> None:
        match event:
            case Text(text) if text:
                self._end_thought()
                write(sys.stdout, text)
                self._answer_end = text[-1]
            case Thought(text) if text and self._request.show_thinking:
                write(sys.stderr, text)
                self._thought_end = text[-1]
            case Notice(text):
                self._request.tell(text)
            case Done():
                self._end_thought()
                if self._answer_end not in ("", "\n"):
                    write(sys.stdout, "\n")

    def _end_thought(self) -> None:
        if self._thought_end not in ("", "\n"):
            write(sys.stderr, "\n")
        self._thought_end = ""


def _json_view(request: Request) -> Callable[[Shown], None]:
    def show(event: Shown) -> None:
        match event:
            case Notice(text):
                request.tell(text)
            case Done():
                _write_json(as_object(event, request.model))

    return show


def _jsonl_view(_request: Request) -> Callable[[Shown], None]:
    def show(event: Shown) -> None:
        is_result = isinstance(event, ToolResult)
        _write_json({"event": "toolresult", **asdict(event)} if is_result else to_json(event))

    return show


def _code_view(request: Request) -> Callable[[Shown], None]:
    def show(event: Shown) -> None:
        match event:
            case Notice(text):
                request.tell(text)
            case Done(finish_reason="stop" | "length"):
                write(sys.stdout, first_code(event.text, request.extract or ""))

    return show


def _view(request: Request) -> Callable[[Shown], None]:
    if request.extract is not None:
        return _code_view(request)
    return {"text": TextView, "json": _json_view, "jsonl": _jsonl_view}[request.form](request)


def first_code(text: str, language: str) -> str:
    """Return the first fenced block, or the first in `language`. Raises GenerationError if there is none."""
    from ..text.markdown.parser import code_blocks

    for block in code_blocks(text):
        if language.lower() in ("", block.language):
            return block.text
    raise GenerationError(f"the reply holds no code block{f' in {language}' if language else ''}")


def as_object(done: Done, model: str) -> dict[str, Any]:
    """Return the whole reply as plain values; times in seconds, speeds in tokens/s."""
    timings = asdict(done.performance)
    return {
        "text": done.text,
        "thinking": done.thinking,
        "usage": {
            "prompt_tokens": done.prompt_tokens,
            "cached_tokens": done.cached_tokens,
            "reasoning_tokens": done.reasoning_tokens,
            "completion_tokens": done.generated_tokens,
        },
        "timings": {name: value for name, value in timings.items() if not name.endswith("nbytes")},
        "finish_reason": done.finish_reason,
        "model": model,
    }


def _write_json(value: dict[str, Any]) -> None:
    write(sys.stdout, json.dumps(value, ensure_ascii=False) + "\n")


def _close(request: Request, done: Done) -> None:
    """Say on stderr how the reply ended, if that needs saying."""
    if done.detail and request.form != "jsonl":
        note(done.detail) if done.finish_reason == "error" else request.tell(done.detail)
    match done.finish_reason, done.thinking_cut:
        case "length", _ if done.context_full:
            pass  # its detail says so, and no larger limit helps
        case "length", True:
            request.tell("the reply was cut inside its thought: --max-tokens or --thinking-budget makes room")
        case "length", False:
            request.tell("the reply was cut at its token limit: --max-tokens raises it")
        case "stop", True:
            request.tell("the model ended its reply inside its thought")
    if _is_half_a_document(request, done):
        note("the answer ends before its JSON does, so it does not satisfy the schema")
    if request.stats:
        note(stats_line(done))


def _is_half_a_document(request: Request, done: Done) -> bool:
    """Return whether an answer that was to satisfy a schema was cut before its end."""
    return "schema" in request.settings and (done.finish_reason == "length" or bool(done.stop_string))


def stats_line(done: Done) -> str:
    speed = done.performance
    parts = (
        f"{done.prompt_tokens:,} prompt tokens ({done.cached_tokens:,} cached) at "
        f"{speed.prefill_tokens_per_s:,.1f}/s",
        f"first token after {speed.seconds_to_first_token:.2f} s",
        f"{done.generated_tokens:,} generated ({done.reasoning_tokens:,} thinking) at "
        f"{speed.decode_tokens_per_s:,.1f}/s",
        f"{speed.peak_nbytes / 2**30:.2f} GiB at peak",
    )
    return " · ".join(parts)
