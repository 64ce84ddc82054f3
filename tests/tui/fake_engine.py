"""An engine process without a model: speaks the protocol, keeps a conversation, answers as a script says.

A script is a list of steps, one JSON object each: `{"method": "send", ...}`. The steps of a method are used
one after the other and the last one again and again; a method without steps does what the protocol says. A
step has

    thought, answer   what to reply (methods that reply), word by word
    calls, notice     tools that the reply calls, as {"name", "arguments"}, and a notice before it
    unread            whether the answer holds a call that could not be read
    background, log   what to tell beside all calls, before everything else
    events            what to yield instead, or of any other method, in order
    seconds           to wait before each event; a cancel is heeded there
    result            what to end with, instead of the usual
    error             {"kind", "message", "exit_code"} to end with
    die               a signal's name, or an exit code, to end the process with after the events
    last_words        what to write to stderr before dying

Use: `fake = FakeEngine(tmp_path, {"method": "send", "answer": "Hi!"})`, `Chat(view, fake.client, ...)`,
`fake.asked("send")`.
"""

import json
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qchat.core.conversation.summary import ShownPicture
from qchat.core.errors import QchatError, UsageError
from qchat.core.vision.picture import read_picture_file
from qchat.core.worker.protocol import PROTOCOL_VERSION, Cancelled, Request, decode, encode, error_message

sys.path[:0] = [str(Path(__file__).parents[2])]  # this file is run by its path

from tests.tui.fake_jobs import PERFORMANCE, RESULTS_OF_JOBS  # noqa: E402

Step = dict[str, Any]
MODEL = {
    "name": "fake-4bit",
    "path": "/models/fake-4bit",
    "nbytes": 4 << 30,
    "bits_per_weight": 4.5,
    "max_position_embeddings": 32768,
    "context_limit": 32768,
    "moe": False,
    "mtp": False,
    "can_preserve_thinking": True,
    "thinks_by_default": True,
    "notices": [],
    "forms": {"delta net, 1 token": "chunked"},
    "parameters": {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
    },
    "template": "{{ messages }}",
    "bytes_per_token": 4 << 30,
}
MEMORY = {
    "event": "memory",
    "active_nbytes": 5 << 30,
    "cache_nbytes": 1 << 28,
    "peak_nbytes": 6 << 30,
    "limit_nbytes": 24 << 30,
    "copy_bandwidth": 200e9,
}


PROBABILITY = {
    "event": "logprobs",
    "token": {"id": 5, "data": [89], "logprob": -0.5},
    "top": [{"id": 5, "data": [89], "logprob": -0.5}],
    "in_thought": False,
}


class FakeEngine:
    """What a test has of it: a factory of clients, and the requests that arrived."""

    def __init__(self, folder: Path, *steps: Step):
        self.script, self.record = folder / "script.jsonl", folder / "requests.jsonl"
        self.record.touch()
        self.write(*steps)

    def write(self, *steps: Step) -> None:
        """The script of engines started from now on."""
        self.script.write_text("".join(json.dumps(step) + "\n" for step in steps))

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(Path(__file__)), str(self.script), str(self.record)]

    def client(self):
        from qchat.tui.chat.client import EngineClient

        return EngineClient(self.command)

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.record.read_text().splitlines()]

    def asked(self, method: str) -> list[dict[str, Any]]:
        """The parameters that `method` was called with, None for those not given."""
        return [request["params"] for request in self.requests() if request["method"] == method]


