"""Copies against a search through all earlier places."""

from hypothesis import given
from hypothesis import strategies as st

from qchat.core.generation.copy_drafts import LONGEST_COMPARED, SHORTEST_MATCH, CopyDrafts

contexts = st.one_of(
    st.lists(st.integers(0, 2), max_size=60),
    st.lists(st.integers(0, 30), max_size=120),
    st.lists(st.integers(0, 200), min_size=4, max_size=30).map(lambda ids: ids + ids[: len(ids) // 2]),
)


def longest_match(ids: list[int]) -> int:
    """Return how many of the last ids occurred earlier, 0 for fewer than a match needs."""
    for length in range(len(ids) - 1, SHORTEST_MATCH - 1, -1):
        if any(ids[end - length : end] == ids[-length:] for end in range(length, len(ids))):
            return length
    return 0


@given(contexts)
def test_the_longest_match_wins_and_what_followed_it_is_proposed(ids: list[int]):
    copies = CopyDrafts(ids)
    wanted = longest_match(ids)
    if wanted < LONGEST_COMPARED:
        assert copies.matched == wanted
    proposal = copies.proposal(5)
    assert len(proposal) == (5 if wanted else 0)
    if wanted:
        # each prefix of the context with its continuation holds the match and the proposal
        ends = [end for end in range(wanted, len(ids)) if ids[end - wanted : end] == ids[-wanted:]]
        longer = ids + proposal
        assert any(longer[end : end + 5] == proposal for end in ends)


@given(contexts, st.integers(0, 120))
def test_ids_one_by_one_and_all_at_once_give_the_same(ids: list[int], split: int):
    copies = CopyDrafts(ids[:split])
    copies.follow(ids)
    assert (copies.matched, copies.proposal(7)) == (CopyDrafts(ids).matched, CopyDrafts(ids).proposal(7))


@given(contexts, contexts)
def test_another_context_leaves_nothing_of_the_one_before(ids: list[int], other: list[int]):
    copies = CopyDrafts(ids)
    copies.follow(other)
    assert (copies.matched, copies.proposal(7)) == (CopyDrafts(other).matched, CopyDrafts(other).proposal(7))


def test_a_period_goes_on_beyond_the_end():
    assert CopyDrafts([1, 2, 3, 1, 2, 3]).proposal(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_a_match_that_ends_gives_way_to_the_longest_other_one():
    copies = CopyDrafts([9, 1, 2, 3, 4, 7, 0, 1, 2, 3, 8, 5])
    copies.extend([9, 1, 2, 3])
    assert (copies.matched, copies.proposal(2)) == (4, [4, 7])
    copies.add(8)
    assert (copies.matched, copies.proposal(1)) == (4, [5])
