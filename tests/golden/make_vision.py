"""Resized pixels of Hugging Face transformers, for `vision.npz` and for live comparison.

`PYTHONPATH=.dev:. python tests/golden/make_vision.py` writes the file.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tests.vision_checkpoints import noise

FILE = Path(__file__).with_name("vision.npz")
SIZES = [(37, 211), (640, 481), (1, 3), (333, 17), (101, 99), (64, 64), (255, 1000), (1023, 767)]
SETTINGS: dict[str, Any] = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 4096,
    "max_pixels": 25_600,
}


def transformers_patches(image: Any, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Pixel values [N, C * T * P * P] and the grid [3] of the fast image processor."""
    peer = import_module("transformers.models.qwen2_vl.image_processing_qwen2_vl")
    given = {name: settings[name] for name in ("patch_size", "temporal_patch_size", "merge_size")}
    size = {"shortest_edge": settings["min_pixels"], "longest_edge": settings["max_pixels"]}
    mean, std = (settings.get(name, [0.5, 0.5, 0.5]) for name in ("mean", "std"))
    processor = peer.Qwen2VLImageProcessor(**given, size=size, image_mean=mean, image_std=std)
    found = processor(image, return_tensors="np")
    return found["pixel_values"], found["image_grid_thw"][0]


def main() -> None:
    arrays: dict[str, Any] = {}
    for size in SIZES:
        values, grid = transformers_patches(noise(*size), SETTINGS)
        arrays[f"grid {size}"] = grid
        arrays[f"levels {size}"] = np.rint(values * 127.5 + 127.5).astype(np.uint8)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
