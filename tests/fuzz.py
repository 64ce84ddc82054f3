"""Mutations for `tests/test_fuzz.py`: model folders, chat templates, exported conversations, protocol lines.

Every mutation follows from a seed alone. `python tests/fuzz.py KIND GOOD SEED...` runs the cases of some
seeds and prints a JSON line for each: outcome, CPU seconds, and the peak memory so far, children included.
"""

import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from tests.paths import QWEN

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 63, 10**12, 10**400, -(10**400),
    0.0, -0.5, 1e-300, 1e300, 4.0,
    "", "x", "yes", "4", "\x1b[31m\x07", "\u202e\ufdd0", "<|im_end|>", "../../etc/passwd", "x" * 100_000,
    [], {}, [[]], [None], [1, "a"], {"": None}, {"a": {"b": {"c": []}}}, [0] * 50_000,
]  # fmt: skip
ODD_TEXTS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "{",
    "]",
    '"',
    "[" * 50_000,
    '{"a":' * 5_000,
]
NEW_KEYS = ("\x00", "type", "rope_scaling", "quantization", "bits", "tie_word_embeddings")
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
INDEX = "model.safetensors.index.json"
NODE = {
    "id": 1, "parent": None, "role": "user", "text": "hi", "thinking": "", "tool_calls": [], "ids": [1, 2],
    "opener": [], "state": "complete", "settings": {}, "stats": {"prompt_tokens": 3}, "created": 1.0,
}  # fmt: skip
CALL = {"name": "f", "arguments": {"a": 1}}
DOCUMENT: dict[str, Any] = {
    "format": "qchat-conversation", "version": 1, "title": "t", "system": "", "settings": {}, "leaf": 2,
    "created": 1.0,
    "model": {"name": "m", "config_hash": "", "weights": "", "template_hash": "", "tokenizer_hash": ""},
    "nodes": [NODE, NODE | {"id": 2, "parent": 1, "role": "assistant", "tool_calls": [CALL]}],
}  # fmt: skip


def places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys, the first few of long lists and objects."""
    found = [] if found is None else found
    if isinstance(value, dict | list):
        keys = list(value)[:40] if isinstance(value, dict) else list(range(min(len(value), 40)))
        for key in keys:
            found.append((value, key))
            places(value[key], found)
    return found


def mutate_json(draw: random.Random, value: Any) -> str:
    """The text of a JSON value after one to three changes: values replaced, removed, moved, text cut."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 3)):
        container: Any
        container, key = draw.choice(places(value) or [([value], 0)])
        match draw.randrange(5):
            case 0 if isinstance(container, dict):
                container.pop(key, None)
            case 1 if isinstance(container, dict):
                container[draw.choice([f"{key} ", *NEW_KEYS])] = deepcopy(draw.choice(ODD_VALUES))
            case 2:
                other, there = draw.choice(places(value) or [([value], 0)])
                container[key] = json.loads(json.dumps(other[there]))
            case _:
                container[key] = deepcopy(draw.choice(ODD_VALUES))
    text = json.dumps(value)
    return text if draw.random() < 0.8 else mutate_text(draw, text)


def mutate_text(draw: random.Random, text: str) -> str:
    at = draw.randrange(len(text) + 1)
    match draw.randrange(4):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + draw.choice(ODD_TEXTS) + text[at:]
        case 2:
            return "\ufeff" + text
        case _:
            return text[:at] + text[at + draw.randrange(1, 50) :]


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed) if draw.random() < 0.7 else bytes(changed[: draw.randrange(len(changed) + 1)])


