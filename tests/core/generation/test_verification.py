"""Drafts change no distribution: whole steps with drafts, many times, against the exact probabilities."""

from functools import partial

import numpy as np
import pytest

from qchat.core.generation.sampling import SamplerState, Sampling, initial_state, probabilities
from qchat.core.generation.verification import Draft, RejectionSampling, SameDraw, Verifier, make_verifier
from qchat.core.machine.backend import mx

VOCABULARY, DRAWS, PLACES = 24, 20_000, 3
START = 5
# logits [V, V] after each id: the model's, and those of a draft head that is often right
MODEL = mx.array(np.random.default_rng(1).normal(0, 1.5, (VOCABULARY, VOCABULARY)).astype(np.float32))
HEAD = MODEL + mx.array(np.random.default_rng(2).normal(0, 0.7, MODEL.shape).astype(np.float32))
# the likeliest ids after START
COPY = [MODEL[START].argmax(), MODEL[MODEL[START].argmax()].argmax()]
SETTINGS = {
    "top-k and top-p": Sampling(temperature=0.7, top_k=8, top_p=0.9),
    "top-p of all ids": Sampling(temperature=0.7, top_p=0.9),
    "min-p": Sampling(temperature=0.7, min_p=0.05),
    "penalties": Sampling(0.7, 8, 0.9, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
}
RULES = {"rejection sampling": RejectionSampling, "same draw": SameDraw}


def three_ids(
    verifier: Verifier, settings: Sampling, copied: bool, key: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the next ids [3] after START by steps with two drafts, and how many of these were accepted."""
    state = initial_state(settings, VOCABULARY)._replace(key=key)
    drafts = [Draft(id) for id in COPY] if copied else drawn(verifier, state)
    read = [mx.array(START, mx.uint32), *(draft.token for draft in drafts)]
    found, states = verifier.verify(MODEL[mx.stack(read)], state, drafts)
    one = mx.all(found[:1] == read[1])
    both = one & mx.all(found[1] == read[2])
    ids = [found[0]]
    # a rejected draft ends the step, and the next one begins with the id drawn in its place
    second, after = verifier.verify(MODEL[found[:1]], states[0])
    ids.append(mx.where(one, found[1], second[0]))
    counts = [some.counts for some in (states[1], after[0]) if some.counts is not None]
    key = mx.where(one, states[1].key, after[0].key)
    later = SamplerState(key, mx.where(one, *counts) if counts else None)
    third, _ = verifier.verify(MODEL[ids[1][None]], later)
    ids.append(mx.where(both, found[2], third[0]))
    return mx.stack(ids), one.astype(mx.int32) + both


def drawn(verifier: Verifier, state: SamplerState) -> list[Draft]:
    first, state = verifier.draft(HEAD[START], state)
    second, _ = verifier.draft(HEAD[first.token], state)
    return [first, second]


def exact(settings: Sampling) -> list[np.ndarray]:
    """Return the probabilities [V] of the first, the second and the third id."""
    state = initial_state(settings, VOCABULARY)
    paths: dict[tuple[int, ...], float] = {(): 1.0}
    found = []
    for _ in range(PLACES):
        longer: dict[tuple[int, ...], float] = {}
        total = np.zeros(VOCABULARY)
        for path, weight in paths.items():
            counts = state.counts
            if counts is not None:
                counts = mx.array(np.bincount(path, minlength=VOCABULARY).astype(np.int32))
            probs = np.array(probabilities(MODEL[path[-1] if path else START], counts, settings), np.float64)
            total += weight * probs
            for id in np.flatnonzero(probs):
                longer[(*path, int(id))] = weight * probs[id]
        paths = longer
        found.append(total)
    return found


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """Return the statistic in standard deviations above its mean; ids with few draws are one class."""
    expected = probs * counts.sum()
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [False, True], ids=["head", "copy"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SETTINGS)
def test_ids_have_the_exact_distribution_at_every_place(name: str, rule: str, copied: bool):
    settings = SETTINGS[name]
    keys = mx.random.split(mx.random.key(7), DRAWS)
    ids, accepted = mx.vmap(partial(three_ids, RULES[rule](settings), settings, copied))(keys)
    assert 0.1 < float((accepted > 0).mean()) < 0.95, "the test needs both outcomes"
    for place, probs in enumerate(exact(settings)):
        counts = np.bincount(np.array(ids[:, place]), minlength=VOCABULARY)
        assert chi_square(counts, probs) < 4.5


def test_rejection_sampling_accepts_what_the_distributions_share_and_the_same_draw_a_little_less():
    settings = SETTINGS["top-k and top-p"]
    probs = [np.array(probabilities(table[START], None, settings)) for table in (MODEL, HEAD)]
    shared = float(np.minimum(*probs).sum())
    independent = float((probs[0] * probs[1]).sum())
    keys = mx.random.split(mx.random.key(3), DRAWS)
    rates = {
        rule: float((mx.vmap(partial(three_ids, make(settings), settings, False))(keys)[1] > 0).mean())
        for rule, make in RULES.items()
    }
    assert rates["rejection sampling"] == pytest.approx(shared, abs=0.015)
    assert max(independent, shared / (2 - shared)) - 0.015 < rates["same draw"] < shared + 0.015


def test_the_rule_follows_from_the_settings():
    rules = [
        make_verifier(settings)
        for settings in (
            Sampling(),
            Sampling(seed=1),
            Sampling(temperature=0),
            Sampling(temperature=0, presence_penalty=1.0),
        )
    ]
    assert [type(rule).__name__ for rule in rules] == ["RejectionSampling", "SameDraw", "Greedy", "SameDraw"]
