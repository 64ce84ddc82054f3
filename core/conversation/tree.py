"""A conversation's nodes and the reply that its user is at; finds replies and questions by number.

Refuses numbers that are not there, in a sentence that says which are.
"""

from ..errors import UsageError
from .transcript import Input, Node, Output, branch


class Tree:
    """`nodes`, parents before children, and `leaf`, the reply that the next question follows, if any."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.leaf: Output | None = None

    def branches(self) -> list[Output]:
        """The last reply of every branch, in the order they were begun."""
        parents = {node.parent for node in self.nodes}
        return [n for n in self.nodes if isinstance(n, Output) and n not in parents]

    def add(self, *nodes: Node) -> None:
        self.nodes += [node for node in nodes if node not in self.nodes]

    def drop(self, output: Output) -> None:
        """Take a reply out of the tree, and its question where that has no other reply."""
        self.nodes.remove(output)
        if not any(isinstance(node, Output) and node.parent is output.parent for node in self.nodes):
            self.nodes.remove(output.parent)

    def last(self) -> Output:
        """Raises UsageError where there is none."""
        if self.leaf is None:
            raise UsageError("there is no question yet")
        return self.leaf

    def question(self, turn: int) -> Input:
        """That of turn 1, 2, ... of the current branch. Raises UsageError for another number."""
        asked = [node for node in branch(self.leaf) if isinstance(node, Input)]
        if not 1 <= turn <= len(asked):
            raise UsageError(f"there is no question {turn}: this branch has {len(asked)}")
        return asked[turn - 1]

    def turn_of(self, node: Node) -> int:
        """Its turn's place on its branch, from 1."""
        return sum(isinstance(n, Input) for n in branch(node))
