"""A radix tree: values found by the longest prefix of a sequence of ids.

An edge holds a run of ids, so a conversation of any length is a few nodes. Knows nothing of what it keeps.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

Value = TypeVar("Value")


class PrefixNode(Generic[Value]):
    """A position in the tree: `edge` leads to it from `parent`, and `length` ids from the root."""

    __slots__ = ("children", "edge", "length", "parent", "value")

    def __init__(self, edge: "array[int]", parent: "PrefixNode[Value] | None" = None):
        self.edge, self.parent = edge, parent
        self.length = len(edge) + (parent.length if parent else 0)
        self.children: dict[int, PrefixNode[Value]] = {}
        self.value: Value | None = None

    def values_above(self) -> list[Value]:
        """Return the values of this node and of those that lead to it, the deepest first."""
        found: list[Value] = []
        node: PrefixNode[Value] | None = self
        while node is not None:
            if node.value is not None:
                found.append(node.value)
            node = node.parent
        return found

    def values_below(self) -> Iterator[Value]:
        """Yield the values of this node and of those it leads to, a prefix before what it begins."""
        waiting: list[PrefixNode[Value]] = [self]
        while waiting:
            node = waiting.pop()
            if node.value is not None:
                yield node.value
            waiting.extend(reversed(node.children.values()))


class PrefixTree(Generic[Value]):
    """Values by the ids that lead to them."""

    def __init__(self):
        self._root: PrefixNode[Value] = PrefixNode(array("I"))

    def __iter__(self) -> Iterator[Value]:
        """Yield all values, a prefix's before those that it begins."""
        return self._root.values_below()

    def match(self, ids: Sequence[int]) -> tuple[PrefixNode[Value], int]:
        """Return the deepest node whose ids begin `ids`, and how many of `ids` the tree knows in all."""
        wanted, node = array("I", ids), self._root
        while (child := node.children.get(_at(wanted, node.length))) is not None:
            known = _common_length(child.edge, wanted, node.length)
            if known < len(child.edge):
                return node, node.length + known
            node = child
        return node, node.length

    def insert(self, ids: Sequence[int]) -> PrefixNode[Value]:
        """Return the node of exactly `ids`, a new one if need be."""
        wanted = array("I", ids)
        node, known = self.match(wanted)
        if known > node.length:
            node = _split(node.children[wanted[node.length]], known - node.length)
        if node.length < len(wanted):
            child = PrefixNode(wanted[node.length :], node)
            node.children[child.edge[0]] = child
            node = child
        return node

    def remove(self, node: PrefixNode[Value]) -> None:
        """Drop the value of `node`, and the nodes that then lead nowhere."""
        node.value = None
        while node.value is None and not node.children and (parent := node.parent) is not None:
            del parent.children[node.edge[0]]
            node = parent


def _at(ids: "array[int]", place: int) -> int:
    return ids[place] if place < len(ids) else -1


def _common_length(edge: "array[int]", ids: "array[int]", start: int) -> int:
    """Return how many ids `edge` and `ids` from `start` have in common at their beginning."""
    low, high = 0, min(len(edge), len(ids) - start)
    while low < high:  # the first `low` are equal; compare halves, which arrays do quickly
        middle = (low + high + 1) // 2
        if edge[low:middle] == ids[start + low : start + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _split(node: PrefixNode[Value], place: int) -> PrefixNode[Value]:
    """Put a node after the first `place` ids of the edge to `node`; returns it."""
    parent = node.parent
    if parent is None:
        raise ValueError("the root has no edge that could be split")
    upper = PrefixNode(node.edge[:place], parent)
    parent.children[upper.edge[0]] = upper
    node.edge, node.parent = node.edge[place:], upper
    upper.children[node.edge[0]] = node
    return upper
