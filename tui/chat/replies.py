"""One reply at a time: asked for, shown as it comes, and what becomes of its question if it never came."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ...core.conversation.summary import ConversationState, ShownPicture, ToolResult, Turn
from ...core.errors import QchatError
from ...core.events import Done
from ...core.worker.wire import ModelInfo, StateResult
from .client import Call, EngineClient, EngineDied
from .live_bench import LiveBench
from .meter import Meter, Status
from .picture_files import PictureFiles
from .turns import RunningTurn, new_turn
from .view import View

if TYPE_CHECKING:
    from ..user.settings import Settings


@dataclass(frozen=True)
class ReplyRequest:
    """A reply to ask the engine for by `method`: to a question, or to the `results` of tools.

    `before` are the turns that stay before it; `settings` are for this reply alone. `pictures` are those of a
    question that was asked before.
    """

    method: str
    before: Sequence[Turn]
    question: str
    params: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: Sequence[ToolResult] = ()
    pictures: Sequence[ShownPicture] = ()


class Replier(Protocol):
    """The parts of a chat that its replies need."""

    view: View
    settings: "Settings"
    state: ConversationState
    model: ModelInfo | None
    meter: Meter
    live_bench: LiveBench
    picture_files: PictureFiles

    @property
    def status(self) -> Status: ...
    def connected(self) -> EngineClient: ...
    def hold(self, state: ConversationState) -> None: ...
    async def follow(self, call: Call, running: RunningTurn | None = None) -> Any: ...


class Replies:
    """The replies of one chat. `interrupted` is the turn in which an engine died.

    `gives_back`: a question without a reply returns to the prompt. `asked` are the turns up to the one being
    answered; empty while none is.
    """

    def __init__(self, chat: Replier):
        self._chat = chat
        self.gives_back = True
        self.interrupted: Turn | None = None
        self.asked: Sequence[Turn] = ()

    async def show(self, request: ReplyRequest) -> Done | None:
        """Show one reply; return its end, or None if nothing was said."""
        chat = self._chat
        running = self._running(request)
        self.asked = (*request.before, running.turn)
        chat.view.question(running.turn)
        settings = {**chat.settings.reply(), **request.settings}
        try:
            call = chat.connected().call(request.method, **request.params, settings=settings)
            result = await self._follow(call, running, request.params.get("images", ()))
        except EngineDied:
            self._keep_partial(request.before, running)
            raise
        except QchatError:
            self.give_back(request)
            raise
        finally:
            self.asked = ()
        chat.hold(result.state)
        if len(chat.state.turns) <= len(request.before):  # no reply, so the question does not count as asked
            self.give_back(request)
            return None
        if chat.settings["live_bench"]:
            chat.live_bench.record(chat.state.turns[-1], chat.status.reply.speeds)
        chat.view.finished(running.done, chat.state.turns[-1])
        return running.done

    async def answer_tools(self, results: Sequence[ToolResult], settings: Mapping[str, Any]) -> Done | None:
        """Pass the results of the last reply's calls to the model; None if there is no reply to them."""
        texts = [result.text for result in results]
        params = {"results": texts}
        self._chat.meter.begin("reading")
        before, joined = self._chat.state.turns, "\n".join(texts)
        return await self.show(ReplyRequest("answer_tools", before, joined, params, settings, results))

    def give_back(self, request: ReplyRequest) -> None:
        """Draw the conversation as it is without a reply, and return the question to its user."""
        self._chat.view.rebuilt(self._chat.state)
        if self.gives_back and not request.results:
            self._chat.view.returned(request.question)

    async def _follow(self, call: Call, running: RunningTurn, paths: Sequence[str]) -> StateResult:
        """Follow the call, and meanwhile look at the files that go with its question."""
        looking = asyncio.ensure_future(self._look(paths, running))
        try:
            return await self._chat.follow(call, running)
        finally:
            await looking

    async def _look(self, paths: Sequence[str], running: RunningTurn) -> None:
        """Show the pictures in the files that go with a question, once they are read."""
        if paths:
            running.show(await asyncio.to_thread(self._chat.picture_files.look, paths))
            self._chat.view.pictures(running.turn)

    def _running(self, request: ReplyRequest) -> RunningTurn:
        name = self._chat.model.name if self._chat.model else ""
        number = len(request.before) + 1
        return RunningTurn(new_turn(number, request.question, name, request.results, request.pictures))

    def _keep_partial(self, before: Sequence[Turn], running: RunningTurn) -> None:
        """Keep what an engine said before it died."""
        chat = self._chat
        running.fail(chat.status.reason)
        self.interrupted = running.turn
        chat.state = replace(chat.state, turns=(*before, running.turn))
        chat.view.finished(running.done, running.turn)