class Conversation:
    """A tree of turns; `leaf` is the number of the reply one is at."""

    def __init__(self, id: int):
        self.id, self.title, self.mode = id, "", "preserve"
        self.system: str | None = None
        self.nodes: list[dict[str, Any]] = []
        self.leaf: int | None = None
        self.tools: list[dict[str, Any]] = []

    def node(self, number: int | None) -> dict[str, Any] | None:
        return next((node for node in self.nodes if node["node"] == number), None)

    def branch(self, leaf: int | None = None) -> list[dict[str, Any]]:
        node = self.node(self.leaf if leaf is None else leaf)
        return [] if node is None else [*(self.branch(node["parent"]) if node["parent"] else []), node]

    def turn(self, number: int) -> dict[str, Any]:
        turns = self.branch()
        if not 1 <= number <= len(turns):
            raise UsageError(f"there is no question {number}: this branch has {len(turns)}")
        return turns[number - 1]

    def add(
        self,
        parent: int | None,
        question: str,
        done: dict[str, Any],
        model_name: str = "",
        results: Sequence[dict[str, Any]] = (),
        pictures: Sequence[dict[str, Any]] = (),
    ) -> None:
        number = 2 * len(self.nodes) + 2
        stats = {
            name: done[name]
            for name in (
                "prompt_tokens",
                "cached_tokens",
                "prefilled_tokens",
                "reasoning_tokens",
                "generated_tokens",
                "performance",
            )
        }
        self.nodes.append(
            {
                "node": number,
                "parent": parent,
                "question": question,
                "thinking": done["thinking"],
                "answer": done["text"],
                "tool_calls": [_without(call, "raw", "tokens") for call in done.get("tool_calls", ())],
                "finish_reason": done["finish_reason"],
                "stats": stats,
                "created": 1_700_000_000.0 + number,
                "model_name": model_name,
                "role": "tool" if results else "user",
                "results": list(results),
                "pictures": list(pictures),
            }
        )
        self.leaf = number
        self.title = self.title or question[:60]

    def state(self) -> dict[str, Any]:
        turns = self.branch()
        parents = {node["parent"] for node in self.nodes}
        ends = [node for node in self.nodes if node["node"] not in parents]
        here = {turn["node"] for turn in turns}
        words = sum(len(f"{turn['question']} {turn['answer']}".split()) for turn in turns)
        return {
            "conversation": self.id,
            "title": self.title,
            "system": self.system,
            "history": self.mode,
            "tokens": 10 * len(turns) + words,
            "context_limit": MODEL["context_limit"],
            "leaf": self.leaf,
            "turns": [self._turn(number, node) for number, node in enumerate(turns, 1)],
            "branches": [self._branch(node, here) for node in ends],
            "tools": [tool["function"]["name"] for tool in self.tools],
        }

    def _branch(self, end: dict[str, Any], here: set[int]) -> dict[str, Any]:
        nodes = [node["node"] for node in self.branch(end["node"])]
        return {
            "number": end["node"],
            "first_words": end["question"][:40],
            "current": end["node"] in here,
            "turns": len(nodes),
            "shared": len(here.intersection(nodes)),
            "answer": end["answer"][:40],
        }

    def turn_of(self, node: dict[str, Any]) -> dict[str, Any]:
        return self._turn(len(self.branch(node["node"])), node)

    def _turn(self, number: int, node: dict[str, Any]) -> dict[str, Any]:
        siblings = [other["node"] for other in self.nodes if other["parent"] == node["parent"]]
        own = _without(node, "parent")
        return {"number": number, **own, "siblings": siblings}


