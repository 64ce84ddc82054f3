"""Converts one model folder into another: reads slices, folds, packs and writes them, and checks the result.

Owns the order of these steps. Memory holds a few slices, or one tensor while scales are searched. Refuses
options that would change nothing, a full disk, and a destination that is taken.
"""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..checkpoint.config import load_generation_config
from ..checkpoint.layouts import MTP_PREFIX
from ..errors import UsageError
from ..events import Notice
from ..hub.names import model_name
from ..machine.backend import mx
from ..machine.eta import TimeEstimate
from ..quant.allocated import Allocation
from ..quant.folds import Folds
from ..quant.imatrix import Imatrix, read_imatrix
from ..quant.imatrix_use import describe_gaps, describe_use
from ..quant.plan import Plan, as_json, load_config, make_plan
from ..quant.recipe_file import BUILTIN_FOLDER, RecipeFile, RoundingMethod
from ..quant.recipes import Options, Recipe
from ..text.template import Template
from ..text.tokenizer import Tokenizer
from .awq import ScalingMode, search_scales
from .card import CARD_NAME, read_license, render_report_card
from .companions import write_companions
from .layer_rounding import CALIBRATION_TEXT, CalibrationText, round_layers
from .pipeline import Rounding, can_copy, convert_slices, read_unrounded
from .report import Report
from .results import Check, RoundingSummary
from .source import Source, to_dense
from .staging import REPORT_NAME, check_target, open_staging
from .verify import check_headers, compare_logits, compare_weights
from .writer import (
    INDEX_NAME,
    MTP_FILE,
    SHARD_NBYTES,
    Array,
    Shard,
    ShardWriter,
    Unit,
    make_unit,
    split_shards,
    write_file,
    write_index,
)

UNQUANTIZED = str(BUILTIN_FOLDER / "dense.toml")  # the recipe that packs nothing
Stage: TypeAlias = Literal["scaling", "rounding", "writing", "checking"]


@dataclass(frozen=True)
class Conversion:
    """What to convert, where to, and how.

    `options.recipe` UNQUANTIZED packs nothing, and needs `dequantize` if the source is quantized. `awq`
    matters only with an `imatrix`. Without a `rounding` the recipe file's counts, or else matrices are
    rounded as those of the published variants; "gptq" reads the text file `calibration`. `force` allows
    replacing an earlier conversion. `flags` are the command line's words after source and destination, for
    the card. `allocation` is needed by the recipe best.
    """

    source: Path
    target: Path
    options: Options
    imatrix: Path | None = None
    awq: ScalingMode = "search"
    rounding: RoundingMethod | None = None
    calibration: Path | None = None
    dequantize: bool = False
    force: bool = False
    flags: tuple[str, ...] = ()
    allocation: Allocation | None = None

    @property
    def table(self) -> RecipeFile | None:
        """The recipe where it was made for this model, not read from a file."""
        return self.allocation.table if self.allocation else None


@dataclass(frozen=True)
class Progress:
    """Progress of one stage: `done` of `total` bytes of weights in bfloat16, now at `module`."""

    stage: Stage
    module: str
    done: int
    total: int
    seconds_left: float | None = None


Listener = Callable[[Notice | Progress], None]


def plan_json(
    source: Path,
    options: Options,
    bandwidth_gb_s: float,
    allocation: Allocation | None = None,
    predicted_kl: float | None = None,
) -> dict[str, Any]:
    """Plan the conversion of the model folder or config file `source`, as values that `json.dumps` takes.

    Opens no weights. `allocation` is needed by the recipe best. Raises ModelError and UsageError.
    """
    plan = make_plan(load_config(source), options, allocation.table if allocation else None)
    return as_json(plan, bandwidth_gb_s, allocation.summary if allocation else None, predicted_kl)


