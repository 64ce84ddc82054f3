"""The real engine process, whose embedded model says what a file's lines say: run as a file.

The first argument is a file of JSON strings, one for each reply; a reply without a line ends at once.
"""

import json
import sys
from collections import deque
from pathlib import Path

from qchat.core.conversation.reply import PendingReply
from qchat.core.conversation.session import Session
from qchat.core.generation.decode import Decoder
from qchat.core.worker.process import main

script = Path(sys.argv.pop(1))


def script_replies() -> None:
    """Have every reply of a session draw the ids of the next line."""
    run, draw = Session._run, Decoder.next
    ids: deque[int] = deque()
    said = 0

    def run_scripted(self: Session, reply: PendingReply):
        nonlocal said
        lines = script.read_text().splitlines()
        text = json.loads(lines[said]) if said < len(lines) else "<|im_end|>"
        said += 1
        ids.clear()
        ids.extend(self.engine.tokenizer.encode(text))
        return run(self, reply)

    def draw_scripted(self: Decoder) -> int:
        if ids:
            self.force(ids.popleft())
        return draw(self)

    Session._run, Decoder.next = run_scripted, draw_scripted


if __name__ == "__main__":
    script_replies()
    sys.exit(main())
