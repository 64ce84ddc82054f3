"""Bits that were chosen matrix by matrix, as a recipe that conversions and plans take.

`allocation` makes the choice. Owns the recipe's form: a rule for each code, and 8 bits for all else.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.packed import Geometry
from .recipe_file import BEST, Bits, RecipeFile, Rule
from .results import AllocationSummary

REST = Rule(("*",), (), Bits(8, relative=False), 64, "affine")


@dataclass(frozen=True)
class Allocation:
    """The recipe that was made for one model under one budget, and how it came about.

    Without a `summary` nothing was measured: the size is that of the budget, the bits are not the best ones.
    """

    table: RecipeFile
    summary: AllocationSummary | None


def make_table(codes: Mapping[str, Geometry]) -> RecipeFile:
    """Return the recipe that gives these affine codes to the matrices of these canonical names.

    The most frequent code is the default at the top of `config.json`.
    """
    names: dict[Geometry, list[str]] = {}
    for name, code in codes.items():
        names.setdefault(code, []).append(name)
    (usual, _), *_ = Counter(codes.values()).most_common(1)
    rules = [
        Rule(tuple(members), (), Bits(code.bits, relative=False), code.group_size, "affine")
        for code, members in names.items()
    ]
    return RecipeFile(BEST, usual.bits, usual.group_size, routers_dense=False, rules=(*rules, REST))