def convert(conversion: Conversion, listener: Listener) -> Report:
    """Make `conversion.target`, whole or not at all. A run resumes an earlier one that was interrupted.

    Raises ModelError for the source, UsageError for options and destination, DoesNotFit for a full disk.
    """
    begin = time.monotonic()
    job = _Job.prepare(conversion)
    for warning in job.warnings:
        listener(Notice(warning))
    with open_staging(job.target, job.identity, job.shards) as staging:
        kept = [shard for shard in job.shards if staging.is_finished(shard)]
        staging.check_disk(job.plan.disk_nbytes + job.rounding_nbytes - sum(shard.nbytes for shard in kept))
        folds = job.search_folds(listener)
        rounding, rounded = job.round_layers(folds, staging.rounded, listener)
        writing = time.monotonic()
        weights_nbytes = _write_shards(job, folds, rounding, staging.folder, kept, listener)
        seconds = time.monotonic() - writing
        names = _write_small_files(job, staging.folder)
        check = _check_result(job, folds, staging.folder, listener)
        report = Report(
            name=job.target.name,
            source=model_name(job.source.folder),
            command=_command(conversion),
            plan=job.plan,
            vision=any(unit.name in job.source.vision for unit in job.units),
            nbytes=sum(shard.nbytes for shard in job.shards),
            weights_nbytes=weights_nbytes,
            seconds=seconds,
            total_seconds=time.monotonic() - begin,
            kept_shards=len(kept),
            warnings=job.warnings,
            importances=job.importances,
            repairs=job.source.repairs,
            folds=folds,
            check=check,
            rounding=rounded,
            license=read_license(job.source.folder),
            allocation=conversion.allocation.summary if conversion.allocation else None,
        )
        write_file(staging.folder / CARD_NAME, render_report_card(report).encode())
        staging.write_report({"identity": job.identity, "files": names, **report.as_json()})
        staging.publish(conversion.force)
    return report


@dataclass(frozen=True)
class _Job:
    """A conversion that is fully decided and has written nothing yet."""

    conversion: Conversion
    source: Source
    target: Path
    recipe: Recipe
    plan: Plan
    units: tuple[Unit, ...]
    shards: tuple[Shard, ...]
    imatrix: Imatrix | None
    method: RoundingMethod | None
    text: CalibrationText | None
    identity: str
    warnings: tuple[str, ...]
    importances: tuple[str, ...]

    @classmethod
    def prepare(cls, conversion: Conversion) -> "_Job":
        folder, target = _absolute(conversion.source), _absolute(conversion.target)
        source = Source.open(folder)
        _check_places(folder, target, conversion.force)
        _check_quantized(conversion, source)
        _check_text(source)
        options = conversion.options
        plan = make_plan(source.config, options, conversion.table)
        recipe = Recipe.build(options, source.config, conversion.table)
        units = tuple(_units(source, recipe))
        shards = tuple(_shards(units, options))
        imatrix = (
            None if conversion.imatrix is None else read_imatrix(_absolute(conversion.imatrix), source.config)
        )
        method = conversion.rounding or recipe.table.rounding
        _check_importance(conversion, method, imatrix, units)
        text = _read_text(conversion, method, source)
        return cls(
            conversion=conversion,
            source=source,
            target=target,
            recipe=recipe,
            plan=plan,
            units=units,
            shards=shards,
            imatrix=imatrix,
            method=method,
            text=text,
            identity=_identity(source, shards, imatrix, conversion.awq, method, text),
            warnings=(*_warnings(source, units), *_gaps(imatrix, units)),
            importances=_importances(imatrix, units, method),
        )

    def search_folds(self, listener: Listener) -> Folds:
        """Search the scales that the imatrix asks for, if any. Raises UsageError if none would help."""
        if self.imatrix is None:
            return Folds()
        clock = _ProgressMeter("scaling", sum(map(self.source.weights_nbytes, self.source.specs)), listener)
        seen: set[str] = set()

        def watch(name: str) -> None:
            clock.tick(name, 0 if name in seen else self.source.weights_nbytes(name))
            seen.add(name)

        watched = replace(self.source, watch=watch)
        return search_scales(
            watched, watched.config, self.recipe, self.imatrix, self.conversion.awq, method=self.method
        )

    @property
    def rounding_nbytes(self) -> int:
        """The disk that rounded layers and hidden states take until the shards are written."""
        if self.text is None:
            return 0
        packed = sum(unit.nbytes for unit in self.units if unit.geometry is not None)
        return packed + self.text.states_nbytes(self.source.config.hidden_size)

    def round_layers(
        self, folds: Folds, folder: Path, listener: Listener
    ) -> tuple[Rounding, RoundingSummary | None]:
        """Round with compensation, if that is wanted, and say how all matrices are rounded."""
        if self.text is None:
            return Rounding(self.method), RoundingSummary(self.method) if self.method else None
        done = round_layers(
            self.source,
            folds,
            self.units,
            self.text,
            folder,
            lambda total: _ProgressMeter("rounding", total, listener).tick,
        )
        text = self.text
        summary = RoundingSummary("gptq", text.name, text.digest, text.tokens, len(done), done.unreached)
        return Rounding(self.method, done), summary


