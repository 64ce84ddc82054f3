"""An importance matrix measured with our own runtime: E[x^2] at the input of every projection of a model.

Owns the recorders around a model's products, and the state that lets a stopped run go on. The text is cut in
chunks, each read from an empty cache, as llama.cpp's `llama-imatrix` does; the output head's and the MTP
head's inputs, which that leaves out, are measured as well. Refuses a text shorter than one chunk.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..engine.engine import Engine
from ..errors import UsageError
from ..machine.backend import mx
from ..machine.files import read_text
from ..model.cache import KVCache
from ..model.layers import AttentionLayer, DeltaLayer, DenseMLP, FeedForward
from ..model.moe import MixtureOfExperts
from ..model.network import Model
from ..quant.imatrix import Statistics, write_imatrix

BUILTIN_TEXT = Path(__file__).parent / "calibration.txt"
CHUNK_SIZE = 512
MAX_CHUNK_SIZE = 1 << 15
MAX_TEXT_NBYTES = 256 << 20
SAVE_EVERY = 16  # chunks
PARTIAL_SUFFIX = ".partial"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What one run did: `chunks` of `chunk_size` tokens, of which `resumed` had been read by an earlier one.

    `unreached` counts the experts, over all layers, that no token was sent to.
    """

    path: Path
    chunks: int
    chunk_size: int
    resumed: int
    modules: int
    experts: int
    unreached: int