def _shown(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a turn tells of the pictures in files, with a token for each 32 by 32 pixels."""
    for picture in map(read_picture_file, map(Path, paths)):
        with suppress(UsageError):  # a file that only claims to be one
            width, height = picture.size
            tokens = max(width // 32, 1) * max(height // 32, 1)
            yield asdict(ShownPicture(picture.name, width, height, tokens, picture.thumbnail, picture.digest))


class Engine:
    """Serves requests one at a time; a thread of its own reads them and notes what is cancelled."""

    def __init__(self, steps: list[Step], record: Path):
        self._steps: dict[str, list[Step]] = {}
        for step in steps:
            self._steps.setdefault(step["method"], []).append(step)
        self._record = record
        self._waiting: queue.Queue[Request | None] = queue.Queue()
        self._cancelled: set[int] = set()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._conversations = [Conversation(1)]
        self._loaded, self._model_name = False, ""
        self._output = os.fdopen(os.dup(1), "wb")

    @property
    def here(self) -> Conversation:
        return self._conversations[-1]

    def serve(self) -> None:
        self._write({"event": "ready", "protocol": PROTOCOL_VERSION, "pid": os.getpid()})
        threading.Thread(target=self._read, daemon=True).start()
        while (request := self._waiting.get()) is not None:
            try:
                result = self._answer(request)
                self._write({"id": request.id, "result": result})
            except ScriptedError as error:
                self._write({"id": request.id, "error": error.args[0]})
            except QchatError as error:
                self._write(error_message(error, request.id))
            if request.method == "shutdown":
                return

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            try:
                message = decode(line)
                request = Request.parse(message)
            except UsageError as error:
                self._write(error_message(error, None))
                continue
            with self._record.open("a") as file:
                file.write(json.dumps({"method": request.method, "params": dict(request.params)}) + "\n")
            if request.method == "cancel":
                self._cancelled.add(request.params["id"])
            elif request.method == "close_thought":
                self._closed.set()
            else:
                self._waiting.put(request)
                continue
            self._write({"id": request.id, "result": {}})
        os._exit(0)

    def _write(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._output.write(encode(message))
            self._output.flush()

    def _step(self, method: str) -> Step:
        steps = self._steps.get(method, [{}])
        return steps.pop(0) if len(steps) > 1 else steps[0]

    def _answer(self, request: Request) -> dict[str, Any]:
        step = self._step(request.method)
        replies = request.method in ("send", "retry", "edit", "answer_tools")
        if replies and not self._loaded:
            raise UsageError("no model is loaded")
        told = []
        self._closed.clear()
        for name in ("background", "log"):
            if name in step:
                self._write({"event": name, "text": step[name]})
        for event in self._events(request, step, replies):
            if event.get("event") != "done":
                time.sleep(step.get("seconds", 0.0))
            told.append(event)
            self._write({"id": request.id, "events": [event]})
        self._end(step)
        if "error" in step:
            raise ScriptedError({"exit_code": 1, **step["error"]})
        if not replies and request.id in self._cancelled:
            raise Cancelled("cancelled")
        usual = self._replied(request, told) if replies else self._usual(request)
        return step.get("result", usual)

    def _events(self, request: Request, step: Step, replies: bool) -> Iterator[dict[str, Any]]:
        if not replies:
            for event in step.get("events", _usual_events(request.method)):
                if request.id in self._cancelled:
                    return
                yield event
            return
        said = []
        events = step["events"] if "events" in step else _reply_events(step)
        for event in events:
            if request.id in self._cancelled:
                break
            if event["event"] == "thought" and self._closed.is_set():
                continue
            said.append(event)
            yield event
        if not any(event["event"] == "done" for event in said) and "die" not in step and "error" not in step:
            reason = "cancelled" if request.id in self._cancelled else "stop"
            yield _done(said, reason) | {"unread_call": step.get("unread", False)}

    def _end(self, step: Step) -> None:
        if "die" not in step:
            return
        os.write(2, step.get("last_words", "").encode() + b"\n")
        if isinstance(step["die"], int):
            os._exit(step["die"])
        os.kill(os.getpid(), signal.Signals[step["die"]])
        time.sleep(60)

    def _replied(self, request: Request, told: list[dict[str, Any]]) -> dict[str, Any]:
        done = next(event for event in told if event["event"] == "done")
        here, parent, question = self.here, self.here.leaf, request.params.get("text") or ""
        results: list[dict[str, Any]] = []
        pictures = list(_shown(request.params.get("images") or ()))
        if request.method == "retry":
            last = here.turn(len(here.branch()))
            parent, question, results = last["parent"], last["question"], last["results"]
            pictures = last["pictures"]
        if request.method == "edit":
            edited = here.turn(request.params["turn"])
            parent, pictures = edited["parent"], pictures or edited["pictures"]
        if request.method == "answer_tools":
            texts = request.params["results"]
            names = [call["name"] for call in (here.node(parent) or {}).get("tool_calls", ())]
            pairs = zip_longest(names, texts, fillvalue="")
            results = [{"name": name, "text": text, "seconds": None} for name, text in pairs]
            question = "\n".join(texts)
        if done["text"] or done["thinking"] or done["tool_calls"]:
            here.add(parent, question, done, self._model_name, results, pictures)
        return {"state": here.state()}

    def _usual(self, request: Request) -> dict[str, Any]:
        act: Callable[..., dict[str, Any] | None] | None = getattr(self, f"_do_{request.method}", None)
        if act is None:
            return RESULTS_OF_JOBS.get(request.method, {})
        result = act(**request.params)
        return {"state": self.here.state()} if result is None else result

    def _do_load(self, model: str, conversation: int | None, system: str | None, **_: Any) -> dict[str, Any]:
        self._loaded, self._model_name = True, Path(model).name
        if conversation is not None:
            self._go_to(conversation)
        self.here.system = system or self.here.system
        return {"model": {**MODEL, "name": Path(model).name, "path": model}, "state": self.here.state()}

    def _do_state(self) -> None:
        """The usual result is the state."""

    def _do_undo(self) -> dict[str, Any]:
        last = self.here.turn(len(self.here.branch()))
        self.here.leaf = last["parent"]
        return {"question": last["question"], "state": self.here.state()}

    def _do_fork(self, turn: int) -> None:
        self.here.leaf = self.here.turn(turn)["node"]

    def _do_switch(self, number: int) -> None:
        if self.here.node(number) is None:
            raise UsageError(f"there is no reply {number}")
        self.here.leaf = number

    def _do_reset(self) -> None:
        tools = self.here.tools
        self._conversations.append(Conversation(len(self._conversations) + 1))
        self.here.tools = tools

    def _do_prime(self, messages: list[dict[str, Any]]) -> None:
        question = ""
        for message in messages:
            if message["role"] == "user":
                question = message["content"]
                if isinstance(question, list):
                    question = "".join(part.get("text", "") for part in question)
            elif message["role"] == "assistant":
                said = {
                    "thinking": message.get("reasoning_content", ""),
                    "text": message["content"],
                }
                self.here.add(self.here.leaf, question, _done([], "stop") | said)

    def _do_set_system(self, text: str | None) -> None:
        self.here.system = text

    def _do_set_tools(self, tools: list[dict[str, Any]]) -> None:
        self.here.tools = tools

    def _do_history(self, mode: str) -> None:
        self.here.mode = mode

    def _do_open(self, conversation: int) -> None:
        self._go_to(conversation)

    def _go_to(self, conversation: int) -> None:
        found = next((item for item in self._conversations if item.id == conversation), None)
        if found is None:
            found = Conversation(conversation)
        else:
            self._conversations.remove(found)
        self._conversations.append(found)

    def _do_rename(self, title: str) -> None:
        self.here.title = title

    def _do_explain(self) -> dict[str, Any]:
        turns = [
            {
                "turn": number,
                "how": "extend",
                "why": "the live state goes on",
                "prompt_tokens": 20,
                "cached_tokens": 10,
                "prefilled_tokens": 10,
                "image_tokens": 0,
            }
            for number, _ in enumerate(self.here.branch(), 1)
        ]
        return {
            "history": self.here.mode,
            "turns": turns,
            "snapshots": [{"turn": 1, "kind": "B", "tokens": 20, "state_nbytes": 1 << 20}],
            "other_snapshots": 0,
            "snapshot_nbytes": 1 << 20,
            "snapshot_budget_nbytes": 1 << 30,
            "disk_nbytes": 1 << 20,
            "disk_budget_nbytes": 1 << 30,
            "instant": [node["node"] for node in self.here.branch()[-1:]],
        }

    def _do_prompt(self, text: str | None, **_: Any) -> dict[str, Any]:
        prompt = "".join(f"<|im_start|>user\n{turn['question']}<|im_end|>\n" for turn in self.here.branch())
        return {"text": prompt + (text or ""), "tokens": len(prompt.split())}

    def _do_replies(self) -> dict[str, Any]:
        return {"turns": [self.here.turn_of(node) for node in self.here.nodes]}

    def _do_score(self, **_: Any) -> dict[str, Any]:
        return {}

    def _do_count(self, text: str) -> dict[str, Any]:
        return {"tokens": len(text.split())}

    def _do_complete(self, **_: Any) -> dict[str, Any]:
        return {}

    def _do_count_messages(self, messages: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        return {"tokens": sum(len(str(message["content"]).split()) for message in messages)}

    def _do_memory(self) -> dict[str, Any]:
        sizes = {
            "weights_nbytes": MODEL["nbytes"],
            "context_nbytes": 1 << 24,
            "snapshot_nbytes": 1 << 20,
            "snapshot_budget_nbytes": 1 << 30,
        }
        return _without(MEMORY, "event") | sizes

    def _do_save_state(self) -> dict[str, Any]:
        return {"saved": self._loaded}

    def _do_unload(self) -> dict[str, Any]:
        self._loaded = False
        return {}


class ScriptedError(Exception):
    """The error that a step says, as its fields."""


def _usual_events(method: str) -> list[dict[str, Any]]:
    if method == "unload":
        return [{"event": "unloaded"}]
    if method != "load":
        return []
    total = MODEL["nbytes"]
    return [
        {"event": "load", "done_nbytes": total * part // 4, "total_nbytes": total, "detail": "layers"}
        for part in range(5)
    ]


def _reply_events(step: Step) -> list[dict[str, Any]]:
    thought, answer = step.get("thought", ""), step.get("answer", "Yes.")
    return [
        *({"event": "notice", "text": text} for text in [step.get("notice")] if text),
        {"event": "sync", "how": "extend", "cached": 10, "why": "the live state goes on"},
        {"event": "prefill", "done": 10, "total": 20, "cached": 10},
        {"event": "prefill", "done": 20, "total": 20, "cached": 10},
        MEMORY,
        *({"event": "thought", "text": word, "tokens": 1} for word in _words(thought)),
        *({"event": "text", "text": word, "tokens": 1} for word in _words(answer)),
        *({"event": "tooluse", "raw": "", "tokens": 1, **call} for call in step.get("calls", ())),
    ]


def completion_events(answer: str) -> list[dict[str, Any]]:
    """The events of a stateless reply with probabilities, for a step of the method `complete`."""
    said = [event for event in _reply_events({"answer": answer}) if event["event"] != "memory"]
    return [*said, PROBABILITY, _done(said, "stop")]


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+\s*$|\s*\S+", text)


def _done(said: list[dict[str, Any]], reason: str) -> dict[str, Any]:
    texts = {kind: [e for e in said if e["event"] == kind] for kind in ("thought", "text")}
    counts = {kind: sum(event["tokens"] for event in events) for kind, events in texts.items()}
    thinking, text = ("".join(event["text"] for event in texts[kind]) for kind in ("thought", "text"))
    return {
        "event": "done",
        "finish_reason": reason,
        "text": text,
        "thinking": thinking,
        "raw_text": thinking + text,
        "prompt_tokens": 20,
        "cached_tokens": 10,
        "prefilled_tokens": 10,
        "reasoning_tokens": counts["thought"],
        "generated_tokens": sum(counts.values()) + 1,
        "thinking_cut": bool(thinking and not text),
        "context_full": False,
        "detail": "",
        "tool_calls": [_without(event, "event") for event in said if event["event"] == "tooluse"],
        "stop_string": "",
        "unread_call": False,
        "performance": PERFORMANCE | {"seconds_thinking": 1.5 if thinking else 0.0},
    }


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    script = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    Engine(script, Path(sys.argv[2])).serve()