def weight_files_nbytes(source: Source, recipe: Recipe) -> int:
    """Return the size of the weight files that a conversion by `recipe` writes, headers included."""
    return sum(shard.nbytes for shard in _shards(tuple(_units(source, recipe)), recipe.options))


class _ProgressMeter:
    """Reports the progress of a stage over `total` bytes of bfloat16 weights to the listener."""

    def __init__(self, stage: Stage, total: int, listener: Listener):
        self._stage: Stage = stage
        self._total, self._listener = total, listener
        self._estimate, self._done = TimeEstimate(), 0

    def tick(self, module: str, nbytes: int) -> None:
        self._done = min(self._done + nbytes, self._total)
        left = self._estimate.seconds_left(self._done, self._total - self._done)
        self._listener(Progress(self._stage, module, self._done, self._total, left))


def _absolute(path: Path) -> Path:
    """The absolute path without `..`; does not follow links. Raises UsageError."""
    try:
        return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100  `resolve` follows links
    except RuntimeError as error:
        raise UsageError(f"{path} is not a path: {error}") from error


def _check_places(source: Path, target: Path, force: bool) -> None:
    """Raise UsageError if the destination cannot be a new folder, or is inside the source."""
    if not target.name:
        raise UsageError(f"{target} cannot be a destination: name a new folder")
    if not target.parent.is_dir():
        raise UsageError(f"the destination {target} needs the folder {target.parent}, which does not exist")
    if target.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"the destination {target} is in the source folder, which is never written to")
    check_target(target, force)


def _check_quantized(conversion: Conversion, source: Source) -> None:
    """Raise UsageError if a quantized source needs a flag, or an unquantized one has a flag that needs it."""
    if conversion.dequantize and not source.is_quantized:
        raise UsageError(f"--dequantize would change nothing: {source.folder} is not quantized")
    packs = conversion.options.recipe != UNQUANTIZED
    if source.is_quantized and not packs and not conversion.dequantize:
        raise UsageError(f"{source.folder} is quantized: give -q to quantize it again, or --dequantize")
    if conversion.imatrix is not None and not packs:
        raise UsageError("--imatrix-path would change nothing without -q")


def _check_importance(
    conversion: Conversion, method: RoundingMethod | None, imatrix: Imatrix | None, units: Sequence[Unit]
) -> None:
    """Raise UsageError for an imatrix without effect. Without scaling it steers only rounding."""
    if imatrix is None or conversion.awq != "off":
        return
    if method == "nearest":
        raise UsageError("--imatrix-path with --awq off and --rounding nearest would change nothing")
    steered = [unit for unit in units if unit.geometry and (method or unit.geometry.mode == "affine")]
    if not any(unit.name in imatrix for unit in steered):
        what = "module" if method else "affine module"
        raise UsageError(f"--imatrix-path with --awq off would change nothing: no {what} is in the file")


def _read_text(
    conversion: Conversion, method: RoundingMethod | None, source: Source
) -> CalibrationText | None:
    """Read the text that compensated rounding needs. Raises UsageError if nothing needs one."""
    if method == "gptq":
        return CalibrationText.read(conversion.calibration or CALIBRATION_TEXT, source)
    if conversion.calibration is not None and conversion.allocation is None:
        raise UsageError("--calibration would change nothing without --rounding gptq")
    return None


def _check_text(source: Source) -> None:
    """Load tokenizer, template and generation config, which chatting will need. Raises ModelError."""
    Tokenizer.load(source.folder).check_vocabulary(source.config.vocab_size)
    Template.load(source.folder)
    load_generation_config(source.folder)


def _units(source: Source, recipe: Recipe) -> Iterator[Unit]:
    options = recipe.options
    for name, spec in source.specs.items():
        if options.mtp != "drop" or not name.startswith(MTP_PREFIX):
            yield make_unit(name, spec, recipe.decide(name, spec.shape), bare_mtp=options.mtp == "split")
    if options.vision == "keep":
        for name, shape in source.vision.items():
            yield Unit(name, name, None, {"weight": Array(name, "BF16", shape)})


