"""The nine published variants, byte for byte what MLX's own rounding makes of tables written down here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.packed import Packed
from qchat.core.checkpoint.weights import load_weights
from qchat.core.conversion.convert import Conversion, convert
from qchat.core.machine.backend import mx
from qchat.core.quant.recipes import VARIANTS
from tests.checkpoints import write_checkpoint

Code = tuple[int, int, str]  # group, bits, mode
KINDS = {
    ("gate_proj", "up_proj"): 0,
    ("down_proj",): 1,
    ("q_proj", "k_proj", "v_proj", "in_proj_qkv", "in_proj_z", "embed_tokens"): 2,
    ("lm_head",): 3,
    ("o_proj", "out_proj", "in_proj_a", "in_proj_b"): 4,
}
# affine bits of each kind
BITS = {
    "UD-Q2_K_XL": (2, 3, 4, 5, 8),
    "UD-Q3_K_XL": (3, 4, 5, 6, 8),
    "UD-Q4_K_XL": (4, 5, 6, 8, 8),
    "UD-Q5_K_XL": (5, 6, 8, 8, 8),
    "UD-Q6_K_XL": (6, 8, 8, 8, 8),
    "UD-Q8_K_XL": (8, 8, 8, 8, 8),
    "NVFP4_K_XL": (4, 5, 6, 8, 8),
    "MXFP4_K_XL": (4, 5, 6, 8, 8),
    "MXFP8_K_XL": (8, 8, 8, 8, 8),
}
FLOATS: dict[str, dict[int, Code]] = {
    "NVFP4_K_XL": {4: (16, 4, "nvfp4")},
    "MXFP4_K_XL": {4: (32, 4, "mxfp4"), 8: (32, 8, "mxfp8")},
    "MXFP8_K_XL": {8: (32, 8, "mxfp8")},
}
ALWAYS_AFFINE = ("embed_tokens", "lm_head")
STAYS_FLOAT32 = ("A_log", "dt_bias")


def code_of(variant: str, name: str) -> Code:
    """The code of the matrix `name`, read off the tables."""
    last = name.rsplit(".", 1)[-1]
    if name.startswith("mtp.") or last in ("gate", "shared_expert_gate"):
        return (64, 8, "affine")
    bits = next(BITS[variant][kind] for names, kind in KINDS.items() if last in names)
    code = (64, bits, "affine")
    return code if last in ALWAYS_AFFINE else FLOATS.get(variant, {}).get(bits, code)


def as_bytes(array: mx.array) -> tuple[mx.Dtype, tuple[int, ...], bytes]:
    return array.dtype, array.shape, np.array(array.view(mx.uint8)).tobytes()


def expected(variant: str, name: str, tensor: mx.array, is_matrix: bool) -> list[mx.array]:
    if is_matrix:
        group, bits, mode = code_of(variant, name)
        return list(mx.quantize(tensor.astype(mx.bfloat16), group, bits, mode=mode))
    dtype = mx.float32 if name.endswith(STAYS_FLOAT32) else mx.bfloat16
    return [tensor.astype(dtype).astype(tensor.dtype)]


def test_the_tables_name_every_published_variant():
    assert BITS.keys() == VARIANTS.keys()


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("variant", BITS)
def test_a_published_variant_is_byte_for_byte_what_it_was(variant: str, moe: bool, tmp_path: Path):
    wide: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "linear_value_head_dim": 64}
    inner: dict[str, Any] = (
        {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64} if moe else {}
    )
    write_checkpoint(tmp_path / "raw", moe=moe, tied=False, **wide, **inner)
    convert(Conversion(tmp_path / "raw", tmp_path / "new", VARIANTS[variant]), lambda _: None)
    before, after = (
        load_weights(tmp_path / name, ModelConfig.load(tmp_path / name)).tensors for name in ("raw", "new")
    )
    assert before.keys() == after.keys()
    packed = {name for name, tensor in after.items() if isinstance(tensor, Packed)}
    unpacked: set[str] = set()
    for name, tensor in before.items():
        assert isinstance(tensor, mx.array)
        if tensor.ndim > 1 and name not in packed:
            unpacked.add(name)
        found = after[name]
        arrays = list(found.arrays) if isinstance(found, Packed) else [found]
        wanted = expected(variant, name, tensor, name in packed)
        assert [as_bytes(array) for array in arrays] == [as_bytes(array) for array in wanted], name
    assert all(name.endswith("conv1d") for name in unpacked), unpacked
