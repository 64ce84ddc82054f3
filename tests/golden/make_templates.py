"""Renderings of published chat templates by Hugging Face transformers, for `templates.json` and live tests.

`PYTHONPATH=.dev:. python tests/golden/make_templates.py [FOLDER]` writes the file: a hash for each rendering,
because the templates are not ours to copy; "error" where the template refuses the conversation.
"""

import argparse
import hashlib
import importlib.util
import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tests.paths import QWEN

FILE = Path(__file__).with_name("templates.json")
TEMPLATES = QWEN / "templates"

needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="transformers is not installed"
)

Messages = list[dict[str, Any]]
SYSTEM = {"role": "system", "content": 'Answer <b>briefly</b> & "well".\n'}
QUESTION = {"role": "user", "content": " What is 2 + 2? 日本語 👩‍👩‍👧\n"}
THOUGHTFUL = {"role": "assistant", "content": "It is 4.\n", "reasoning_content": "\nAdd 2 and 2.\n"}
CALL = {"name": "weather", "arguments": {"city": "Köln", "days": 3, "near": [True, None, {"x": 1.5}]}}
CALLING = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "Ask.",
    "tool_calls": [
        {"type": "function", "id": "a", "function": CALL},
        {"type": "function", "function": {"name": "now", "arguments": {}}},
    ],
}
TALKING = {**CALLING, "content": "I will look.", "tool_calls": CALLING["tool_calls"][:1]}
RESULTS = [{"role": "tool", "content": '{"sky": "<grey>"}'}, {"role": "tool", "content": "noon"}]
PLAIN = {"role": "assistant", "content": "<think>\nold way\n</think>\n\nGrey."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather's state & <outlook> für 'eine' Stadt",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CONVERSATIONS: dict[str, Messages] = {
    "question": [QUESTION],
    "system": [SYSTEM, QUESTION],
    "two turns": [SYSTEM, QUESTION, THOUGHTFUL, PARTS],
    "three turns": [QUESTION, THOUGHTFUL, QUESTION, PLAIN, PARTS],
    "calling": [QUESTION, CALLING],
    "tool loop": [SYSTEM, QUESTION, TALKING, *RESULTS],
    "after a tool loop": [QUESTION, CALLING, *RESULTS, PLAIN, QUESTION, THOUGHTFUL, PARTS],
    "ends in an answer": [QUESTION, THOUGHTFUL],
    "no question": [SYSTEM],
    "late system": [QUESTION, SYSTEM, QUESTION],
}
SWITCHES: dict[str, list[Any]] = {
    "add_generation_prompt": [True, False],
    "enable_thinking": [True, False, None],
    "preserve_thinking": [True, False, None],
    "reasoning_effort": [None, "xhigh", "medium", "low", "extreme"],
    "tools": [None, TOOLS],
}
DRAWN, SWITCHES_EACH = 30, 24


def drawn_conversation(draw: random.Random) -> Messages:
    """One to five turns of every kind; the last one may wait for its answer or for the results of tools."""
    messages = [SYSTEM] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 5)):
        messages.append(draw.choice([QUESTION, PARTS]))
        while draw.random() < 0.4:
            calling = draw.choice([CALLING, TALKING])
            messages += [calling, *RESULTS[: len(calling["tool_calls"])]]
        messages.append(draw.choice([THOUGHTFUL, PLAIN]))
    return messages[: len(messages) - draw.choice([0, 1, 1, 2])] or [QUESTION]


def drawn_conversations() -> dict[str, Messages]:
    """The same DRAWN conversations each time."""
    draw = random.Random(8)
    return {f"drawn {number}": drawn_conversation(draw) for number in range(1, DRAWN + 1)}


def cases() -> Iterator[tuple[str, Messages, dict[str, Any]]]:
    """Name, messages and switches; a switch that is None stays away.

    CONVERSATIONS come with all combinations of switches, drawn ones with some of them.
    """
    every, draw = list(product(*SWITCHES.values())), random.Random(9)
    some = {name: draw.sample(every, SWITCHES_EACH) for name in drawn_conversations()}
    for name, messages in {**CONVERSATIONS, **drawn_conversations()}.items():
        for values in some.get(name, every):
            switches = {key: value for key, value in zip(SWITCHES, values, strict=True) if value is not None}
            words = [f"{key}={'given' if key == 'tools' else value}" for key, value in switches.items()]
            yield " ".join([f"{name}:", *words]), messages, switches


def transformers_rendering(source: str, messages: Messages, switches: dict[str, Any]) -> str:
    """The text, or "error"."""
    from transformers.utils.chat_template_utils import render_jinja_template  # pyright: ignore[reportMissingImports]

    try:
        rendered, _ = render_jinja_template([messages], chat_template=source, **switches)  # type: ignore[misc]
    except (jinja2.TemplateError, TypeError):
        return "error"
    return rendered[0]


def digest(text: str) -> str:
    return text if text == "error" else hashlib.sha256(text.encode()).hexdigest()[:12]


def fold(digests: list[str]) -> str:
    """One hash for the renderings of one conversation."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def by_conversation(renderings: dict[str, str]) -> dict[str, str]:
    """Case names to texts, as conversation names to hashes."""
    groups: dict[str, list[str]] = {}
    for name, text in renderings.items():
        groups.setdefault(name.partition(":")[0], []).append(digest(text))
    return {name: fold(digests) for name, digests in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden hashes beside this script.")
    parser.add_argument("templates", type=Path, nargs="?", default=TEMPLATES, help="folder of *.jinja files")
    golden = {
        path.stem: by_conversation(
            {
                case: transformers_rendering(path.read_text(), messages, switches)
                for case, messages, switches in cases()
            }
        )
        for path in sorted(parser.parse_args().templates.glob("*.jinja"))
    }
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
