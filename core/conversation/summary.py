"""A session as frozen values for front ends: turns and branches, prefixes reused, snapshots kept.

Looks at a session from above, without MLX. Imported conversations may hold anything in their statistics:
unknown names and values that are not numbers are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import ConfigError, UsageError
from ..events import Done, FinishReason, Performance
from ..generation.draft_gate import MAX_DRAFTS
from ..storage.records import make_title
from ..vision.picture import Thumbnail
from .switches import branch_tools
from .transcript import History, Node, Output, branch, tool_calls_of

if TYPE_CHECKING:
    from ..prompt_cache.snapshots import Snapshot
    from .reply import TurnCost
    from .session import Session

COUNTS = [item.name for item in fields(Done) if item.name.endswith("_tokens")]
BY_PLACE = "drafts_by_place"
OPTIONAL = [item.name for item in fields(Performance) if item.default is None]
# an imported number beyond this is no figure of a reply
MAX_NUMBER = 1 << 63
# so few tokens are read at once
SOON = 64
# the branches, the newest ones, whose snapshots are looked up
MAX_INSTANT = 32


@dataclass(frozen=True)
class ToolCall:
    """A tool that a reply calls, with its arguments as the model wrote them."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolResult:
    """The result of a call: the tool's `name`, and the text that the model reads.

    `seconds` is the time that the call took, None where that is unknown.
    """

    name: str
    text: str
    seconds: float | None = None


@dataclass(frozen=True)
class ShownPicture:
    """A picture in a message: its file's `name`, its width and height in pixels, and its tokens.

    `tokens` are 0 before a model has seen it; `digest` is the SHA-256 of the file.
    """

    name: str
    width: int
    height: int
    tokens: int
    thumbnail: Thumbnail
    digest: str = ""


