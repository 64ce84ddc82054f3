"""Thoughts close at their token budget, and answers end at the first stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.core.generation.endings import StopStrings, ThinkingBudget


class RankedDecoder:
    """A decoder that only knows how likely the end of the thought is."""

    def __init__(self, rank: int):
        self._rank, self.forced = rank, []

    def rank(self, _token: int) -> int:
        return self._rank

    def force(self, token: int) -> None:
        self.forced.append(token)


@pytest.mark.parametrize(
    ("budget", "spent", "rank", "closes"),
    [
        (None, 10_000, 0, False),
        (100, 50, 0, False),
        (100, 95, 50, False),
        (100, 95, 1, True),
        (100, 100, 50, True),
        (0, 0, 50, True),
    ],
)
def test_a_thought_is_closed_at_its_budget_or_a_little_before_where_it_is_likely(budget, spent, rank, closes):
    decoder = RankedDecoder(rank)
    assert ThinkingBudget(budget, 9).enforce(spent, decoder) is closes  # pyright: ignore[reportArgumentType]
    assert decoder.forced == ([9] if closes else [])


@pytest.mark.parametrize(("budget", "rank", "closes_after"), [(None, 0, 0), (None, 50, 128), (1010, 50, 10)])
def test_a_tightened_budget_closes_where_the_end_is_likely_and_soon_in_any_case(budget, rank, closes_after):
    thinking, decoder = ThinkingBudget(budget, 9), RankedDecoder(rank)
    assert not thinking.enforce(900, decoder)  # pyright: ignore[reportArgumentType]
    thinking.tighten(1000)
    closed = next(n for n in range(500) if thinking.enforce(1000 + n, decoder))  # pyright: ignore[reportArgumentType]
    assert closed == closes_after


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_in_any_pieces_cut_the_text_where_the_first_one_begins(text, stops, data):
    stopper, shown, rest = StopStrings(stops), "", text
    while rest and not stopper.found:
        size = data.draw(st.integers(1, len(rest)))
        shown += stopper.add(rest[:size])
        rest = rest[size:]
    shown += stopper.flush()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text
        return
    # whichever stop string was complete first decided
    assert stopper.found
    assert text.startswith(shown)
    assert any(text.startswith(stop, len(shown)) for stop in stops)
    assert not any(stop in shown for stop in stops)
