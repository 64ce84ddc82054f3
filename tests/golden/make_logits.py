"""Logits of Hugging Face transformers (float32, CPU), for `logits.npz` and for live comparison.

`PYTHONPATH=.dev:. python tests/golden/make_logits.py [QTINY]` writes the file: whole logits of tiny random
checkpoints, and of the trained model a random projection that every column of the vocabulary enters.
"""

import argparse
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tests.checkpoints import write_checkpoint
from tests.compare import TEXT
from tests.paths import QTINY

FILE = Path(__file__).with_name("logits.npz")
SEED = 20
RANDOM_TOKENS = 40
QTINY_TOKENS = 200
PROJECTED = 128
MOE: dict[str, Any] = {"moe": True, "tied": False, "num_experts": 8, "num_experts_per_tok": 3}
UNEVEN_LAYERS = [
    "full_attention",
    "linear_attention",
    "linear_attention",
    "full_attention",
    "linear_attention",
]
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "partial_rotary_factor": 0.5,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN_OLD: dict[str, Any] = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "attention_factor": 1.75,
    "beta_fast": 16,
    "beta_slow": 2,
}
# case -> arguments of `write_checkpoint`
CASES: dict[str, dict[str, Any]] = {
    "dense": {"tied": False, "hv_ratio": 3, "num_attention_heads": 12, "num_key_value_heads": 2},
    "moe": MOE,
    "moe_per_expert": MOE | {"experts": "each"},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 2048},
    "yarn_old": {"rope_parameters": None, "rope_scaling": YARN_OLD, "rope_theta": 5e4},
    "linear_old": {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "no_rope": {"rope_parameters": None},
    "flat": {"flat": True, "mtp": False, "num_hidden_layers": 5, "layer_types": UNEVEN_LAYERS},
}


def random_ids(case: str, seed: int) -> list[int]:
    """As many ids as a case is compared on, below the tiny vocabulary's bytes."""
    draw = np.random.default_rng([seed, *case.removesuffix("_per_expert").encode()])
    return draw.integers(0, 256, RANDOM_TOKENS).tolist()


def qtiny_ids(folder: Path) -> list[int]:
    """The first tokens of `text.txt` by the library that defined the file's format."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT.read_text()).ids[:QTINY_TOKENS]


def project(logits: np.ndarray) -> np.ndarray:
    """Logits [T, V] times random signs [V, 128] / sqrt(V): a relative RMS on these stands for that on all."""
    vocab = logits.shape[1]
    signs = np.random.default_rng(SEED).choice([-1.0, 1.0], (vocab, PROJECTED))
    return (logits.astype(np.float64) @ signs / vocab**0.5).astype(np.float32)


def transformers_logits(folder: Path, ids: Sequence[int]) -> np.ndarray:
    """Logits [T, V] float32 of the text model in `folder`; raises ValueError where a tensor has no place."""
    torch, peer = import_module("torch"), import_module("transformers")
    peer.utils.logging.set_verbosity_error()
    peer.utils.logging.disable_progress_bar()
    config = peer.AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    text.tie_word_embeddings = config.tie_word_embeddings
    model, found = peer.AutoModelForCausalLM.from_pretrained(
        folder, config=text, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if wrong := {what: names for what, names in found.items() if names}:
        raise ValueError(f"transformers did not read {folder} as it stands: {wrong}")
    with torch.no_grad():
        return model.eval()(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def make(qtiny: Path) -> dict[str, np.ndarray]:
    """Every array of the golden file."""
    ids = qtiny_ids(qtiny)
    arrays = {
        "qtiny.ids": np.array(ids, np.int32),
        "qtiny.projected": project(transformers_logits(qtiny, ids)),
    }
    for case, shape in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), seed=SEED, **shape)
            arrays[case] = transformers_logits(Path(folder), random_ids(case, SEED))
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden logits beside this script.")
    parser.add_argument("qtiny", type=Path, nargs="?", default=QTINY, help="folder of the trained model")
    arrays: dict[str, Any] = make(parser.parse_args().qtiny)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
