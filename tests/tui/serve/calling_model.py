"""The real engine process, whose embedded model calls a tool wherever tools are offered: run as a file.

It asks for the weather in Rome and in Oslo, after a thought where it may think, and answers the results.
"""

import sys
from collections import deque
from collections.abc import Generator

from qchat.core.completion.completion import Completer, CompletionRequest
from qchat.core.events import Event
from qchat.core.generation.decode import Decoder
from qchat.core.worker.process import main

CALL = "<tool_call>\n<function=weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>"
THOUGHT = "I must look.\n</think>\n\n"
CALLS = f"{CALL.format('Rome')}\n{CALL.format('Oslo')}<|im_end|>"
ANSWER = "Sun in Rome, snow in Oslo.<|im_end|>"


def script_replies() -> None:
    """Have every reply to a request with tools draw the ids of a script."""
    stream, draw = Completer.stream, Decoder.next
    ids: deque[int] = deque()

    def stream_scripted(self: Completer, request: CompletionRequest) -> Generator[Event]:
        ids.clear()
        if request.tools:
            thinks = request.settings.get("enable_thinking") is not False and (
                request.settings.get("reasoning_effort") != "none"
            )
            answers = request.messages[-1]["role"] == "tool"
            text = (THOUGHT if thinks else "") + (ANSWER if answers else CALLS)
            ids.extend(self.engine.tokenizer.encode(text))
        return stream(self, request)

    def draw_scripted(self: Decoder) -> int:
        if ids:
            self.force(ids.popleft())
        return draw(self)

    Completer.stream, Decoder.next = stream_scripted, draw_scripted


if __name__ == "__main__":
    script_replies()
    sys.exit(main())
