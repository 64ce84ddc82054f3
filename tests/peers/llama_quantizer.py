"""llama.cpp's own quantizer, and its files read back as checkpoints that qchat can measure.

The quantizer is called in llama.cpp's shared library; releases of llama.cpp hold it, as do packages that
bundle it. Its codes have blocks of 256 weights. Rows of other widths would fall back to wider codes; here two
or more such rows are laid end to end, so that small models are quantized as large ones are.
"""

import ctypes
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.tensor_mapping import get_tensor_name_map

from qchat.core.machine.backend import mx

BLOCK = 256
KINDS = {"Q2_K": 10, "IQ3_S": 26, "Q3_K_M": 12, "IQ4_XS": 30, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
LIBRARIES = ("libggml-base", "libggml.", "libllama.")
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


class _Importance(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


class _Parameters(ctypes.Structure):
    """`llama_model_quantize_params` of October 2026; everything else has llama.cpp's defaults."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("kind", ctypes.c_int),
        ("output_and_embedding", ctypes.c_int * 2),
        ("flags", ctypes.c_bool * 6),
        ("importance", ctypes.POINTER(_Importance)),
        ("rest", ctypes.c_void_p * 4),
    )


@dataclass(frozen=True)
class QuantizedFile:
    """One file, and the bytes of its tensors without those of the MTP head."""

    path: Path
    nbytes: int


class Quantizer:
    """The functions of the shared library in `folder`."""

    def __init__(self, folder: Path):
        for stem in LIBRARIES:
            found = sorted(path for path in folder.iterdir() if path.name.startswith(stem))
            if not found:
                raise FileNotFoundError(f"{folder} has no {stem}so, a library of llama.cpp")
            self._library = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
        self._library.llama_model_quantize_default_params.restype = _Parameters
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._library.llama_log_set(self._log, None)

    def quantize(
        self, source: Path, target: Path, kind: str, importance: Mapping[str, np.ndarray]
    ) -> QuantizedFile:
        """Quantize a file of float32 that `wrap_rows` wrote, as one of KINDS."""
        rows = [
            _Importance(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
            for name, values in importance.items()
        ]
        parameters = self._library.llama_model_quantize_default_params()
        parameters.kind, parameters.threads = KINDS[kind], 2
        parameters.importance = (_Importance * (len(rows) + 1))(*rows)
        names = ctypes.c_char_p(bytes(source)), ctypes.c_char_p(bytes(target))
        if self._library.llama_model_quantize(*names, ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp did not quantize {source} as {kind}")
        tensors = gguf.GGUFReader(target).tensors
        layers = max(_layer(tensor.name) for tensor in tensors)
        has_mtp = any(".nextn." in tensor.name for tensor in tensors)
        nbytes = sum(
            int(tensor.n_bytes) for tensor in tensors if not (has_mtp and _layer(tensor.name) == layers)
        )
        return QuantizedFile(target, nbytes)


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def wrapped_rows(shape: tuple[int, ...]) -> int:
    """Return how many rows of a matrix must be laid end to end to fill whole blocks; 1 where none can."""
    rows, width = shape
    return next((n for n in (1, 2, 4, 8) if width * n % BLOCK == 0 and rows % n == 0), 1)


def wrap_rows(source: Path, target: Path) -> Path:
    """Write a GGUF file of float32 again, with its matrices' rows laid end to end."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if data.ndim == 2 and data.dtype == np.float32 and "conv1d" not in tensor.name:
            count = wrapped_rows(data.shape)
            data = data.reshape(data.shape[0] // count, data.shape[1] * count)
        writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def read_importance(imatrix: Path, source: Path) -> dict[str, np.ndarray]:
    """Return the mean squares of an imatrix for the matrices of a file that `wrap_rows` wrote."""
    reader = gguf.GGUFReader(imatrix)
    values = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    widths = {tensor.name: int(tensor.shape[0]) for tensor in gguf.GGUFReader(source).tensors}
    found = {}
    for name in (name.removesuffix(".in_sum2") for name in values if name.endswith(".in_sum2")):
        if name in widths:
            means = (values[f"{name}.in_sum2"] / values[f"{name}.counts"].reshape(-1, 1)).reshape(-1)
            found[name] = np.ascontiguousarray(np.tile(means, widths[name] // means.size), np.float32)
    return found


def write_checkpoint_of(model: Path, source: Path, quantized: Path, folder: Path) -> Path:
    """Write the checkpoint `model` with the values that its matrices have in the file `quantized`.

    `source` is the file of float32 made from `model`; it tells where llama.cpp puts each row and column.
    """
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    codes = {tensor.name: tensor for tensor in gguf.GGUFReader(quantized).tensors}
    tensors = {}
    for name, weight in _float_tensors(model):
        place = _gguf_name(name, len(exact))
        found = codes.get(place)
        if found is not None and found.tensor_type != gguf.GGMLQuantizationType.F32:
            values = gguf.quants.dequantize(found.data, found.tensor_type)
            there = np.array(exact[place].data)
            weight = _moved_back(weight, there, values.reshape(there.shape))
        tensors[name] = weight
    folder.mkdir(parents=True)
    arrays = {name: mx.array(tensor) for name, tensor in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    for file in COPIED:
        shutil.copy(model / file, folder / file)
    return folder


def _float_tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield all tensors of a checkpoint of bfloat16, in float32."""
    for path in sorted(model.glob("*.safetensors")):
        tensors: Any = mx.load(str(path))
        for name, tensor in tensors.items():
            yield name, np.array(tensor.astype(mx.float32))


def _gguf_name(name: str, most_layers: int) -> str:
    """Return llama.cpp's name of a tensor; empty where it has none."""
    names = get_tensor_name_map(gguf.MODEL_ARCH.QWEN35, most_layers)
    return names.get_name(name.replace("language_model.", ""), try_suffixes=(".weight",)) or ""


def _moved_back(weight: np.ndarray, there: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return `values`, whose rows or columns are ordered as in `there`, in the order of `weight`."""
    if np.array_equal(weight, there):
        return values
    rows = _order(weight, there)
    if rows is not None:
        return values[rows]
    columns = _order(weight.T, there.T)
    if columns is None:
        raise ValueError("llama.cpp's file holds other values than the checkpoint")
    return values[:, columns]


def _order(wanted: np.ndarray, given: np.ndarray) -> list[int] | None:
    """Return the places of the rows of `wanted` among those of `given`; None where one is missing."""
    places: dict[bytes, list[int]] = defaultdict(list)
    for place, row in enumerate(np.ascontiguousarray(given)):
        places[row.tobytes()].append(place)
    found: list[int] = []
    for row in np.ascontiguousarray(wanted):
        here: Any = places.get(row.tobytes())
        if not here:
            return None
        found.append(here.pop())
    return found
