"""The command that serves the chat's model to other programs."""

import os
from typing import TYPE_CHECKING

from ...core.errors import UsageError
from .base import Command, Front, need_model, starting, whole

if TYPE_CHECKING:
    from ..chat.controller import Chat

MISSING = "/serve needs the packages of its extra: pip install 'qchat[serve]'"
PORT_OPTION, STOP = "--port", "stop"


class Serve(Command):
    """Serve the chat's model to other programs over HTTP; while it serves, list their requests.

    Programs that speak OpenAI's or Anthropic's interface ask at the address that it shows; only this machine
    reaches it, and QCHAT_API_KEY in the environment makes a key necessary. Requests and this chat take turns.
    /serve stop ends it, and so does leaving.
    """

    names = ("serve",)
    usage = f"[{STOP}|{PORT_OPTION} N]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, (STOP,) if chat.server else (PORT_OPTION,))

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if argument == STOP:
            await self._stop(chat, front)
        elif chat.server is None:
            front.note(self._start(chat, argument))
        elif argument:
            raise UsageError(f"it serves already, at {chat.server.url}: /serve {STOP} ends it")
        elif not front.screen("serve"):
            front.report(chat.server.report())

    async def _stop(self, chat: "Chat", front: Front) -> None:
        if chat.server is None:
            raise UsageError("nothing is served: /serve begins it")
        server, chat.server = chat.server, None
        await server.stop()
        front.note(f"{server.url} is no longer served")

    def _start(self, chat: "Chat", argument: str) -> str:
        """Begin to serve; return a sentence that says where."""
        need_model(chat)
        option, _, port = argument.partition(" ")
        if argument and (option != PORT_OPTION or not port.strip()):
            raise self.wrong(f"{argument:.40} is not understood")
        try:
            from ..serve.beside_chat import ChatServer
            from ..serve.defaults import KEY_VARIABLE, PORT
            from ..serve.server import ServeOptions
        except ModuleNotFoundError as error:
            raise UsageError(MISSING) from error
        number = whole(port, PORT_OPTION, 0, 65535) if argument else PORT
        chat.server = ChatServer(chat, ServeOptions(port=number, key=os.environ.get(KEY_VARIABLE) or None))
        return chat.server.greeting
