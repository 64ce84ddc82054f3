"""Messages, and templates compared with Hugging Face's renderer."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from qchat.core.errors import TemplateError
from qchat.core.text.template import BUILT_IN, Template, check_messages
from tests.golden.make_templates import (
    CALL,
    CALLING,
    CONVERSATIONS,
    FILE,
    QUESTION,
    SYSTEM,
    TEMPLATES,
    by_conversation,
    cases,
    needs_transformers,
    transformers_rendering,
)

needs_templates = pytest.mark.skipif(not TEMPLATES.is_dir(), reason=f"the templates are not at {TEMPLATES}")
published = pytest.mark.parametrize("name", ["qwen3.5-small", "qwen3.5", "qwen3.6", "qwen3.8"])


def rendering(template: Template, messages: list[dict[str, Any]], switches: dict[str, Any]) -> str:
    try:
        return template.render(messages, **{"add_generation_prompt": False, **switches})
    except TemplateError:
        return "error"


def read(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


# --- renderings ---


@needs_templates
@published
def test_published_templates_render_as_hugging_face_renders_them(name: str):
    template = Template(read(name), name)
    ours = {case: rendering(template, messages, switches) for case, messages, switches in cases()}
    assert by_conversation(ours) == json.loads(FILE.read_text())[name]


@needs_templates
@needs_transformers
@published
def test_published_templates_render_as_the_installed_transformers_does(name: str):
    template = Template(read(name), name)
    for case, messages, switches in list(cases())[::7]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peer's own imports
            expected = transformers_rendering(read(name), messages, switches)
        assert rendering(template, messages, switches) == expected, case


@needs_templates
@published
def test_preserving_thoughts_is_found_by_trying(name: str):
    assert Template(read(name), name).can_preserve_thinking == (name in ("qwen3.6", "qwen3.8"))


@needs_templates
@pytest.mark.parametrize("conversation", ["question", "system", "two turns", "calling", "tool loop"])
def test_the_built_in_template_renders_as_qwen_3_6_does(conversation: str):
    ours, theirs = Template(BUILT_IN, "built-in"), Template(read("qwen3.6"), "qwen3.6")
    for case, messages, switches in cases():
        if case.startswith(f"{conversation}:") and "tools" not in switches:
            assert rendering(ours, messages, switches) == rendering(theirs, messages, switches), case


def test_the_built_in_template_lists_tools_before_the_system_text():
    text = Template(BUILT_IN, "built-in").render([SYSTEM, QUESTION], tools=[{"name": "now"}])
    assert text.index('{"name": "now"}') < text.index("Answer <b>") < text.index("What is 2 + 2?")


# --- messages ---


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hello", "message 2 must be an object"),
        ({"content": "x"}, "role is None"),
        ({"role": "robot", "content": "x"}, "role is 'robot', wanted one of system, user, assistant, tool"),
        ({"role": "user", "content": 5}, "content must be text or a list of parts, found int"),
        ({"role": "user", "content": [{"type": "image", "image": "x"}]}, "only text parts"),
        ({"role": "user", "content": [{"type": "text"}]}, "only text parts"),
        ({"role": "assistant", "reasoning_content": 1}, "reasoning_content must be text"),
        ({"role": "assistant", "tool_calls": {}}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "tool call 1 must be an object that names"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "wanted an object"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "is not valid JSON"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]},
            "arguments must be an object",
        ),
    ],
)
def test_a_message_that_is_none_is_refused_by_number(message: Any, words: str):
    with pytest.raises(TemplateError, match="message 2") as caught:
        check_messages([QUESTION, message])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "answer", "thought"),
    [
        ("<think>\nwhy\n</think>\n\nbecause", "because", "why"),
        ("<think>why</think>because", "because", "why"),
        ("why\n</think>\n\nbecause", "because", "why"),
        ("<think>\n\n</think>\n\nbecause", "because", ""),
        ("<think>a<think>b</think>c</think>d", "d", "b"),
        (
            [{"type": "text", "text": "<think>why</think>"}, {"type": "text", "text": "because"}],
            "because",
            "why",
        ),
        ("<think>no end", "<think>no end", None),
        ("plain", "plain", None),
    ],
)
def test_a_thought_inside_the_content_of_a_history_is_taken_apart(
    content: Any, answer: str, thought: str | None
):
    checked = check_messages([QUESTION, {"role": "assistant", "content": content}])[1]
    assert (checked["content"], checked.get("reasoning_content")) == (answer, thought)


@needs_templates
@pytest.mark.parametrize("name", ["qwen3.5-small", "qwen3.5", "qwen3.6"])
def test_thoughts_are_taken_apart_as_the_templates_do(name: str):
    for content in (
        "<think>\nwhy\n</think>\n\nbecause",
        "a</think>b</think>\nc",
        "<think>a<think>b</think>c",
    ):
        template = Template(read(name), name)
        messages = [QUESTION, {"role": "assistant", "content": content}]
        assert template.render(check_messages(messages)) == template.render(messages)


def test_what_users_and_tools_write_about_thoughts_is_left_alone():
    messages = [{"role": role, "content": "<think>a</think>b"} for role in ("system", "user", "tool")]
    assert check_messages(messages) == messages
    given = {"role": "assistant", "content": "a</think>b", "reasoning_content": "c"}
    assert check_messages([given]) == [given]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_read_under_each_of_its_names(name: str):
    others = {"reasoning_content": None, "thinking": None}
    message = {"role": "assistant", "content": "a", **others, name: "why"}
    assert check_messages([message]) == [{"role": "assistant", "content": "a", "reasoning_content": "why"}]
    with pytest.raises(TemplateError, match=f"message 1: {name} must be text, found int"):
        check_messages([{**message, name: 3}])


def test_a_developer_is_the_system():
    assert check_messages([{"role": "developer", "content": "x"}]) == [{"role": "system", "content": "x"}]
    rendered = [
        Template(BUILT_IN, "built-in").render([{"role": role, "content": "Be brief."}, QUESTION])
        for role in ("developer", "system")
    ]
    assert rendered[0] == rendered[1]


def test_arguments_written_as_json_text_render_like_the_object():
    as_text = {"function": {"name": CALL["name"], "arguments": json.dumps(CALL["arguments"])}}
    bare = {"name": CALL["name"], "arguments": CALL["arguments"]}
    template = Template(BUILT_IN, "built-in")
    texts = {
        template.render([QUESTION, {**CALLING, "tool_calls": [call]}])
        for call in (as_text, bare, CALLING["tool_calls"][0])
    }
    assert len(texts) == 1


def test_the_callers_messages_are_left_as_they_are():
    before = json.dumps(CONVERSATIONS)
    for messages in CONVERSATIONS.values():
        check_messages(messages)
    assert json.dumps(CONVERSATIONS) == before


# --- where the template comes from ---


def folder_with(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_the_template_file_comes_first_then_the_json_then_the_tokenizer_config(tmp_path: Path):
    config = {
        "chat_template": "from config {{ eos_token }}{{ bos_token }}",
        "eos_token": {"content": "<end>"},
    }
    folder_with(tmp_path, tokenizer_config__json=config)
    assert Template.load(tmp_path).render([QUESTION]) == "from config <end>"
    folder_with(tmp_path, chat_template__json={"chat_template": "from json"})
    assert Template.load(tmp_path).render([QUESTION]) == "from json"
    folder_with(tmp_path, chat_template__jinja="from jinja")
    template = Template.load(tmp_path)
    assert (template.render([QUESTION]), template.origin, template.notice) == (
        "from jinja",
        "chat_template.jinja",
        None,
    )


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder_with(tmp_path, tokenizer_config__json={"chat_template": named})
    assert Template.load(tmp_path).render([QUESTION]) == "yes"


def test_a_folder_without_a_template_gets_ours_and_says_so(tmp_path: Path):
    template = Template.load(tmp_path)
    assert template.origin == "built-in"
    assert template.notice is not None and "no chat template" in template.notice
    assert template.can_preserve_thinking
    thinking = template.render([QUESTION], enable_thinking=True)
    assert thinking.endswith("<|im_start|>assistant\n<think>\n")
    assert template.render([QUESTION], enable_thinking=False).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
        ("chat_template.jinja", b"x" * (1 << 20) + b"x", "larger than the 1,048,576 bytes"),
        ("chat_template.jinja", b"line one\n{% if %}", "chat_template.jinja, line 2: Expected an expression"),
        ("chat_template.json", b"[]", "wanted an object"),
        ("chat_template.json", b'{"chat_template": 5}', "chat_template must be text"),
        ("chat_template.json", b'{"chat_template": ""}', "the chat template is empty"),
        ("chat_template.jinja", b" \n", "the chat template is empty"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "other"}]}', "one named default"),
        ("tokenizer_config.json", b'{"chat_template": "{{ x | nothing }}"}', "No filter named 'nothing'"),
    ],
)
def test_a_bad_template_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TemplateError) as caught:
        Template.load(tmp_path)
    assert words in str(caught.value) and name in str(caught.value)


def test_a_template_that_raises_says_so_in_its_own_words():
    template = Template("{{ raise_exception('No user\n query') }}", "chat_template.jinja")
    with pytest.raises(TemplateError, match=r"^chat_template\.jinja: No user query$"):
        template.render([QUESTION])


@needs_templates
@published
def test_thousands_of_short_messages_are_no_attack(name: str):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}] * 2000
    assert Template(read(name), name).render(messages).count("<|im_end|>") >= 4000
