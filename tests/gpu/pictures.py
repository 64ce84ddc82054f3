"""Pictures on a GPU: a prompt read by kernels and decoded step by step, against the plain layers in float32.

PYTHONPATH=.dev:. python tests/gpu/pictures.py
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from qchat.core.engine.engine import Engine
from qchat.core.machine.backend import mx
from qchat.core.prompt_cache.live_state import LiveState
from qchat.core.vision.picture import Picture
from tests.compare import relative_rms
from tests.vision_checkpoints import png, write_seeing

SHAPE = {
    "hidden_size": 512,
    "head_dim": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
}


def logits_of(folder: Path, activations: str, kernels: str) -> list[np.ndarray]:
    """The logits after each of the last tokens, which are decoded one by one."""
    os.environ |= {"QCHAT_ACTIVATIONS": activations, "QCHAT_KERNELS": kernels}
    engine = Engine.load(folder)
    placed = [engine.images.place(Picture(png(*size))) for size in ((60, 40), (33, 90))]
    ids = [1, 2, *placed[0].ids, 3, 4, *placed[1].ids, *range(5, 25)]
    live = LiveState(engine)
    list(live.read(ids[:-16], lambda: False))
    found = []
    for id in ids[-16:]:
        hidden = engine.model.hidden([id], live.cache)
        found.append(np.array(engine.model.logits(hidden)[-1]))
    print(
        activations,
        kernels,
        type(engine.model.layers[3]).__name__,
        "fused:",
        bool(engine.model.fused_decoder),
    )
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_seeing(folder, **SHAPE)
        exact = logits_of(folder, "float32", "off")
        for kernels in ("off", "on"):
            found = logits_of(folder, "bfloat16", kernels)
            errors = [relative_rms(a, b) for a, b in zip(found, exact, strict=True)]
            print(f"kernels {kernels}: relative RMS {max(errors):.2e} at most, on {mx.default_device()}")


if __name__ == "__main__":
    main()
