"""Bits for a model under a budget: sensitivities found or measured, the choice made, its bytes counted.

A budget limits the weight files' bytes, their bits per weight, or the bytes that a decoded token reads.
Refuses a budget that even the cheapest codes exceed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..checkpoint.packed import Geometry
from ..conversion.convert import weight_files_nbytes
from ..conversion.source import Source
from ..errors import QchatError, UsageError
from ..quant.allocated import Allocation, make_table
from ..quant.plan import Plan, make_plan, read_nbytes, tensor_nbytes
from ..quant.recipe_file import RecipeFile
from ..quant.recipes import KEEP_BF16_NAMES, Options, Recipe, check_options
from ..quant.results import AllocationSummary, CurvePoint
from .choice import Option, choose, curve
from .design import choose_detail, measured_groups
from .law import FALL_PER_BIT, predicted_kl
from .measure import Report
from .places import default_place, find_sensitivity, read_for
from .sensitivity import Measured, Sensitivity

GB = 10**9
CURVE_POINTS = 16
MAX_ROUNDS = 8  # of counting headers, whose offsets have more digits in larger files


@dataclass(frozen=True)
class Budget:
    """One limit: bytes of the weight files, bits per weight of all tensors, or a decoding speed.

    `tokens_per_s` is reached where memory delivers `bandwidth_gb_s` * 10^9 bytes a second.
    """

    nbytes: int | None = None
    bits_per_weight: float | None = None
    tokens_per_s: float | None = None
    bandwidth_gb_s: float = 0.0

    def check(self) -> None:
        """Raise UsageError unless there is exactly one limit, above 0 and finite."""
        limits = {
            "--target-size": self.nbytes,
            "--target-bpw": self.bits_per_weight,
            "--target-speed": self.tokens_per_s,
        }
        given = {flag: limit for flag, limit in limits.items() if limit is not None}
        if len(given) != 1:
            raise UsageError("give one of --target-size, --target-bpw and --target-speed")
        if self.tokens_per_s is not None:
            given["--bandwidth"] = self.bandwidth_gb_s
        for flag, limit in given.items():
            if not 0 < limit < math.inf:
                raise UsageError(f"{flag} is {limit:g}, wanted a finite number above 0")

    def __str__(self) -> str:
        if self.nbytes is not None:
            return f"{self.nbytes:,} bytes of weight files"
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:g} bits per weight"
        return f"{self.tokens_per_s:g} tokens/s at {self.bandwidth_gb_s:g} GB/s"


def allocate(
    folder: Path,
    options: Options,
    budget: Budget,
    *,
    sensitivity: Path | None = None,
    text: Path | None = None,
    measure: bool = True,
    report: Report = lambda *_: None,
) -> Allocation:
    """Choose the code of every matrix of the model in `folder` for the recipe best.

    Reads the file `sensitivity`, by default the one beside the model; where there is none, measures it on
    `text`, by default the packaged calibration text. Without `measure` only the size is right then.

    Raises ModelError, DoesNotFit, and UsageError for a budget that cannot be met, and for a file that is
    damaged or of another model or text.
    """
    budget.check()
    check_options(options)
    source = Source.open(folder)
    path = sensitivity or default_place(folder)
    if not measure and not path.exists():
        return Allocation(_Accounts(source, options, budget, _nominal(source)).table(), None)
    return _Accounts(source, options, budget, find_sensitivity(source, path, text, report)).allocation(path)


def _nominal(source: Source) -> Sensitivity:
    """Return sensitivities as if every weight of the model mattered as much as any other."""
    detail, groups = choose_detail(source.config), []
    for group in measured_groups(source.config, detail):
        weights = sum(math.prod(source.specs[name].shape) for name in group.tensors)
        kl = {code: weights * FALL_PER_BIT**-code.bits for code in group.codes}
        groups.append(Measured(group.tensors, kl))
    return Sensitivity("", "", 0, tuple(groups))


def predict_folder(folder: Path, options: Options) -> float | None:
    """Return the KL that converting the model in `folder` is predicted to cost.

    None where its sensitivities are not measured, and for codes that the error law does not know.
    """
    try:
        path = default_place(folder)
        if not (folder.is_dir() and path.is_file()):
            return None
        source = Source.open(folder)
        found = read_for(source, path)
    except QchatError:
        return None
    return predict(Recipe.build(options, source.config), found)


def predict(recipe: Recipe, sensitivity: Sensitivity) -> float | None:
    """Return the sum of the divergences of all groups; None where one has a code without a law."""
    total = 0.0
    for group in sensitivity.groups:
        law = predicted_kl(group.kl, recipe.shapes[group.tensors[0]][-1])
        for code in (recipe.decisions[name] for name in group.tensors):
            if code is not None and code not in law:
                return None
            total += law[code] / len(group.tensors) if code else 0.0
    return total


class _Accounts:
    """The bytes and divergences of every choice for one model under one kind of budget."""

    def __init__(self, source: Source, options: Options, budget: Budget, sensitivity: Sensitivity):
        self._source, self._options, self._budget = source, options, budget
        self._sensitivity = sensitivity
        dense = KEEP_BF16_NAMES if options.keep_bf16 else ()
        self._groups = [g for g in sensitivity.groups if not (dense and g.tensors[0].endswith(dense))]

    def allocation(self, path: Path) -> Allocation:
        """Make the choice. Raises UsageError for a budget that cannot be met."""
        chosen = self._choose()
        table = self._table(chosen)
        summary = AllocationSummary(
            budget=str(self._budget),
            nbytes=self._plan(table).total_bytes,
            predicted_kl=math.fsum(option.kl for option in chosen),
            sensitivity=path.name,
            digest=self._sensitivity.digest,
            text=self._sensitivity.text,
            tokens=self._sensitivity.tokens,
            curve=self._curve(),
        )
        return Allocation(table, summary)

    def table(self) -> RecipeFile:
        """Make the choice without its figures. Raises UsageError for a budget that cannot be met."""
        return self._table(self._choose())

    def _choose(self) -> list[Option]:
        """Return the best choice within the limit, the headers of the files included."""
        items = [self._options_of(group, self._cost) for group in self._groups]
        cheapest = [min(options, key=lambda option: option.cost) for options in items]
        least, limit = self._amount(self._table(cheapest)), self._limit()
        fixed = least - sum(option.cost for option in cheapest)
        for _ in range(MAX_ROUNDS):
            chosen = choose(items, limit - fixed)
            if chosen is None:
                break
            excess = self._amount(self._table(chosen)) - limit
            if excess <= 0:
                return chosen
            fixed += excess
        raise UsageError(f"the budget of {self._budget} cannot be met: {self._least(least)}")

    def _options_of(self, group: Measured, cost: Callable[[str, Geometry], int]) -> list[Option]:
        law = predicted_kl(group.kl, self._shape(group.tensors[0])[-1])
        return [Option(code, kl, sum(cost(name, code) for name in group.tensors)) for code, kl in law.items()]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._source.specs[name].shape

    def _nbytes(self, name: str, code: Geometry) -> int:
        return tensor_nbytes(name, self._shape(name), code)

    def _cost(self, name: str, code: Geometry) -> int:
        """Return what the budget counts of a matrix: its bytes, or those that a decoded token reads."""
        nbytes = self._nbytes(name, code)
        return nbytes if self._budget.tokens_per_s is None else read_nbytes(name, nbytes, self._source.config)

    def _amount(self, table: RecipeFile) -> int:
        """Return what the budget counts of the whole conversion."""
        if self._budget.nbytes is not None:
            recipe = Recipe.build(self._options, self._source.config, table)
            return weight_files_nbytes(self._source, recipe)
        plan = self._plan(table)
        return plan.total_bytes if self._budget.tokens_per_s is None else plan.total.read_nbytes

    def _limit(self) -> int:
        budget = self._budget
        if budget.nbytes is not None:
            return budget.nbytes
        if budget.tokens_per_s is not None:
            return int(budget.bandwidth_gb_s * GB / budget.tokens_per_s)
        return int((budget.bits_per_weight or 0.0) * self._weights / 8)

    def _least(self, amount: int) -> str:
        """Say what the cheapest choice takes."""
        if self._budget.nbytes is not None:
            return f"the least size is {amount:,} bytes"
        if self._budget.tokens_per_s is not None:
            return f"the most is {self._budget.bandwidth_gb_s * GB / amount:.4g} tokens/s"
        return f"the least is {math.ceil(8000 * amount / self._weights) / 1000:g} bits per weight"

    @cached_property
    def _weights(self) -> int:
        usual = {name: group.kl for group in self._groups for name in group.tensors}
        return self._plan(make_table({name: next(iter(kl)) for name, kl in usual.items()})).total.weights

    def _plan(self, table: RecipeFile) -> Plan:
        return make_plan(self._source.config, self._options, table)

    def _table(self, chosen: Sequence[Option]) -> RecipeFile:
        pairs = zip(self._groups, chosen, strict=True)
        return make_table({name: option.code for group, option in pairs for name in group.tensors})

    def _curve(self) -> tuple[CurvePoint, ...]:
        """Return some points of the curve of KL against the bytes of all tensors."""
        items = [self._options_of(group, self._nbytes) for group in self._groups]
        cheapest = [min(options, key=lambda option: option.cost) for options in items]
        fixed = self._plan(self._table(cheapest)).total_bytes - sum(option.cost for option in cheapest)
        points = [CurvePoint(round(fixed + cost), kl) for cost, kl in curve(items)]
        return tuple(_thin(points))


def _thin(points: Sequence[CurvePoint]) -> Iterator[CurvePoint]:
    """Keep the ends and some points at even distances of size between them."""
    first, last = points[0].nbytes, points[-1].nbytes
    wanted = [first + (last - first) * i / (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    near = {min(points, key=lambda point: abs(point.nbytes - size)) for size in wanted}
    yield from sorted(near, key=lambda point: point.nbytes)
