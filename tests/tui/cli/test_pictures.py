"""Pictures on the command line, and through the engine process to a real model."""

import json
from pathlib import Path

import pytest

from qchat.core import Store
from qchat.tui.chat.client import EngineClient, EngineError
from tests.run_async import run_async
from tests.tui.cli.test_oneshot import qchat
from tests.vision_checkpoints import png, write_seeing


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_seeing(folder)
    return folder


@pytest.mark.slow
def test_a_picture_of_a_file_is_part_of_the_prompt(seeing: Path, tmp_path: Path):
    (tmp_path / "cat.png").write_bytes(png(60, 40))
    settings = ("--max-tokens", "2", "--seed", "1", "--json")
    code, out, err = qchat(seeing, "-p", "hi", "-f", str(tmp_path / "cat.png"), *settings)
    assert code == 0, err
    _, plain, _ = qchat(seeing, "-p", "hi", *settings)
    counts = [json.loads(text)["usage"]["prompt_tokens"] for text in (out, plain)]
    assert counts[0] - counts[1] == 8 * 5 + 2  # the picture between its two marks
    _, out, _ = qchat(seeing, "-f", str(tmp_path / "cat.png"), "--image-tokens", "12", *settings, piped="")
    assert json.loads(out)["usage"]["prompt_tokens"] < counts[0]


@pytest.mark.slow
def test_a_file_that_is_no_picture_ends_in_a_sentence(seeing: Path, tmp_path: Path):
    (tmp_path / "cat.png").write_text("meow")
    code, out, err = qchat(seeing, "-p", "hi", "-f", str(tmp_path / "cat.png"))
    assert (code, out) == (2, "")
    assert err.endswith("cat.png is not a PNG, JPEG, WebP, GIF or AVIF picture\n")


@pytest.mark.slow
def test_the_engine_process_takes_pictures_by_their_paths(seeing: Path, tmp_path: Path):
    (tmp_path / "cat.png").write_bytes(png(60, 40))

    async def talk() -> None:
        client = EngineClient()
        await client.start()
        try:
            await ask(client)
        finally:
            await client.stop()

    async def ask(client: EngineClient) -> None:
        store = {"store": str(tmp_path / "c.db"), "conversation": None}
        await client.request("load", model=str(seeing), image_tokens=12, **store)
        settings = {"max_new_tokens": 2, "seed": 1}
        images = [str(tmp_path / "cat.png")]
        asked = await client.request("send", text="@cat.png?", images=images, settings=settings)
        assert asked.state.turns[0].question == "@cat.png?"
        shown = await client.request("prompt", text=None)
        assert "<|vision_start|>[picture, 8 tokens]<|vision_end|>@cat.png?" in shown.text
        with pytest.raises(EngineError, match="images has a value that is not text"):
            await client.request("send", text="x", images=[1], settings=settings)

    run_async(talk())
    with Store(tmp_path / "c.db") as store:
        latest = store.latest()
        assert latest is not None
        assert list(store.pictures(latest.id).values()) == [png(60, 40)]
