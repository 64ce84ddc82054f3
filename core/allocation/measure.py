"""Measures sensitivities: one pass over the model in which every variant rides along.

The exact hidden states of some calibration text, and those of each variant, in which one group of matrices is
rounded, wait on disk; each layer is read once, and all of them pass it. A stopped run resumes with what it
had saved, and gives the same file.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.packed import Geometry
from ..conversion.layer_rounding import CALIBRATION_TEXT, MAX_TEXT_NBYTES
from ..conversion.source import Source
from ..errors import UsageError
from ..machine.backend import mx
from ..machine.files import read_text
from ..text.tokenizer import Tokenizer
from .design import EMBEDDING, HEAD, Detail, Group, choose_detail, measured_groups
from .divergence import Output, divergences, head_name
from .exact_layer import ExactLayer, round_weight
from .sensitivity import Measured, Sensitivity, model_identity
from .workspace import StateLost, Workspace, open_workspace

MIN_TOKENS = 64
BATCH_TOKENS = 2048  # that pass a layer at once
REFERENCE = "reference"

# receives steps done, total steps, and what is being done
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Variant:
    """The model with the matrices of `group` rounded to `code`."""

    name: str
    group: Group
    code: Geometry

    @property
    def is_embedding(self) -> bool:
        return self.group.tensors == (EMBEDDING,)

    @property
    def is_head(self) -> bool:
        return self.group.tensors == (HEAD,)

    def exists_after(self, layer: int) -> bool:
        """Whether its hidden states differ from the exact ones after this layer; -1 is the embedding."""
        return self.is_embedding or (bool(self.group.layers) and self.group.layers[0] <= layer)


def measure_sensitivity(
    source: Source, output: Path, *, text: Path | None = None, report: Report = lambda *_: None
) -> Sensitivity:
    """Measure the model on the text file, by default the packaged calibration text, and write `output`.

    Raises ModelError for the model, UsageError for the text or the place, DoesNotFit for a full disk.
    """
    detail = choose_detail(source.config)
    data = read_text(text or CALIBRATION_TEXT, UsageError, MAX_TEXT_NBYTES)
    windows = _windows(Tokenizer.load(source.folder).encode(data), detail, text or CALIBRATION_TEXT)
    model, digest = model_identity(source), text_digest(data)
    groups = measured_groups(source.config, detail)
    with open_workspace(output, _identity(model, digest, windows, groups)) as workspace:
        run = _Run(source, workspace, windows, groups, report)
        try:
            results = run.results()
        except StateLost:
            workspace.clear()
            results = run.results()
        source.check_unchanged()
        sensitivity = Sensitivity(model, digest, windows.size, tuple(results))
        sensitivity.write(output)
        workspace.remove()
    return sensitivity


def text_digest(text: str) -> str:
    """Return the hash by which a file of sensitivities knows its text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _windows(ids: Sequence[int], detail: Detail, path: Path) -> mx.array:
    """Take windows [W, T] from all over the text. Raises UsageError for a short one."""
    length = min(detail.length, len(ids))
    if length < MIN_TOKENS:
        raise UsageError(f"{path} has {len(ids)} tokens: measuring needs at least {MIN_TOKENS}")
    count = min(detail.windows, len(ids) // length)
    last = len(ids) - length
    starts = [round(last * (2 * i + 1) / (2 * count)) for i in range(count)]
    return mx.array([list(ids[start : start + length]) for start in starts])


def _identity(model: str, text: str, windows: mx.array, groups: Sequence[Group]) -> str:
    return hashlib.sha256(repr((model, text, windows.tolist(), groups)).encode()).hexdigest()


class _Run:
    """One measurement in a workspace."""

    def __init__(
        self, source: Source, workspace: Workspace, windows: mx.array, groups: list[Group], report: Report
    ):
        self._source, self._workspace, self._windows, self._groups = source, workspace, windows, groups
        self._report = report
        self._variants = [
            _Variant(f"{index}-{code.bits}-{code.group_size}", group, code)
            for index, group in enumerate(groups)
            for code in group.codes
        ]
        self._layers = source.config.num_hidden_layers
        self._total = sum(len(self._alive(i)) + 1 for i in range(self._layers)) + len(self._variants)
        self._done = 0

    def results(self) -> Iterator[Measured]:
        """Measure what earlier runs did not, and return the divergences of each group."""
        self._done = 0
        self._workspace.check_room(2 * 4 * self._windows.size * self._hidden * (len(self._variants) + 1))
        if self._workspace.complete < 0:
            self._embed()
        for layer in range(self._layers):
            if layer >= self._workspace.complete:
                self._pass(layer)
            else:  # by an earlier run
                self._done += len(self._alive(layer)) + 1
        found = self._divergences()
        by_group = {id(group): {} for group in self._groups}
        for variant in self._variants:
            by_group[id(variant.group)][variant.code] = found[variant.name]
        return iter([Measured(group.tensors, by_group[id(group)]) for group in self._groups])

    @property
    def _hidden(self) -> int:
        return self._source.config.hidden_size

    def _alive(self, layer: int) -> list[_Variant]:
        """Return the variants that differ from the exact model after `layer`."""
        return [variant for variant in self._variants if variant.exists_after(layer)]

    def _tick(self, count: int, detail: str) -> None:
        self._done += count
        self._report(self._done, self._total, detail)

    def _embed(self) -> None:
        """Save the embedded text: exact, and with the embedding rounded."""
        self._workspace.begin(0)
        ids = self._windows.flatten().tolist()
        rows = {id: self._source.row(EMBEDDING, id) for id in dict.fromkeys(ids)}  # pyright: ignore
        embedded = mx.stack([rows[id] for id in ids])  # pyright: ignore
        shape = (*self._windows.shape, self._hidden)
        self._workspace.write(0, REFERENCE, embedded.reshape(shape))
        for variant in self._alive(-1):
            rounded = round_weight(embedded, variant.code, mx.float32)
            self._workspace.write(0, variant.name, rounded.reshape(shape))
        self._workspace.finish(0)

    def _pass(self, index: int) -> None:
        """Send the exact states and those of every variant through one layer."""
        self._workspace.begin(index + 1)
        layer, detail = ExactLayer(self._source, index), f"measuring layer {index + 1} of {self._layers}"
        self._report(self._done, self._total, detail)
        rounded = [variant for variant in self._alive(index) if index in variant.group.layers]
        riders = [variant.name for variant in self._alive(index) if index not in variant.group.layers]
        for names in self._batches([REFERENCE, *riders]):
            self._pass_exactly(layer, index, names)
            self._tick(len(names), detail)
        for variant in rounded:
            if not self._workspace.has(index + 1, variant.name):
                origin = variant.name if variant.exists_after(index - 1) else REFERENCE
                with layer.rounded(dict.fromkeys(variant.group.tensors, variant.code)):
                    state = layer(self._workspace.read(index, origin))
                self._workspace.write(index + 1, variant.name, state)
            self._tick(1, detail)
        layer.close()
        mx.clear_cache()
        self._workspace.finish(index + 1)

    def _batches(self, names: list[str]) -> Iterator[list[str]]:
        """Cut into batches that are the same in every run, because a product's rounding depends on them."""
        step = max(1, BATCH_TOKENS // self._windows.size)
        return (names[i : i + step] for i in range(0, len(names), step))

    def _pass_exactly(self, layer: ExactLayer, index: int, names: list[str]) -> None:
        if all(self._workspace.has(index + 1, name) for name in names):
            return
        states = mx.concatenate([self._workspace.read(index, name) for name in names])
        outputs = mx.split(layer(states), len(names))
        for name, output in zip(names, outputs, strict=True):
            self._workspace.write(index + 1, name, output)

    def _divergences(self) -> dict[str, float]:
        def load(name: str) -> Callable[[], mx.array]:
            return lambda: self._workspace.read(self._layers, name)

        tied = head_name(self._source) == EMBEDDING
        outputs = {
            v.name: Output(
                load(REFERENCE if v.is_head else v.name),
                v.code if v.is_head or (tied and v.is_embedding) else None,
            )
            for v in self._variants
        }
        self._report(self._done, self._total, "comparing the outputs")
        exact = self._workspace.read(self._layers, REFERENCE)
        return divergences(self._source, exact, outputs, lambda: self._tick(1, "comparing the outputs"))
