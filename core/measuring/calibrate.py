"""Calibration: an importance matrix, E[x^2] at the input of every projection of a model.

Owns the statistics attached to a model's products, and the file from which a stopped run resumes. Reads the
text in chunks, each with an empty cache, like llama.cpp's `llama-imatrix`; unlike that, also measures the
inputs of the output head and of the MTP head. Refuses a text shorter than one chunk.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from ..conversion.layer_rounding import CALIBRATION_TEXT, MAX_TEXT_NBYTES
from ..engine.engine import Engine
from ..errors import UsageError
from ..machine.backend import mx
from ..machine.files import read_text, whole_file
from ..model.cache import KVCache
from ..model.fused_layers import plain_form
from ..model.network import Model
from ..model.observers import observe, observe_layer
from ..quant.imatrix import Statistics, write_imatrix
from .results import Calibration

CHUNK_SIZE = 512
MAX_CHUNK_SIZE = 1 << 15
SAVE_EVERY = 16  # chunks
PARTIAL_SUFFIX = ".partial"

# receives chunks done and total chunks
Report = Callable[[int, int], None]


class InputStatistics:
    """Wraps a product and sums the squares of its inputs; `names` are the modules that it computes.

    In float32, `sums` are [K] and `counts` [1], or [E, K] and [E] for a product with one weight per expert.
    """

    def __init__(self, product: Callable[..., Any], names: tuple[str, ...], experts: int = 0):
        self.product, self.names, self.experts = product, names, experts
        self.sums = self.counts = mx.array(0.0)

    def __call__(self, x: mx.array, *rest: Any) -> Any:
        rows = mx.square(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        if self.experts:
            chosen = rest[0].flatten()
            self.sums = self.sums + mx.zeros((self.experts, rows.shape[-1])).at[chosen].add(rows)
            self.counts = self.counts + mx.zeros(self.experts).at[chosen].add(1.0)
        else:
            self.sums = self.sums + rows.sum(axis=0)
            self.counts = self.counts + mx.array([float(len(rows))])
        return self.product(x, *rest)


def calibrate_model(
    folder: Path,
    output: Path,
    *,
    data: Path | None = None,
    chunk_size: int = CHUNK_SIZE,
    chunks: int | None = None,
    progress: Report = lambda _done, _total: None,
) -> Calibration:
    """Measure the model in `folder` on the text file `data`, by default the packaged text; write `output`.

    Reads at most `chunks` full chunks of `chunk_size` tokens; special tokens in the text count as such. A
    stopped run resumes from the sums that it last saved beside `output`. Raises ModelError, and UsageError
    for an unusable text or output file.
    """
    _check_sizes(chunk_size, chunks)
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"the imatrix cannot be written to {output}: wanted a file in an existing folder")
    text = read_text(data or CALIBRATION_TEXT, UsageError, MAX_TEXT_NBYTES)
    engine = Engine.load(folder)
    pieces = _split_chunks(engine.tokenizer.encode(text), chunk_size, chunks, data or CALIBRATION_TEXT)
    all_inputs = attach_statistics(engine.model)
    saved = _SavedSums(output, _identity(engine, pieces), all_inputs)
    resumed = saved.resume()
    progress(resumed, len(pieces))
    for done, piece in enumerate(pieces[resumed:], start=resumed + 1):
        _read(engine.model, piece)
        mx.eval([array for inputs in all_inputs for array in (inputs.sums, inputs.counts)])
        if done % SAVE_EVERY == 0 and done < len(pieces):
            saved.save(done)
        progress(done, len(pieces))
    statistics = {module: Statistics(r.sums, r.counts) for r in all_inputs for module in r.names}
    datasets, count = [(data or CALIBRATION_TEXT).name], len(pieces)
    write_imatrix(
        output, statistics, engine.config, datasets=datasets, chunk_count=count, chunk_size=chunk_size
    )
    saved.path.unlink(missing_ok=True)
    routed = [inputs.counts for inputs in all_inputs if inputs.experts]
    return Calibration(
        path=output,
        chunks=count,
        chunk_size=chunk_size,
        resumed=resumed,
        modules=len(statistics),
        experts=sum(counts.size for counts in routed),
        unreached=sum(int((counts == 0).sum()) for counts in routed),
    )


def _check_sizes(chunk_size: int, chunks: int | None) -> None:
    if not 2 <= chunk_size <= MAX_CHUNK_SIZE:
        raise UsageError(f"--chunk-size is {chunk_size}, wanted 2 to {MAX_CHUNK_SIZE:,} tokens")
    if chunks is not None and chunks < 1:
        raise UsageError(f"--chunks is {chunks}, wanted at least 1")


def _split_chunks(ids: Sequence[int], size: int, limit: int | None, source: Path) -> list[list[int]]:
    if len(ids) < size:
        raise UsageError(f"{source} has {len(ids):,} tokens, and one chunk alone takes {size:,}")
    return [list(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)][:limit]


def _read(model: Model, ids: list[int]) -> None:
    """Read one chunk with every product of the model; lazy until the sums are evaluated."""
    hidden = model.hidden(ids, model.new_cache())
    model.logits(hidden)
    if model.mtp is not None:
        model.mtp(model.embed(mx.array(ids[1:])[None]), hidden[:, :-1], KVCache())


def _identity(engine: Engine, pieces: list[list[int]]) -> str:
    """Hash the model and the text: a run resumes only from sums of the same two."""
    model = engine.model
    what = [str(engine.folder.resolve()), str(engine.config), model.nbytes, pieces]
    return hashlib.sha256(repr(what).encode()).hexdigest()


class _SavedSums:
    """The sums of an unfinished run, in a file beside the output."""

    def __init__(self, output: Path, identity: str, all_inputs: list[InputStatistics]):
        self.path = output.with_name(output.name + PARTIAL_SUFFIX)
        self.identity, self.all_inputs = identity, all_inputs

    def save(self, done: int) -> None:
        """Write the sums after `done` chunks atomically. Raises UsageError where that fails."""
        arrays = {}
        for inputs in self.all_inputs:
            arrays[f"{inputs.names[0]}.sums"] = inputs.sums
            arrays[f"{inputs.names[0]}.counts"] = inputs.counts
        try:
            with whole_file(self.path, suffix=".safetensors") as file:  # MLX appends it to any other name
                mx.save_safetensors(str(file), arrays, {"identity": self.identity, "done": str(done)})
        except (OSError, RuntimeError) as problem:
            raise UsageError(
                f"cannot save the sums of the calibration to {self.path}: {problem}"
            ) from problem

    def resume(self) -> int:
        """Load the sums of an earlier run; returns the number of its chunks, 0 without usable sums."""
        if not self.path.is_file():
            return 0
        try:
            loaded = mx.load(str(self.path), format="safetensors", return_metadata=True)
            arrays, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], loaded)
            mx.eval(list(arrays.values()))
        except (RuntimeError, ValueError):
            return 0
        if metadata.get("identity") != self.identity:
            return 0
        for inputs in self.all_inputs:
            inputs.sums = arrays[f"{inputs.names[0]}.sums"]
            inputs.counts = arrays[f"{inputs.names[0]}.counts"]
        return int(metadata["done"])


def attach_statistics(model: Model) -> list[InputStatistics]:
    """Attach statistics to every product of `model`, which is of no other use afterwards.

    Turns off fused decoding, which bypasses the products.
    """
    all_inputs: list[InputStatistics] = []
    experts = model.config.num_experts
    for index, layer in enumerate(model.use_plain_layers()):
        all_inputs += observe_layer(layer, f"layers.{index}", experts, InputStatistics)
    table = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    all_inputs.append(observe(model, "head", InputStatistics, table))
    if model.mtp is not None:
        all_inputs.append(observe(model.mtp, "fc", InputStatistics, "mtp.fc"))
        all_inputs += observe_layer(plain_form(model.mtp.layer), "mtp.layers.0", experts, InputStatistics)
    return all_inputs
