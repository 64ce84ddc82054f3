"""The commands that make and measure models, once for real: a tiny model, the true engine, the true jobs."""

import asyncio
from pathlib import Path

import pytest

from qchat.tui.chat.controller import Chat
from qchat.tui.commands import perform
from qchat.tui.text.report import report_text
from qchat.tui.user.settings import Settings
from tests.checkpoints import write_checkpoint
from tests.run_async import run_async
from tests.tui.fake_front import FakeFront

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.mark.slow
def test_a_model_is_made_measured_and_compared_from_the_chat(tmp_path: Path):
    raw, made = tmp_path / "raw", tmp_path / "made"
    write_checkpoint(raw)
    (tmp_path / "text.txt").write_text(TEXT)
    lines = (
        f"/convert {raw} {made} -q --q-bits 4",
        f"/calibrate {raw} -o {tmp_path}/imatrix.gguf --data {tmp_path}/text.txt --chunk-size 32 --chunks 2",
        f"/eval {made} --reference {raw} --data {tmp_path}/text.txt --context 32",
        f"/inspect {made}",
        f"/compare {raw} {made} hello",
        f"/bench {made} --runs 1",
        f"/load {made}",
        "/show prompt hello",
    )
    front = FakeFront()
    options = Settings().replaced(
        "test", models_dir=[str(tmp_path)], max_tokens=8, think=False, temperature=0
    )
    chat = Chat(front, settings=options)

    async def run() -> None:
        try:
            await chat.load(str(raw))
            for line in lines:
                await perform(line, chat, front)
                for job in chat.jobs:
                    await job.ended()
                while chat.busy:
                    await asyncio.sleep(0.05)
        finally:
            await chat.quit()

    run_async(run(), 120)
    assert not front.all("error")
    assert [(job.method, job.state) for job in chat.jobs] == [
        (method, "done") for method in ("convert", "calibrate", "eval", "inspect", "compare", "bench")
    ]
    told = {job.method: report_text(job.report()) for job in chat.jobs}
    assert "bits per weight" in told["convert"] and (made / "config.json").exists()
    assert "imatrix.gguf" in told["calibrate"] and (tmp_path / "imatrix.gguf").exists()
    assert "mean KL" in told["eval"] and "GB" in told["eval"]
    assert "embed" in told["inspect"]
    assert "raw" in told["compare"] and "nats on average" in told["compare"]
    assert "sustained tok/s" in told["bench"]
    assert chat.model is not None and chat.model.path == str(made)
    assert "<|im_start|>user\nhello<|im_end|>" in front.said
