"""Our importances beside llama.cpp's, made from the same model and text.

    PYTHONPATH=.dev python tests/peers/imatrix_agreement.py MODEL THEIRS.gguf TEXT

Prints, by kind of matrix, how far single channels and whole matrices are apart; 1 if a channel is over 3 %.
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.measuring.calibrate import calibrate_model
from qchat.core.quant.imatrix import Imatrix, read_imatrix

LIMIT = 0.03


def distances(ours: Imatrix, theirs: Imatrix) -> dict[str, tuple[float, float, int]]:
    """By kind of matrix: the largest and the median difference of a channel, relative, and how many."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for name in theirs:
        a, b = (np.array(imatrix.importance(name)) for imatrix in (ours, theirs))
        found[name.rsplit(".", 1)[-1]].append(np.abs(a / b - 1).ravel())
    return {
        kind: (np.concatenate(parts).max(), np.median(np.concatenate(parts)), len(parts))
        for kind, parts in found.items()
    }


def main(model: Path, file: Path, text: Path) -> int:
    config = ModelConfig.load(model)
    theirs = read_imatrix(file, config)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "ours.gguf"
        calibrate_model(model, output, data=text, chunk_size=theirs.chunk_size, chunks=theirs.chunk_count)
        table = distances(read_imatrix(output, config), theirs)
    print(f"{'matrix':<16}{'matrices':>9}{'median':>10}{'largest':>10}")
    for kind, (largest, median, matrices) in table.items():
        print(f"{kind:<16}{matrices:>9}{median:>10.4%}{largest:>10.4%}")
    return int(max(largest for largest, *_ in table.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
