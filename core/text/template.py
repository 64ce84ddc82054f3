"""Messages and the model's chat template, which renders them as one prompt.

Owns what messages may look like before a template sees them, and the template for folders without one.
Reads the spellings that other programs use. Refuses pictures that nobody has placed, unknown roles, and tool
arguments that are not an object.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TemplateError
from ..machine.files import parse_json, read_json, read_text
from .jinja_sandbox import Program

MAX_TEMPLATE_NBYTES = 1 << 20
ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"developer": "system"}  # as llama.cpp and the template of Qwen3.6 have it
THOUGHT_NAMES = ("reasoning_content", "reasoning", "thinking")  # the first that is given counts
IMAGE_PART = {"type": "image"}  # where a picture stands in the content that a template renders
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

BUILT_IN = (Path(__file__).parents[1] / "embedded" / "chat_template.jinja").read_text(encoding="utf-8")
BUILT_IN_NOTICE = "this model has no chat template: using qchat's own, ChatML with think blocks"


class Template:
    """A chat template. `origin` is its file or "built-in"; `notice` tells the user that it is our own."""

    def __init__(self, source: str, origin: str, *, named_tokens: Mapping[str, str] | None = None):
        """Compile `source`; `named_tokens` (eos_token and such) become variables. Raises TemplateError."""
        if not source.strip():
            raise TemplateError(f"{origin}: the chat template is empty")
        self.source = source
        self.origin = origin
        self.notice = BUILT_IN_NOTICE if origin == "built-in" else None
        self._program = Program(source, origin)
        self._named_tokens = dict(named_tokens or {})
        self.can_preserve_thinking = self._keeps_thinking()

    @classmethod
    def load(cls, folder: Path) -> "Template":
        """Load the first of chat_template.jinja, chat_template.json, tokenizer_config.json; else our ChatML.

        Raises TemplateError for a file that cannot be read or a template that cannot be compiled.
        """
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path, TemplateError) if config_path.exists() else {}
        named = {name: _token_text(config.get(name)) for name in NAMED_TOKENS}
        source, origin = _find_source(folder, config)
        return cls(source, origin, named_tokens={name: text for name, text in named.items() if text})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """Render the prompt. `enable_thinking` and values of `extra` stay undefined if they are None.

        `extra` holds switches of the template: preserve_thinking, reasoning_effort. Raises TemplateError for
        messages that `check_messages` refuses, and with the template's own words if it raises.
        """
        switches = {"enable_thinking": enable_thinking, **extra}
        variables = {
            **self._named_tokens,
            "messages": [_check_message(m, f"message {n}", placed=True) for n, m in enumerate(messages, 1)],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **{name: value for name, value in switches.items() if value is not None},
        }
        return self._program.render(variables)

    def _keeps_thinking(self) -> bool:
        """Whether the template can keep the reasoning of turns before the last question; renders a probe."""
        probe = [
            {"role": "user", "content": "first question"},
            {"role": "assistant", "content": "an answer", "reasoning_content": "a kept thought"},
            {"role": "user", "content": "second question"},
        ]
        try:
            return "a kept thought" in self.render(probe, enable_thinking=True, preserve_thinking=True)
        except TemplateError:
            return False


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Normalise a history: content becomes one string, tool arguments an object, a thought its own field.

    Raises TemplateError naming the message, counted from 1, and what is wrong with it.
    """
    checked = [_check_message(message, f"message {number}") for number, message in enumerate(messages, 1)]
    return [separate_thought(message) for message in checked]


def separate_thought(message: dict[str, Any]) -> dict[str, Any]:
    """Return an assistant's message with the thought that its content holds as `reasoning_content`.

    As the templates of Qwen3.5 do: the thought ends at the first `</think>`, the answer follows the last.
    """
    content = message["content"]
    if message["role"] != "assistant" or "reasoning_content" in message or "</think>" not in content:
        return message
    thought, *_, answer = content.split("</think>")
    thought = thought.rpartition("<think>")[2].strip("\n")
    return {**message, "content": answer.lstrip("\n"), "reasoning_content": thought}


def _check_message(message: Any, where: str, *, placed: bool = False) -> dict[str, Any]:
    """Check one message; with `placed` its content may have pictures, each as IMAGE_PART."""
    if not isinstance(message, Mapping):
        raise TemplateError(
            f"{where} must be an object with role and content, found {type(message).__name__}"
        )
    role = message.get("role")
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise TemplateError(f"{where}: role is {role!r:.40}, wanted one of {', '.join(ROLES)}")
    content = message.get("content")
    has_images = placed and isinstance(content, list) and IMAGE_PART in content
    checked = {**message, "role": role, "content": content if has_images else _content_text(content, where)}
    checked |= _reasoning(checked, where)
    if checked.get("tool_calls") is not None:
        checked["tool_calls"] = _check_tool_calls(checked["tool_calls"], where)
    return checked


def _reasoning(message: dict[str, Any], where: str) -> dict[str, str]:
    """Take the thought out of `message`, whatever its field is called."""
    given = [(name, message.pop(name)) for name in THOUGHT_NAMES if name in message]
    name, thought = next((pair for pair in given if pair[1] is not None), ("", None))
    if thought is None:
        return {}
    if not isinstance(thought, str):
        raise TemplateError(f"{where}: {name} must be text, found {type(thought).__name__}")
    return {"reasoning_content": thought}


def _content_text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TemplateError(
            f"{where}: content must be text or a list of parts, found {type(content).__name__}"
        )
    return "".join(_part_text(part, where) for part in content)


def _part_text(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise TemplateError(f"{where}: only text parts can be read, found {part!r:.60}")
    return text


def _check_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise TemplateError(f"{where}: tool_calls must be a list, found {type(calls).__name__}")
    return [_check_tool_call(call, f"{where}, tool call {number}") for number, call in enumerate(calls, 1)]


def _check_tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError(f"{where} must be an object that names its function")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}: its argument text", TemplateError)
    if not isinstance(arguments, Mapping):
        raise TemplateError(f"{where}: arguments must be an object, found {type(arguments).__name__}")
    identity = {"id": call["id"]} if "id" in call else {}
    return {**identity, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _find_source(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """The template's text and where it came from."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path, TemplateError, MAX_TEMPLATE_NBYTES), path.name
    path = folder / "chat_template.json"
    if path.exists():
        return _named_source(read_json(path, TemplateError).get("chat_template"), path.name), path.name
    if config.get("chat_template") is not None:
        return _named_source(config["chat_template"], "tokenizer_config.json"), "tokenizer_config.json"
    return BUILT_IN, "built-in"


def _named_source(value: Any, origin: str) -> str:
    """The template text of `value`, which is that text or a list of named ones with a "default"."""
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = entries[-1].get("template") if entries else None
    if not isinstance(value, str):
        raise TemplateError(f"{origin}: chat_template must be text, or a list with one named default")
    if len(value.encode("utf-8", "replace")) > MAX_TEMPLATE_NBYTES:
        raise TemplateError(f"{origin}: chat_template is larger than {MAX_TEMPLATE_NBYTES:,} bytes")
    return value


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
