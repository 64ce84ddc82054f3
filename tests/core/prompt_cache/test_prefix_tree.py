"""The radix tree against a dictionary of tuples."""

from hypothesis import given
from hypothesis import strategies as st

from qchat.core.prompt_cache.prefix_tree import PrefixTree

runs = st.lists(st.integers(0, 2), min_size=1, max_size=12)
steps = st.lists(st.tuples(st.sampled_from(["insert", "insert", "remove"]), runs), max_size=30)


@given(steps, runs)
def test_it_finds_what_a_dictionary_of_prefixes_would(steps, wanted):
    tree: PrefixTree[tuple[int, ...]] = PrefixTree()
    known: set[tuple[int, ...]] = set()
    for action, ids in steps:
        node = tree.insert(ids)
        assert node.length == len(ids)
        if action == "insert":
            known.add(tuple(ids))
            node.value = tuple(ids)
        else:
            known.discard(tuple(ids))
            tree.remove(node)
    assert set(tree) == known
    node, length = tree.match(wanted)
    above = node.values_above()
    assert above == sorted((one for one in known if tuple(wanted[: len(one)]) == one), key=len, reverse=True)
    common = [sum(a == b for a, b in _alike(one, wanted)) for one in known]
    assert length == max(common, default=0)


def _alike(one, other):
    """The pairs at the beginning that are equal."""
    for pair in zip(one, other, strict=False):
        if pair[0] != pair[1]:
            return
        yield pair


def test_values_come_after_those_of_their_prefixes():
    tree: PrefixTree[int] = PrefixTree()
    for ids in ([1, 2, 3, 4], [1, 2], [1, 2, 3], [1, 2, 9]):
        tree.insert(ids).value = len(ids)
    lengths = list(tree)
    assert lengths.index(2) == 0
    assert lengths.index(3) < lengths.index(4)
    assert list(tree.insert([1, 2]).values_below()) == lengths


def test_a_long_run_of_ids_is_one_edge():
    tree: PrefixTree[str] = PrefixTree()
    ids = list(range(100_000))
    tree.insert(ids).value = "whole"
    node, length = tree.match([*ids[:70_000], 5])
    assert (node.length, length) == (0, 70_000)
    tree.insert(ids[:70_000]).value = "part"
    assert tree.match(ids)[0].values_above() == ["whole", "part"]