@dataclass(frozen=True)
class TurnStats:
    """The token counts of a reply, as in `Done`, and its `performance`; zero where nothing was stored."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    reasoning_tokens: int = 0
    generated_tokens: int = 0
    performance: Performance = field(default_factory=Performance)


@dataclass(frozen=True)
class Turn:
    """A question and its reply. `number` counts from 1; `role` tells who asked: the user, or a tool.

    `node` is the reply's node number. `siblings` are those of the replies to the same question and to its
    edits, itself included. `created` is in seconds since 1970. `model_name` names the model that replied, and
    is empty where that is unknown. `results` are those of a tool's turn, in the order of the calls.
    `pictures` are those of the question that are still known.
    """

    number: int
    role: Literal["user", "tool"]
    question: str
    thinking: str
    answer: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    node: int
    siblings: tuple[int, ...]
    stats: TurnStats
    created: float
    model_name: str = ""
    results: tuple[ToolResult, ...] = ()
    pictures: tuple[ShownPicture, ...] = ()

    @property
    def seconds_thinking(self) -> float:
        """The seconds that the reply spent on reasoning."""
        return self.stats.performance.seconds_thinking


@dataclass(frozen=True)
class Branch:
    """The end of a branch: its last reply's node `number`, and the first words of the question before it.

    `answer` has the first words of that reply. The branch has `turns`, of which it shares the first `shared`
    with the current branch.
    """

    number: int
    first_words: str
    current: bool
    turns: int = 1
    shared: int = 0
    answer: str = ""


@dataclass(frozen=True)
class ConversationState:
    """The conversation: its current branch as `turns`, and the ends of all branches.

    `conversation` is its number in the store, None before the first question and without a store. `tokens` of
    `context_limit` are the branch's share of the context. `leaf` is the node number of the last reply.
    `tools` names the tools that the model reads about on this branch.
    """

    conversation: int | None
    title: str
    system: str | None
    history: History
    tokens: int
    context_limit: int
    leaf: int | None
    turns: tuple[Turn, ...]
    branches: tuple[Branch, ...]
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class TurnReuse:
    """How one reply's prompt used the cache: how it was synced, why, and the tokens of each kind.

    `image_tokens` of the prompt are those of pictures.
    """

    turn: int
    how: Literal["extend", "restore", "rebuild"]
    why: str
    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    image_tokens: int = 0


@dataclass(frozen=True)
class SnapshotSummary:
    """One snapshot: the turn and the place in it, its length in tokens, the bytes of its recurrent state."""

    turn: int
    kind: str
    tokens: int
    state_nbytes: int


@dataclass(frozen=True)
class CacheSummary:
    """The prompt cache: what each turn reused and read, and the snapshots of this conversation.

    `other_snapshots` serve other conversations. Bytes and budgets are those of all, in memory and on disk.
    `instant` has the node numbers of the branch ends to which a snapshot makes a switch instant.
    """

    history: History
    turns: tuple[TurnReuse, ...]
    snapshots: tuple[SnapshotSummary, ...]
    other_snapshots: int
    snapshot_nbytes: int
    snapshot_budget_nbytes: int
    disk_nbytes: int
    disk_budget_nbytes: int
    instant: tuple[int, ...] = ()


def describe_session(session: "Session") -> ConversationState:
    """Describe the conversation of a session."""
    tree = session.tree
    outputs = [node for node in tree.branch() if isinstance(node, Output)]
    siblings = _siblings(tree.nodes)
    return ConversationState(
        conversation=session.conversation,
        title=session.title,
        system=session.system,
        history=session.history,
        tokens=len(session.prompt_ids()),
        context_limit=session.context_limit,
        leaf=tree.leaf.number if tree.leaf else None,
        turns=tuple(_turn(session, number, node, siblings) for number, node in enumerate(outputs, 1)),
        branches=tuple(_branch(end, outputs) for end in tree.branch_ends()),
        tools=_tool_names(session),
    )


def _tool_names(session: "Session") -> tuple[str, ...]:
    on_branch = branch_tools(session.tree.branch())
    tools = session.tools if on_branch is None else on_branch
    return tuple(tool.get("function", tool)["name"] for tool in tools)


def describe_replies(session: "Session") -> tuple[Turn, ...]:
    """Describe every reply of a session, on all of its branches, in the order in which they began."""
    nodes = session.tree.nodes
    siblings, numbers = _siblings(nodes), dict[int | None, int]()
    turns: list[Turn] = []
    for node in nodes:  # a reply comes after the one that it follows
        if isinstance(node, Output):
            numbers[node.number] = number = numbers.get(_previous_reply(node), 0) + 1
            turns.append(_turn(session, number, node, siblings))
    return tuple(turns)


def _siblings(nodes: Sequence[Node]) -> dict[int | None, list[int]]:
    """Group the numbers of replies by the number of the reply they follow."""
    found: dict[int | None, list[int]] = {}
    for node in nodes:
        if isinstance(node, Output):
            found.setdefault(_previous_reply(node), []).append(node.number)
    return found


def _previous_reply(node: Output) -> int | None:
    return node.parent.parent.number if node.parent.parent else None


def _turn(
    session: "Session", number: int, node: Output, siblings: Mapping[int | None, Sequence[int]]
) -> Turn:
    reason: Any = node.stats.get("finish_reason")
    return Turn(
        number=number,
        role="user" if node.parent.is_question else "tool",
        question=node.parent.text,
        thinking=node.message.get("reasoning_content") or "",
        answer=node.message["content"],
        tool_calls=tuple(ToolCall(**call) for call in tool_calls_of(node.message)),
        finish_reason=reason if reason in get_args(FinishReason) else "cancelled",
        node=node.number,
        siblings=tuple(siblings[_previous_reply(node)]),
        stats=_stats(node.stats),
        created=node.created,
        model_name=node.model_name,
        results=tuple(_results(node)),
        pictures=tuple(_pictures(session, node)),
    )


def _pictures(session: "Session", node: Output) -> Iterator[ShownPicture]:
    """Yield the pictures that a reply follows, without those that are missing."""
    for message in node.parent.messages:
        for image in message.get("images", ()):
            with suppress(UsageError, ConfigError):
                picture = session.engine.images.picture_of(image)
                tokens = image["rows"] * image["columns"]
                yield ShownPicture(image["name"], *picture.size, tokens, picture.thumbnail, image["digest"])


def _results(node: Output) -> Iterator[ToolResult]:
    """Yield the results that a reply follows, each under the name of its call."""
    before = node.parent.parent
    names = [call["name"] for call in tool_calls_of(before.message)] if before else []
    texts = [str(message["content"]) for message in node.parent.messages if message["role"] == "tool"]
    for name, text in zip_longest(names, texts, fillvalue=""):
        if texts:
            yield ToolResult(name, text)


def _stats(stored: Mapping[str, Any]) -> TurnStats:
    counts = {name: int(_number(stored.get(name))) for name in COUNTS}
    return TurnStats(**counts, performance=_performance(stored.get("performance")))


def _performance(stored: Any) -> Performance:
    measured = stored if isinstance(stored, dict) else {}
    speeds = {item.name: _number(measured.get(item.name)) for item in fields(Performance)}
    sizes = {name: int(value) for name, value in speeds.items() if name.endswith("nbytes")}
    unmeasured = {name: None for name in OPTIONAL if measured.get(name) is None}
    by_place = {BY_PLACE: _numbers(measured.get(BY_PLACE))}
    return Performance(**speeds | sizes | unmeasured | by_place)  # pyright: ignore[reportArgumentType]


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(map(_number, values[:MAX_DRAFTS])) if isinstance(values, list | tuple) else ()


def _number(value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER
    return value if known else 0


def _branch(end: Output, current: Sequence[Output]) -> Branch:
    """Describe the branch that ends in `end`, beside the replies of the current one."""
    replies = [node for node in branch(end) if isinstance(node, Output)]
    shared = sum(mine is theirs for mine, theirs in zip(replies, current, strict=False))
    here = bool(current) and end is current[-1]
    question, answer = make_title(end.parent.text), make_title(str(end.message.get("content") or ""))
    return Branch(end.number, question, here, len(replies), shared, answer)


def describe_cache(session: "Session") -> CacheSummary:
    """Describe the prompt cache of a session."""
    snapshots, disk = session.live.snapshots, session.live.disk
    mine = _own_snapshots(session)
    return CacheSummary(
        history=session.history,
        turns=tuple(map(_reuse, session.turns)),
        snapshots=tuple(map(_snapshot, mine)),
        other_snapshots=len(list(snapshots)) - len(mine),
        snapshot_nbytes=snapshots.nbytes,
        snapshot_budget_nbytes=snapshots.budget_nbytes,
        disk_nbytes=disk.nbytes if disk else 0,
        disk_budget_nbytes=disk.budget_nbytes if disk else 0,
        instant=tuple(
            end.number for end in session.tree.branch_ends()[-MAX_INSTANT:] if _is_instant(session, end)
        ),
    )


def _own_snapshots(session: "Session") -> "list[Snapshot]":
    """Return the snapshots that this conversation kept or could continue from."""
    snapshots = session.live.snapshots
    shared = snapshots.find(session.prompt_ids())
    path = shared.path() if shared else []
    return [one for one in snapshots if one.conversation is session.key or one in path]


def _is_instant(session: "Session", end: Output) -> bool:
    """Whether a snapshot holds all but a few tokens of the branch that ends in `end`."""
    ids = session.encoder.branch_ids(branch(end), session.history)
    found = session.live.snapshots.find(ids)
    return found is not None and len(ids) - found.length <= SOON


def _reuse(turn: "TurnCost") -> TurnReuse:
    return TurnReuse(
        turn=turn.number,
        how=turn.sync.how,
        why=turn.sync.why,
        prompt_tokens=turn.prompt_tokens,
        cached_tokens=turn.sync.cached,
        prefilled_tokens=turn.prefilled_tokens,
        image_tokens=turn.image_tokens,
    )


def _snapshot(snapshot: "Snapshot") -> SnapshotSummary:
    return SnapshotSummary(snapshot.turn, snapshot.kind, snapshot.length, snapshot.cache.state_nbytes)