def mutate_shard(draw: random.Random, path: Path) -> None:
    """Change the header of a shard as JSON, or some bytes of it; the tensors stay where they are."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    if draw.random() < 0.6:
        text = mutate_json(draw, json.loads(data[8:end])).encode("utf-8", "replace")
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    elif draw.random() < 0.5:
        path.write_bytes(mutate_bytes(draw, data[:end]) + data[end:])
    else:
        path.write_bytes(data[: draw.randrange(len(data))])


def mutate_folder(draw: random.Random, folder: Path) -> None:
    """Damage one or two files of a model folder."""
    for _ in range(draw.randint(1, 2)):
        path = draw.choice([*folder.glob("*.safetensors"), *(folder / name for name in (*JSON_FILES, INDEX))])
        if not path.is_file():
            if draw.random() < 0.3:
                path.write_text(mutate_json(draw, {"weight_map": {"a": "model.safetensors"}, "top_k": 20}))
        elif path.suffix == ".safetensors":
            mutate_shard(draw, path)
        elif draw.random() < 0.8:
            path.write_text(mutate_json(draw, json.loads(path.read_text(errors="replace") or "{}")))
        else:
            path.write_bytes(mutate_bytes(draw, path.read_bytes()))


TEMPLATE_PIECES = [
    "{{", "}}", "{%", "%}", "{#", "#}", "{% endif %}", "{% endfor %}", "{% else %}", "{% macro f() %}",
    "{% for x in messages %}", "{% set x = x ~ x %}", "{{ x * 10**9 }}", "{{ messages[99].content }}",
    "{{ messages }}", "|tojson", "|length", "|map(attribute='a.b.c')|list", "|join", "|indent(10**9)",
    "namespace(a=1)", "loop.index0", "loop(messages)", "raise_exception('\x1b[31m no')", "range(10**9)",
    "''.__class__", "\x00", "\x1b]0;x\x07", "{{ f() }}", "{{ '%99999999d' % 1 }}", "{{ none.x }}", "1/0",
    "[::-1]", "('a' * 10**8).split('a')", "is mapping",
]  # fmt: skip
TAG = re.compile(r"\{[{%#].*?[}%#]\}", re.DOTALL)
NAME = re.compile(r"\b(messages|message|content|loop|tools)\b")
CONVERSATION = [
    {"role": "system", "content": "Be concise."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "", "reasoning_content": "Sum.",
     "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}


def template_sources() -> list[str]:
    """The official templates where they are, and qchat's own."""
    from qchat.core.text.template import BUILT_IN

    official = sorted((QWEN / "templates").glob("*.jinja")) if QWEN.exists() else []
    return [BUILT_IN, *(path.read_text() for path in official)]


def mutate_template(draw: random.Random, text: str) -> str:
    """The text after one to six changes: pieces put in or in the place of others, removed, doubled, cut."""
    for _ in range(draw.randint(1, 6)):
        tags = [found.span() for found in re.finditer(r"\{[{%#].*?[}%#]\}", text, re.DOTALL)] or [
            (0, len(text))
        ]
        (begin, end), (other, there) = draw.choice(tags), draw.choice(tags)
        piece = draw.choice(TEMPLATE_PIECES)
        match draw.randrange(7):
            case 0:
                text = text[:begin] + text[end:]
            case 1:
                text = text[:begin] + text[other:there] + text[end:]
            case 2:
                text = text[:begin] + piece + text[end:]
            case 3:
                at = draw.randrange(begin, end + 1)
                text = text[:at] + piece + text[at:]
            case 4:
                text = text[:begin] + text[begin:end] * draw.choice([2, 50, 2000]) + text[end:]
            case 5:
                text = NAME.sub(draw.choice(["x", "none", "range"]), text, count=1)
            case _:
                text = mutate_text(draw, text)
    return text


def protocol_line(draw: random.Random) -> bytes:
    """A line of the protocol, mostly wrong in one or more places."""
    from qchat.core.worker.protocol import METHODS

    method = draw.choice(list(METHODS))
    params = {name: deepcopy(draw.choice(ODD_VALUES)) for name in METHODS[method] if draw.random() < 0.8}
    text = mutate_json(draw, {"id": draw.randrange(100), "method": method, "params": params})
    data = text.encode("utf-8", "replace")
    return data if draw.random() < 0.8 else mutate_bytes(draw, data)


# what ends the process, writes files, or takes as long as it is told to
NOT_LIVE = ("shutdown", "convert", "calibrate", "fetch", "bench", "eval", "compare")
FIXED = ("defaults", "context_limit")  # which bound what one request computes
SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "stop",
    "enable_thinking",
    "reasoning_effort",
    "x",
)


def live_line(draw: random.Random, good: Path, work: Path) -> bytes:
    """A line for a running engine: any of `protocol_line`, or a request that is sound but for one value."""
    from qchat.core.worker.protocol import METHODS

    if draw.random() < 0.5:
        line = protocol_line(draw).replace(b"\n", b" ")
        return b"" if any(f'"{name}"'.encode() in line for name in (*NOT_LIVE, "load")) else line
    method = draw.choice([name for name in METHODS if name not in NOT_LIVE])
    params = {name: value for name, value in sound_values(good, work).items() if name in METHODS[method]}
    if "settings" in params:
        params["settings"] = {draw.choice(SETTINGS): deepcopy(draw.choice(ODD_VALUES))}
    elif (changed := [name for name in params if name not in FIXED]) and draw.random() < 0.7:
        params[draw.choice(changed)] = deepcopy(draw.choice(ODD_VALUES))
    return json.dumps({"id": draw.randrange(10**6), "method": method, "params": params}).encode()


