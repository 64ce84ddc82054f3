"""Towers, positions and logits of Hugging Face transformers, for `towers.npz`.

`PYTHONPATH=.dev:. python tests/golden/make_towers.py` writes the file: random checkpoints of four shapes,
each of which reads text and three pictures.
"""

import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.make_vision import transformers_patches
from tests.vision_checkpoints import PAD, PREPROCESSOR, VISION, noise, write_seeing

FILE = Path(__file__).with_name("towers.npz")
PICTURES = [(37, 211), (120, 81), (64, 64)]
EVERY = 4  # so many rows of logits, of which one is kept
# case -> arguments of `write_seeing`
CASES: dict[str, dict[str, Any]] = {
    "dense": {"tied": False, "hv_ratio": 3},
    "moe": {"moe": True, "tied": False},
    "wide": {"vision": {"hidden_size": 96, "num_heads": 2, "patch_size": 8, "num_position_embeddings": 36}},
    "merge of nine": {"vision": {"spatial_merge_size": 3, "depth": 3, "intermediate_size": 100}},
}


def mixed_ids(pictures: Sequence[Sequence[int]]) -> list[int]:
    """Text, and after each of its first stretches a picture's ids."""
    ids = [1, 2, 3]
    for number, picture in enumerate(pictures):
        ids += [*picture, 5 + number, 6]
    return [*ids, 7, 8, 9]


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """The pixel settings of a case."""
    vision = {**VISION, **case.get("vision", {})}
    unit = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    size: Any = PREPROCESSOR["size"]
    return {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": 2,
        "merge_size": vision["spatial_merge_size"],
        "min_pixels": max(size["shortest_edge"], 4 * unit),
        "max_pixels": max(size["longest_edge"], 4 * unit),
        "mean": PREPROCESSOR["image_mean"],
        "std": PREPROCESSOR["image_std"],
    }


def transformers_case(folder: Path, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Rows of each picture, positions, delta and logits by the whole model in `folder`."""
    torch, peer = import_module("torch"), import_module("transformers")
    peer.utils.logging.set_verbosity_error()
    peer.utils.logging.disable_progress_bar()
    model = peer.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    arrays: dict[str, np.ndarray] = {}
    values, grids = [], []
    for number, size in enumerate(PICTURES):
        patches, grid = transformers_patches(noise(*size, seed=number), settings_of(case))
        values.append(torch.tensor(patches))
        grids.append(torch.tensor(grid)[None])
        with torch.no_grad():
            arrays[f"rows {number}"] = model.model.visual(
                values[-1], grid_thw=grids[-1]
            ).pooler_output.numpy()
    ids = torch.tensor([mixed_ids([[PAD] * len(arrays[f"rows {n}"]) for n in range(len(PICTURES))])])
    kinds = (ids == PAD).int()
    positions, delta = model.model.get_rope_index(ids, kinds, image_grid_thw=torch.cat(grids))
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values=torch.cat(values),
            image_grid_thw=torch.cat(grids),
            mm_token_type_ids=kinds,
            use_cache=False,
        ).logits[0]
    arrays |= {
        "positions": positions[:, 0].numpy(),
        "delta": delta[0, 0].numpy(),
        "logits": logits[::EVERY].numpy(),
    }
    return arrays


def main() -> None:
    arrays: dict[str, Any] = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_seeing(Path(folder), **case)
            found = transformers_case(Path(folder), case)
        arrays |= {f"{name} {key}": value for key, value in found.items()}
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