class Recorder:
    """Stands before a product and sums the squares of what goes in; `names` are the modules it computes.

    `sums` is [K], or [E, K] for a product with one weight per expert; `counts` [1] or [E]; float32.
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
    progress: Progress = lambda _done, _total: None,
) -> Calibration:
    """Measure the model at `folder` on the text file `data`, or on the packaged text, and write `output`.

    At most `chunks` of `chunk_size` tokens are read, a rest that fills none is not; text that is written like
    a special token is one. A run that was stopped goes on where it last saved its state, beside `output`.
    Raises ModelError, and UsageError for a text or a file that cannot be used.
    """
    _check_sizes(chunk_size, chunks)
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"the imatrix cannot be written to {output}: wanted a file in an existing folder")
    text = read_text(data or BUILTIN_TEXT, UsageError, MAX_TEXT_NBYTES)
    engine = Engine.load(folder)
    pieces = _pieces(engine.tokenizer.encode(text), chunk_size, chunks, data or BUILTIN_TEXT)
    recorders = watch(engine.model)
    state = _State(output, _identity(engine, pieces), recorders)
    resumed = state.resume()
    progress(resumed, len(pieces))
    for done, piece in enumerate(pieces[resumed:], start=resumed + 1):
        _read(engine.model, piece)
        mx.eval([array for recorder in recorders for array in (recorder.sums, recorder.counts)])
        if done % SAVE_EVERY == 0 and done < len(pieces):
            state.save(done)
        progress(done, len(pieces))
    statistics = {module: Statistics(r.sums, r.counts) for r in recorders for module in r.names}
    datasets, count = [(data or BUILTIN_TEXT).name], len(pieces)
    write_imatrix(
        output, statistics, engine.config, datasets=datasets, chunk_count=count, chunk_size=chunk_size
    )
    state.path.unlink(missing_ok=True)
    routed = [recorder.counts for recorder in recorders if recorder.experts]
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


def _pieces(ids: Sequence[int], size: int, limit: int | None, source: Path) -> list[list[int]]:
    if len(ids) < size:
        raise UsageError(f"{source} has {len(ids):,} tokens, and one chunk alone takes {size:,}")
    return [list(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)][:limit]


def _read(model: Model, ids: list[int]) -> None:
    """Send one chunk past every recorder; nothing is computed until the sums are."""
    hidden = model.hidden(ids, model.new_cache())
    model.logits(hidden)
    if model.mtp is not None:
        model.mtp(model.embed(mx.array(ids[1:])[None]), hidden[:, :-1], KVCache())


def _identity(engine: Engine, pieces: list[list[int]]) -> str:
    """Of the model and the text: sums of one run go on in another only where these are the same."""
    model = engine.model
    what = [str(engine.folder.resolve()), str(engine.config), model.nbytes, pieces]
    return hashlib.sha256(repr(what).encode()).hexdigest()


class _State:
    """The sums so far, in a file beside the output."""

    def __init__(self, output: Path, identity: str, recorders: list[Recorder]):
        self.path = output.with_name(output.name + PARTIAL_SUFFIX)
        self.identity, self.recorders = identity, recorders

    def save(self, done: int) -> None:
        """The sums after `done` chunks, whole or not at all. Raises UsageError."""
        arrays = {}
        for recorder in self.recorders:
            arrays[f"{recorder.names[0]}.sums"] = recorder.sums
            arrays[f"{recorder.names[0]}.counts"] = recorder.counts
        try:
            with tempfile.TemporaryDirectory(prefix=f".{self.path.name}.", dir=self.path.parent) as folder:
                file = Path(folder) / "state.safetensors"
                mx.save_safetensors(str(file), arrays, {"identity": self.identity, "done": str(done)})
                file.replace(self.path)
        except (OSError, RuntimeError) as problem:
            raise UsageError(
                f"cannot save the state of the calibration to {self.path}: {problem}"
            ) from problem

    def resume(self) -> int:
        """Take up the sums of an earlier run; returns after how many chunks, 0 if they are not of use."""
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
        for recorder in self.recorders:
            recorder.sums = arrays[f"{recorder.names[0]}.sums"]
            recorder.counts = arrays[f"{recorder.names[0]}.counts"]
        return int(metadata["done"])


def watch(model: Model) -> list[Recorder]:
    """Put a recorder before every product of `model`, which is changed and serves for nothing else then.

    Reading one token at a time would bypass them on a CPU: those steps were fused when the model was made.
    """
    model.steps = model.native = None
    recorders: list[Recorder] = []
    experts = model.config.num_experts
    for index, layer in enumerate(model.layers):
        recorders += _watch_layer(layer, f"layers.{index}", experts)
    table = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    recorders.append(_record(model, "head", table))
    if model.mtp is not None:
        recorders.append(_record(model.mtp, "fc", "mtp.fc"))
        recorders += _watch_layer(model.mtp.layer, "mtp.layers.0", experts)
    return recorders


def _watch_layer(layer: AttentionLayer | DeltaLayer, name: str, experts: int) -> Iterator[Recorder]:
    mixer = layer.mixer
    if isinstance(layer, AttentionLayer):
        yield _record(mixer, "qkv", *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
        yield _record(mixer, "out", f"{name}.self_attn.o_proj")
    else:
        yield _record(
            mixer, "inputs", *(f"{name}.linear_attn.in_proj_{part}" for part in ("qkv", "z", "a", "b"))
        )
        yield _record(mixer, "out", f"{name}.linear_attn.out_proj")
    yield from _watch_feed_forward(layer.feed_forward, f"{name}.mlp", experts)


def _watch_feed_forward(block: FeedForward, name: str, experts: int) -> Iterator[Recorder]:
    if isinstance(block, DenseMLP):
        yield _record(block, "gate_up", f"{name}.gate_proj", f"{name}.up_proj")
        yield _record(block, "down", f"{name}.down_proj")
    elif isinstance(block, MixtureOfExperts):
        yield _record(block, "router", f"{name}.gate")
        yield _record(block, "shared_gate", f"{name}.shared_expert_gate")
        yield from _watch_feed_forward(block.shared, f"{name}.shared_expert", 0)
        for part in ("gate", "up", "down"):
            yield _record(block, part, f"{name}.switch_mlp.{part}_proj", experts=experts)


def _record(owner: object, attribute: str, *names: str, experts: int = 0) -> Recorder:
    recorder = Recorder(getattr(owner, attribute), names, experts)
    setattr(owner, attribute, recorder)
    return recorder
