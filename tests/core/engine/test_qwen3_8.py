"""Qwen3.8 end to end on random weights: loaded, chatted with, converted, under its published template."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qchat.core import Session
from qchat.core.checkpoint.config import ModelConfig
from qchat.core.conversion.convert import UNQUANTIZED, Conversion, convert
from qchat.core.engine.engine import Engine
from qchat.core.errors import ConfigError
from qchat.core.generation.reply_settings import ReplySettings
from qchat.core.quant.recipes import Options
from qchat.core.text.template import Template
from tests.checkpoints import tiny_config, write_checkpoint
from tests.compare import relative_rms
from tests.paths import QWEN

TEMPLATE = QWEN / "templates/qwen3.8.jinja"
needs_template = pytest.mark.skipif(not TEMPLATE.exists(), reason=f"the template is not at {TEMPLATE}")
TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two", "reasoning_content": "a kept thought"},
    {"role": "user", "content": "three"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_8") / "raw"
    write_checkpoint(folder, generation="qwen3_8")
    if TEMPLATE.exists():
        (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_its_types_are_those_of_the_same_architecture(moe: bool, flat: bool):
    older, newer = (
        ModelConfig.parse(tiny_config(moe=moe, flat=flat, generation=name)) for name in ("qwen3_5", "qwen3_8")
    )
    assert newer.model_type.startswith("qwen3_8") and newer.is_moe == moe
    assert replace(newer, model_type=older.model_type) == older


@pytest.mark.parametrize("kind", ["qwen3_9", "qwen3_8_vl", "qwen3_8_text_moe", "qwen3_5_text_text"])
def test_other_types_are_still_refused_by_name(kind: str):
    with pytest.raises(ConfigError, match=f"model_type is '{kind}', and qchat runs .*qwen3_8_moe_text"):
        ModelConfig.parse({**tiny_config(), "model_type": kind})


@pytest.mark.parametrize("moe", [False, True])
def test_a_random_model_chats_and_converts(moe: bool, tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=moe, generation="qwen3_8", hidden_size=128)
    settings: dict[str, Any] = {"max_new_tokens": 8, "seed": 1}
    raw = Engine.load(tmp_path / "raw")
    reply = Session(raw, **settings).send("hello")
    assert reply.generated_tokens == 8 or reply.finish_reason == "stop"
    ids = raw.tokenizer.encode("hello, converted model")
    for options, limit in ((Options(recipe=UNQUANTIZED), 0.1), (Options(recipe="none", bits=8), 0.3)):
        target = tmp_path / f"limit {limit}"
        convert(Conversion(tmp_path / "raw", target, options), lambda _: None)
        made = Engine.load(target)
        assert made.config.model_type == raw.config.model_type
        assert (
            relative_rms(made.logits(ids), raw.logits(ids)) < limit
        )  # norms are stored as bfloat16, and random weights amplify it


@needs_template
@pytest.mark.parametrize(
    ("effort", "stated", "opener"),
    [
        (None, "Reasoning effort is set to xhigh", "<think>\n"),
        ("xhigh", "Reasoning effort is set to xhigh", "<think>\n"),
        ("high", "Reasoning effort is set to xhigh", "<think>\n"),
        ("medium", None, "<think>\n"),
        ("low", "Reasoning effort is set to low", "<think>\n"),
        ("none", None, "<think>\n\n</think>\n\n"),
    ],
)
def test_every_effort_reaches_the_prompt(engine: Engine, effort: str | None, stated: str | None, opener: str):
    ids = Session(engine).prompt_ids("hello", reasoning_effort=effort)
    text = engine.tokenizer.decode_with_special(ids)
    assert text.endswith(f"<|im_start|>assistant\n{opener}")
    assert ("Reasoning effort is set to" in text) == (stated is not None)
    assert stated is None or text.startswith(f"<|im_start|>system\n{stated}")


@needs_template
@pytest.mark.parametrize("effort", [None, "xhigh", "high", "medium", "low", "none"])
def test_no_effort_makes_the_template_refuse(engine: Engine, effort: str | None):
    switches = ReplySettings.parse({"reasoning_effort": effort}).template_switches(
        knows_efforts=engine.knows_efforts, thinks_by_default=engine.thinks_by_default
    )
    assert engine.template.render(TURNS, **switches)


@needs_template
def test_thoughts_are_kept_as_the_template_keeps_them_by_default(engine: Engine):
    template = Template(TEMPLATE.read_text(), TEMPLATE.name)
    by_default = template.render(TURNS, enable_thinking=True)
    session = Session(engine)
    assert session.history == "preserve"
    session.prime(TURNS[:2])
    text = engine.tokenizer.decode_with_special(session.prompt_ids("three", enable_thinking=True))
    assert "a kept thought" in by_default
    assert text == by_default
