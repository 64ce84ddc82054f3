"""The nodes of one conversation, and its current reply.

Finds replies and questions by number. An error for an unknown number lists the known ones.
"""

from ..errors import UsageError
from .transcript import Input, Node, Output, branch


class Tree:
    """`nodes`, parents before children, and `leaf`, the reply that the next question follows, if any."""

    def __init__(self, nodes: list[Node] | None = None, leaf: Output | None = None) -> None:
        self.nodes: list[Node] = nodes or []
        self.leaf = leaf

    def branch(self) -> list[Node]:
        """Return the nodes of the current branch, from the first input to the leaf."""
        return branch(self.leaf)

    def branch_ends(self) -> list[Output]:
        """Return the last reply of every branch, in the order in which they began."""
        parents = {node.parent for node in self.nodes}
        return [n for n in self.nodes if isinstance(n, Output) and n not in parents]

    def add(self, *nodes: Node) -> None:
        """Add nodes that are not in the tree yet."""
        self.nodes += [node for node in nodes if node not in self.nodes]

    def drop(self, output: Output) -> None:
        """Remove a reply, and its question if that has no other reply."""
        self.nodes.remove(output)
        if not any(isinstance(node, Output) and node.parent is output.parent for node in self.nodes):
            self.nodes.remove(output.parent)

    def last_reply(self) -> Output:
        """Return the leaf. Raises UsageError before the first question."""
        if self.leaf is None:
            raise UsageError("there is no question yet")
        return self.leaf

    def find_reply(self, number: int) -> Output:
        """Return the reply with this node number, on any branch. Raises UsageError for an unknown one."""
        found = next((n for n in self.nodes if n.number == number and isinstance(n, Output)), None)
        if found is None:
            known = ", ".join(str(n.number) for n in self.branch_ends()) or "none yet"
            raise UsageError(f"there is no reply {number}: branches end in {known}")
        return found

    def question(self, turn: int) -> Input:
        """Return the input of turn 1, 2, ... of the current branch. Raises UsageError for another number."""
        inputs = [node for node in self.branch() if isinstance(node, Input)]
        if not 1 <= turn <= len(inputs):
            raise UsageError(f"there is no question {turn}: this branch has {len(inputs)}")
        return inputs[turn - 1]

    def first_question(self) -> str:
        """Return the first question; empty if there is none yet."""
        return next((node.text for node in self.nodes if isinstance(node, Input)), "")


def turn_number(node: Node) -> int:
    """Return the position of the node's turn on its branch, from 1."""
    return sum(isinstance(n, Input) for n in branch(node))
