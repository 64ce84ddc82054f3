"""The vision tower against mlx-vlm's on the same folder and pixels, both in float32."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from qchat.core.engine.engine import Engine
from qchat.core.machine.backend import mx
from qchat.core.vision.picture import Picture
from qchat.core.vision.pixels import patches
from tests.compare import relative_rms
from tests.vision_checkpoints import png, write_seeing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the peer's own imports
    load_model = pytest.importorskip("mlx_vlm.utils").load_model

TOLERANCE = 3e-5


def test_the_tower_sees_what_mlx_vlm_sees(tmp_path: Path):
    write_seeing(tmp_path, hv_ratio=3)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    # mlx-vlm reads these from every config; what they say here is the default
    config["text_config"]["rope_parameters"] |= {"type": "default", "mrope_section": [2, 1, 1]}
    path.write_text(json.dumps(config))
    images = Engine.load(tmp_path).images
    placed = [images.place(Picture(png(*size, seed))) for seed, size in enumerate([(60, 40), (40, 90)])]
    model = load_model(tmp_path)
    model.set_dtype(mx.float32)
    pixels = mx.concatenate([patches(one.picture, one.grid, images.settings) for one in placed])
    merge = images.settings.merge_size
    grids = mx.array([[1, one.grid.rows * merge, one.grid.columns * merge] for one in placed])
    theirs, _ = model.vision_tower(pixels, grids)
    ours = mx.concatenate([images._look(one).embeddings for one in placed])
    assert relative_rms(ours.astype(mx.float32), np.array(theirs.astype(mx.float32))) <= TOLERANCE
