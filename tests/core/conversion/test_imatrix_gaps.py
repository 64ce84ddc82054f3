"""An imatrix that lacks matrices, or experts that its text never reached: said, and on the card."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.conversion.convert import Conversion, convert
from qchat.core.conversion.source import Source
from qchat.core.events import Notice
from qchat.core.machine.backend import mx
from qchat.core.quant.imatrix import Statistics, write_imatrix
from qchat.core.quant.recipes import Options
from tests.checkpoints import write_checkpoint

SAYS = "has no importances for"


def write(folder: Path, path: Path, keeps: Callable[[str], bool], unreached: int = 0) -> None:
    statistics: dict[str, Statistics] = {}
    for name, spec in Source.open(folder).specs.items():
        if spec.kind == "matrix" and not name.startswith("mtp.") and keeps(name):
            *stack, _, columns = spec.shape
            counts = mx.ones(stack or (1,))
            counts[:unreached] = 0 if stack else 1
            statistics[name] = Statistics(mx.abs(mx.random.normal((*stack, columns))), counts)
    config = ModelConfig.load(folder)
    write_imatrix(path, statistics, config, datasets=["x"], chunk_count=1, chunk_size=1)


def notices(folder: Path, imatrix: Path) -> list[str]:
    said: list[str] = []
    conversion = Conversion(
        folder, folder.parent / "new", Options("none", bits=4), imatrix=imatrix, awq="off"
    )
    convert(conversion, lambda event: said.append(event.text) if isinstance(event, Notice) else None)
    return said


@pytest.mark.parametrize("layers", [1, 3])
def test_missing_layers_are_said(tmp_path: Path, layers: int):
    write_checkpoint(tmp_path / "raw", mtp=False)
    known = tuple(f"layers.{i}." for i in range(layers))
    write(tmp_path / "raw", tmp_path / "i.gguf", lambda name: name.startswith(known))
    said = [text for text in notices(tmp_path / "raw", tmp_path / "i.gguf") if SAYS in text]
    assert len(said) == 1 and "i.gguf" in said[0]
    assert SAYS in (tmp_path / "new/README.md").read_text()


def test_a_whole_imatrix_is_no_reason_for_a_notice(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", mtp=False)
    write(tmp_path / "raw", tmp_path / "i.gguf", lambda _: True)
    assert not [text for text in notices(tmp_path / "raw", tmp_path / "i.gguf") if "imatrix" in text]


def test_experts_that_were_never_reached_are_said(tmp_path: Path):
    write_checkpoint(tmp_path / "raw", moe=True, mtp=False)
    write(tmp_path / "raw", tmp_path / "i.gguf", lambda _: True, unreached=1)
    said = [text for text in notices(tmp_path / "raw", tmp_path / "i.gguf") if "never reached" in text]
    assert len(said) == 1
