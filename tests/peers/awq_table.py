"""What scaling and weighted rounding do to a model at equal bits: KL divergence on text calibration missed.

    PYTHONPATH=.dev python tests/peers/awq_table.py MODEL IMATRIX TEXT [--skip TOKENS] [--chunks N]

TEXT after the first TOKENS (those that IMATRIX was made from) is one measure, the packaged evaluation texts
are the other. Rounded weights are held in memory; nothing is written. Prints a Markdown table.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from qchat.core.checkpoint.weights import Weights
from qchat.core.conversion.awq import DEFAULT_GROUPS, GROUPS, ScalingMode, groups, search_scales
from qchat.core.conversion.source import Source, to_dense
from qchat.core.machine.backend import Policy, mx
from qchat.core.measuring.evaluate import KINDS, TEXTS_FOLDER
from qchat.core.model.network import Model
from qchat.core.quant.folds import Folds
from qchat.core.quant.imatrix import Imatrix, read_imatrix
from qchat.core.quant.recipes import Options, Recipe
from qchat.core.quant.results import GroupReport
from qchat.core.quant.rounding import quantize
from qchat.core.text.tokenizer import Tokenizer

BITS = (2, 3, 4)
CHUNK = 512
Chunks = list[list[int]]
Measure = Callable[[Model], list[float]]


def read_texts(arguments: argparse.Namespace) -> list[Chunks]:
    """The two measures' ids, evenly spread chunks of each."""
    tokenizer = Tokenizer.load(arguments.model)
    unseen = tokenizer.encode(arguments.text.read_text())[arguments.skip :]
    packaged = [i for kind in KINDS for i in tokenizer.encode((TEXTS_FOLDER / f"{kind}.txt").read_text())]
    return [spread(cut(ids), arguments.chunks) for ids in (unseen, packaged)]


def cut(ids: Sequence[int]) -> Chunks:
    return [list(ids[i : i + CHUNK]) for i in range(0, len(ids) - CHUNK + 1, CHUNK)]


def spread(chunks: Chunks, count: int) -> Chunks:
    return chunks[:: max(1, len(chunks) // count)][:count]


def log_probabilities(model: Model, ids: Sequence[int]) -> mx.array:
    logits = model.logits(model.hidden(ids, model.new_cache()))
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logs)
    return logs


def make_measure(reference: Model, texts: list[Chunks]) -> Measure:
    """A function of a model: its mean KL divergence from `reference`, in nats per token, on each text."""
    known = [[log_probabilities(reference, chunk) for chunk in chunks] for chunks in texts]

    def measure(model: Model) -> list[float]:
        means = []
        for chunks, expected in zip(texts, known, strict=True):
            total = 0.0
            for chunk, p in zip(chunks, expected, strict=True):
                total += float((mx.exp(p) * (p - log_probabilities(model, chunk))).sum())
            means.append(total / (CHUNK * len(chunks)))
        return means

    return measure


def build(source: Source, folds: Folds, recipe: Recipe | None, *, weighted: bool = True) -> Model:
    """The model in memory as a conversion would have left it; without a recipe nothing is rounded."""
    tensors = {}
    for name, spec in source.specs.items():
        tensor = folds.apply(name, to_dense(source.read(name), mx.float32))
        geometry = recipe and recipe.decide(name, spec.shape)
        if geometry:
            importance = folds.importance(name) if weighted else None
            tensors[name] = quantize(tensor, geometry, importance)
        else:
            stored = tensor.astype(mx.bfloat16) if recipe and spec.kind != "vector" else tensor
            tensors[name] = stored if spec.kind == "matrix" else stored.astype(mx.float32)
    has_mtp = bool(source.config.mtp_num_hidden_layers)
    return Model(source.config, Weights(tensors, (), has_mtp), Policy(mx.float32, dense=True))


def only(folds: Folds, source: Source, letters: str) -> Folds:
    """A search's result with the groups of `letters` alone: groups are searched independently."""

    def kept(group: GroupReport) -> bool:
        return group.changed and group.letter in letters

    feeders = {group.feeder for group in folds.report if kept(group)}
    # a tensor feeds one group at most
    chosen = [group for group in groups(source.config, mtp=True) if group.feeder in feeders]
    readers = {name for group in chosen for name in group.readers}
    return replace(
        folds,
        columns={name: scale for name, scale in folds.columns.items() if name in readers},
        rows={name: scale for name, scale in folds.rows.items() if name in feeders},
    )


def variants(source: Source, recipe: Recipe, imatrix: Imatrix) -> Iterator[tuple[str, Model]]:
    """Names and models, each made when its turn comes."""

    def found(mode: ScalingMode) -> Folds:
        return search_scales(source, source.config, recipe, imatrix, mode, GROUPS)

    yield "MLX's rounding", build(source, Folds(), recipe)
    yield "weighted rounding", build(source, Folds(imatrix), recipe)
    fixed, best = found("fixed"), found("search")
    yield "fixed scales, MLX's rounding", build(source, fixed, recipe, weighted=False)
    yield "fixed scales", build(source, fixed, recipe)
    yield "searched scales, all groups", build(source, best, recipe)
    for letters in (DEFAULT_GROUPS, *GROUPS):
        yield f"searched scales, {letters} alone", build(source, only(best, source, letters), recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("imatrix", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--skip", type=int, default=120 * CHUNK)
    parser.add_argument("--chunks", type=int, default=24, help=f"of {CHUNK} tokens, of each text")
    arguments = parser.parse_args()
    source = Source.open(arguments.model)
    imatrix = read_imatrix(arguments.imatrix, source.config)
    measure = make_measure(build(source, Folds(), None), read_texts(arguments))
    cells: dict[str, list[str]] = {}
    for bits in BITS:
        recipe = Recipe.build(Options(recipe="unsloth", bits=bits), source.config)
        plain: list[float] = []
        for name, model in variants(source, recipe, imatrix):
            means = measure(model)
            plain = plain or means
            parts = [
                f"{mean:.4f} ({mean / first - 1:+.1%})" for mean, first in zip(means, plain, strict=True)
            ]
            cells.setdefault(name, []).extend(parts)
    print("| |", " | ".join(f"N={bits} {text}" for bits in BITS for text in ("held out", "evaluation")), "|")
    print("|---|" + "---:|" * (2 * len(BITS)))
    for name, row in cells.items():
        print(f"| {name} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