def sound_values(good: Path, work: Path) -> dict[str, Any]:
    """A value for each parameter that a request accepts."""
    return {
        "model": str(good / "packed"),
        "store": str(work / "c.db"),
        "defaults": {"max_new_tokens": 2, "temperature": 0.0},
        "context_limit": 300,
        "text": "hi",
        "turn": 1,
        "number": 1,
        "id": 3,
        "mode": "strip",
        "title": "t",
        "source": str(good / "raw"),
        "results": ["1"],
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "settings": {},
    }


# --- running a case: each returns "" for success or the sentence of the refusal; anything else is a fault ---


def run_folder(draw: random.Random, good: Path, work: Path) -> str:
    from qchat.core.conversion.inspection import inspect_model
    from qchat.core.engine.engine import Engine
    from qchat.core.hub.library import load_problem

    folder = work / "model"
    shutil.copytree(draw.choice(sorted(path for path in good.iterdir() if path.is_dir())), folder)
    with suppress(ValueError):  # where the first of two damages was to the JSON that the second needs
        mutate_folder(draw, folder)
    inspected = refusal(lambda: inspect_model(folder))
    answered = refusal(lambda: Engine.load(folder).logits([1, 2, 3]))
    return " | ".join((load_problem(folder) or "", inspected, answered))


def run_import(draw: random.Random, good: Path, work: Path) -> str:  # noqa: ARG001
    from qchat.core.storage.export import export_conversation
    from qchat.core.storage.importer import import_conversation
    from qchat.core.storage.store import Store

    path = work / "c.json"
    path.write_text(mutate_json(draw, DOCUMENT), errors="replace")

    def act() -> None:
        with Store(work / "c.db") as store:
            number = import_conversation(store, path)
            assert store.conversation(number).model.folder == ""
            store.conversations()
            store.nodes(number)
            for suffix in ("md", "html", "json"):
                export_conversation(store, number, work / f"out.{suffix}", overwrite=True)

    return refusal(act)


def run_template(draw: random.Random, good: Path, work: Path) -> str:  # noqa: ARG001
    from qchat.core.text.template import Template

    source = mutate_template(draw, draw.choice(template_sources()))

    def act() -> None:
        template = Template(source, "chat_template.jinja", named_tokens={"eos_token": "<|im_end|>"})
        for switches in ({"enable_thinking": False}, {"enable_thinking": True, "preserve_thinking": True}):
            template.render(CONVERSATION, tools=[TOOL], **switches)

    return refusal(act)


def run_line(draw: random.Random, good: Path, work: Path) -> str:  # noqa: ARG001
    from qchat.core.worker.protocol import Request, decode, encode

    def act() -> None:
        request = Request.parse(decode(protocol_line(draw)))
        encode({"id": request.id, "params": dict(request.params)})

    return refusal(act)


def refusal(act: Callable[[], Any]) -> str:
    from qchat.core.errors import QchatError

    try:
        act()
    except QchatError as error:
        return str(error)
    return ""


KINDS: dict[str, Callable[[random.Random, Path, Path], str]] = {
    "folder": run_folder,
    "import": run_import,
    "template": run_template,
    "line": run_line,
}


def main() -> None:
    kind, good, *seeds = sys.argv[1:]
    unit = 1 if sys.platform == "darwin" else 1024
    for seed in seeds:
        begin, fault = sum(os.times()[:4]), ""
        with tempfile.TemporaryDirectory() as work:
            try:
                said = KINDS[kind](random.Random(f"{kind} {seed}"), Path(good), Path(work))
            except Exception:  # what is looked for
                said, fault = "", traceback.format_exc()
        whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        peak = max(resource.getrusage(who).ru_maxrss for who in whose) * unit
        case = {
            "seed": seed,
            "said": said,
            "fault": fault,
            "seconds": sum(os.times()[:4]) - begin,
            "peak": peak,
        }
        print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
