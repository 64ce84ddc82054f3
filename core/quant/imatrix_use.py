"""Says what of an imatrix a conversion uses and what not."""

from collections.abc import Iterator, Mapping, Sequence

from ..checkpoint.packed import Geometry
from .imatrix import Imatrix
from .recipe_file import RoundingMethod


def describe_gaps(imatrix: Imatrix, rounded: Sequence[str]) -> Iterator[str]:
    """Sentences about matrices, and experts, that are rounded without importances of their own."""
    if missing := [name for name in rounded if name in imatrix.missing]:
        yield (
            f"the imatrix {imatrix.path.name} has no importances for {len(missing)} of {len(rounded)} "
            f"matrices, which are rounded without: {_first_of(missing)}"
        )
    unmeasured = {name: _unmeasured(imatrix, name) for name in rounded if name in imatrix}
    if partial := [name for name, count in unmeasured.items() if count]:
        yield (
            f"the text behind the imatrix {imatrix.path.name} never reached {sum(unmeasured.values()):,} "
            f"inputs or experts, which are rounded with the mean of the others: {_first_of(partial)}"
        )


def describe_use(
    imatrix: Imatrix, rounded: Mapping[str, Geometry], method: RoundingMethod | None
) -> Iterator[str]:
    """Sentences about what of the file weighs the errors of `rounded` matrices, and what does not."""
    steered = [name for name, code in rounded.items() if _is_steered(code, method)]
    used = [name for name in steered if name in imatrix]
    yield f"{imatrix.path.name} weighs the errors of {len(used)} of {len(rounded)} matrices"
    if ignored := [name for name in rounded if name in imatrix and name not in steered]:
        why = "MLX rounds float codes" if method is None else "--rounding nearest rounds by size alone"
        yield f"not used for rounding, because {why}: {_first_of(ignored)}"
    if borrowed := [name for name in used if name in imatrix.borrowed]:
        lender = imatrix.borrowed[borrowed[0]]
        yield f"taken from another reader of the same input: {_first_of(borrowed)}, as {lender}"
    if missing := [name for name in rounded if name not in imatrix]:
        yield f"not in the file: {_first_of(missing)}"
    if "embed_tokens" in missing and "lm_head" not in rounded:
        yield (
            "embed_tokens is also the output head, whose inputs llama.cpp's files lack: "
            "`qchat calibrate` measures them"
        )
    if imatrix.unmatched:
        yield f"in the file, but in no matrix of the model: {_first_of(imatrix.unmatched)}"


def _is_steered(code: Geometry, method: RoundingMethod | None) -> bool:
    return method != "nearest" and (method is not None or code.mode == "affine")


def _unmeasured(imatrix: Imatrix, name: str) -> int:
    measured = imatrix.statistics(name)
    return 0 if measured is None else int((measured.counts == 0).sum())


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