def _shards(units: Sequence[Unit], options: Options) -> list[Shard]:
    if options.mtp != "split":
        return split_shards(units, SHARD_NBYTES)
    head = tuple(unit for unit in units if unit.name.startswith(MTP_PREFIX))
    body = [unit for unit in units if not unit.name.startswith(MTP_PREFIX)]
    return [*split_shards(body, SHARD_NBYTES), Shard(MTP_FILE, head)]


def _identity(
    source: Source,
    shards: Sequence[Shard],
    imatrix: Imatrix | None,
    mode: ScalingMode,
    method: RoundingMethod | None,
    text: CalibrationText | None,
) -> str:
    """A hash of everything that the bytes of the shards depend on."""
    units = [(shard.file, unit) for shard in shards for unit in shard.units]
    layout = [
        (file, unit.name, str(unit.geometry), *map(astuple, unit.arrays.values())) for file, unit in units
    ]
    importance = None
    if imatrix is not None:
        with imatrix.path.open("rb") as file:
            importance = [hashlib.file_digest(file, "sha256").hexdigest(), mode]
    rounding = [method, text.windows if text else None]
    what = json.dumps([str(source.folder.resolve()), source.stamps, layout, importance, rounding])
    return hashlib.sha256(what.encode()).hexdigest()


def _warnings(source: Source, units: Sequence[Unit]) -> Iterator[str]:
    again = [unit for unit in units if unit.geometry and unit.name in source.packed]
    changed = [unit for unit in again if not can_copy(source, Folds(), unit)]
    if changed:
        yield (
            f"{source.folder} is quantized already: {len(changed)} of its matrices are quantized a second "
            "time, which costs more quality than converting the original"
        )


def _gaps(imatrix: Imatrix | None, units: Sequence[Unit]) -> Iterator[str]:
    if imatrix is not None:
        yield from describe_gaps(imatrix, [unit.name for unit in units if unit.geometry is not None])


def _importances(
    imatrix: Imatrix | None, units: Sequence[Unit], method: RoundingMethod | None
) -> tuple[str, ...]:
    if imatrix is None:
        return ()
    return tuple(describe_use(imatrix, {u.name: u.geometry for u in units if u.geometry}, method))


def _write_shards(
    job: _Job, folds: Folds, rounding: Rounding, folder: Path, kept: Sequence[Shard], listener: Listener
) -> int:
    """Write the shards that are not `kept`, and return their bfloat16 size. Raises OSError, ModelError."""
    shards = [shard for shard in job.shards if shard not in kept]
    total = sum(job.source.weights_nbytes(unit.name) for shard in shards for unit in shard.units)
    clock = _ProgressMeter("writing", total, listener)
    for shard in shards:
        with ShardWriter(folder, shard) as file:
            for piece in convert_slices(job.source, folds, shard.units, rounding):
                for part, array in piece.arrays.items():
                    file.write(piece.unit.arrays[part], array, piece.begin)
                share = (piece.end - piece.begin) / piece.unit.arrays["weight"].shape[0]
                clock.tick(piece.unit.path, round(share * job.source.weights_nbytes(piece.unit.name)))
    return total


def _write_small_files(job: _Job, folder: Path) -> list[str]:
    """Write all but weights, card and report, and return the names of all files of the finished folder."""
    write_index(folder, job.shards)
    names = write_companions(folder, job.source, job.units, job.recipe.default)
    return sorted([*names, INDEX_NAME, CARD_NAME, REPORT_NAME, *(shard.file for shard in job.shards)])


def _check_result(job: _Job, folds: Folds, folder: Path, listener: Listener) -> Check:
    """Read the new folder as any runtime would and compare it with its source. Raises ModelError."""
    result = Source.open(folder)
    check_headers(result.checkpoint, job.shards)
    _check_text(result)
    job.source.check_unchanged()
    units = [unit for unit in job.units if unit.name in result.specs]

    def wanted(unit: Unit, begin: int, end: int) -> mx.array:
        return to_dense(read_unrounded(job.source, folds, unit, begin, end), mx.float32)

    weights = compare_weights(result, units, wanted)
    total = sum(map(job.source.weights_nbytes, result.specs))
    clock = _ProgressMeter("checking", 2 * total, listener)
    return compare_logits(job.source, result, weights, clock.tick)


def _command(conversion: Conversion) -> str:
    """The command line to repeat the conversion, without the folders of this machine."""
    names = (model_name(_absolute(conversion.source)), conversion.target.name)
    return shlex.join(["qchat", "convert", "-i", names[0], "-o", names[1], *conversion.flags])
