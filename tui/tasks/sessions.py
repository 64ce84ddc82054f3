"""The task `sessions`: stored conversations."""

# ruff: noqa: ARG002  a task need not use all that tasks are given

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...core.errors import StoreError, UsageError
from ..chat.conversations import find, when
from ..text.report import Lines, Report, Table
from ..user.paths import user_path
from .base import Door, LocalTask, Outcome, add_json

if TYPE_CHECKING:
    from ...core import Store
    from ...core.storage.records import Conversation, Node

SPEAKERS = {"system": "System", "user": "You", "assistant": "Qwen", "tool": "Tool"}
LIMIT = 50
COLUMNS = ("", "id", "changed", "model", "title")
CURRENT = "*"


class Sessions(LocalTask):
    """List, search, show, export and delete conversations.

    ID is a number, the beginning of a title, or `latest`. In a chat a number alone opens that conversation,
    and other words are searched for.
    """

    name = "sessions"
    usage = "[ACTION|NUMBER|WORDS] [OPTIONS]"
    most_models = 0
    needs_store = True
    screen = "sessions"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(action="list", limit=LIMIT, json=False)
        actions = parser.add_subparsers(metavar="ACTION", title="actions")

        def add(name: str, help_: str, ids: str = "") -> Any:
            part = actions.add_parser(
                name, help=help_, description=help_.capitalize() + ".", allow_abbrev=False
            )
            part.set_defaults(action=name)
            if ids:
                part.add_argument("id", nargs=ids if ids == "+" else None, metavar="ID")
            return part

        add_json(parser)
        listed = add("list", "list the conversations, newest first")
        _add_limit(listed)
        searched = add("search", "list where all of some words were said")
        searched.add_argument("words", nargs="+", metavar="WORD")
        _add_limit(searched)
        for part in (listed, searched, add("show", "print a conversation", ids="1")):
            add_json(part, default=argparse.SUPPRESS)
        exported = add("export", "write a conversation to a file", ids="1")
        exported.add_argument("file", metavar="FILE", help="its name ends in .md, .html or .json")
        exported.add_argument("--force", action="store_true", help="replace the file")
        imported = add("import", "add conversations that were exported as JSON")
        imported.add_argument("files", nargs="+", metavar="FILE")
        renamed = add("rename", "give a conversation another title", ids="1")
        renamed.add_argument("title", nargs="+", metavar="TITLE")
        add("rm", "delete conversations", ids="+")
        add("forget", "erase what qchat serve keeps of requests on disk")
        add("restore", "bring back what was deleted less than a minute ago", ids="1")

    def check(self, args: argparse.Namespace, door: Door) -> None:
        if args.limit < 1:
            raise UsageError(f"--limit is {args.limit}, wanted a number from 1")

    def perform(self, args: argparse.Namespace, door: Door) -> Outcome:
        if door.store is None:
            raise UsageError("conversations are not kept in this run")
        return ACTIONS[args.action](door.store, args, door)


def _add_limit(part: Any) -> None:
    part.add_argument("-n", "--limit", type=int, default=LIMIT, metavar="N", help=f"at most N ({LIMIT})")


def _list(store: "Store", args: argparse.Namespace, door: Door) -> Outcome:
    found, models = store.conversations(args.limit), store.model_names()
    value = [about(one, models.get(one.id, ())) for one in found]
    if not found:
        return Outcome(Report(""), ["there are no conversations yet"], value)
    rows = [row(one, models.get(one.id, ()), here=door.conversation) for one in found]
    return Outcome(Report("Conversations", (Table(COLUMNS, rows, "<><<<", named=False),)), value=value)


def row(one: "Conversation", models: Sequence[str], *, here: int | None) -> tuple[str, ...]:
    """Return a conversation's words in COLUMNS, for all lists; the current one is marked.

    Beside the last model stands how many others of `models` replied.
    """
    mark, last = (CURRENT if one.id == here else ""), one.model.name
    others = len(set(models) - {last})
    return (
        mark,
        str(one.id),
        when(one.updated),
        f"{last} +{others}" if others else last,
        one.title or "untitled",
    )


def _search(store: "Store", args: argparse.Namespace, _: Door) -> Outcome:
    hits = store.search(" ".join(args.words), args.limit)
    value = [asdict(hit) for hit in hits]
    if not hits:
        return Outcome(Report(""), ["nothing was found"], value)
    rows = [
        (str(hit.conversation), SPEAKERS[hit.role] if hit.role else "title", f"{hit.title}: {hit.snippet}")
        for hit in hits
    ]
    return Outcome(Report("", (Table(("id", "where", "what"), rows, "><<", named=False),)), value=value)


def _show(store: "Store", args: argparse.Namespace, _: Door) -> Outcome:
    conversation = find(store, args.id)
    branch = store.branch(conversation.id)
    messages = [{key: value for key, value in asdict(node).items() if key != "ids"} for node in branch]
    models = store.model_names().get(conversation.id, ())
    value = {**about(conversation, models), "system": conversation.system, "messages": messages}
    return Outcome(_transcript(conversation, branch), value=value)


def _export(store: "Store", args: argparse.Namespace, _: Door) -> Outcome:
    from ...core import export_conversation

    path = user_path(args.file)
    export_conversation(store, find(store, args.id).id, path, overwrite=args.force)
    return Outcome(Report(""), [f"written to {path}"])


def _import(store: "Store", args: argparse.Namespace, _: Door) -> Outcome:
    from ...core import import_conversation

    notes = []
    for name in args.files:
        path = user_path(name)
        number = import_conversation(store, path)
        notes.append(f"{path} is conversation {number}: {store.conversation(number).title}")
    return Outcome(Report(""), notes)


def _rename(store: "Store", args: argparse.Namespace, _: Door) -> Outcome:
    number, title = find(store, args.id).id, " ".join(args.title)
    store.rename(number, title)
    return Outcome(Report(""), [f"conversation {number} is called {title}"])


def _remove(store: "Store", args: argparse.Namespace, door: Door) -> Outcome:
    found = [_named(store, word) for word in args.id]  # all are there before one is deleted
    if any(number == door.conversation for number, _ in found):
        raise UsageError("this is the conversation you are in: begin another one first")
    notes = []
    for number, title in found:
        store.delete(number)
        back = f"for a minute `{door.prefix}sessions restore {number}` brings it back"
        notes.append(f"deleted: {title} ({back})")
    return Outcome(Report(""), notes)


def _named(store: "Store", word: str) -> tuple[int, str]:
    """Return the number and title of a conversation, which may be damaged. Raises UsageError, StoreError."""
    number = word.removeprefix("#")
    try:
        found = find(store, word)
    except StoreError:
        if number.isdecimal() and store.has(int(number[:18])):
            return int(number[:18]), f"conversation {number}, which is damaged"
        raise
    return found.id, found.title


def _restore(store: "Store", args: argparse.Namespace, _: Door) -> Outcome:
    if not args.id.isdecimal():
        raise UsageError("restore wants the number of a conversation")
    number = int(args.id[:18])
    store.restore(number)
    return Outcome(Report(""), [f"brought back: {_named(store, args.id)[1]}"])


def _forget(store: "Store", args: argparse.Namespace, _: Door) -> Outcome:  # noqa: ARG001
    store.erase_served()
    return Outcome(Report(""), ["erased what was kept of requests"])


ACTIONS: dict[str, Callable[["Store", argparse.Namespace, Door], Outcome]] = {
    "list": _list,
    "search": _search,
    "show": _show,
    "export": _export,
    "import": _import,
    "rename": _rename,
    "rm": _remove,
    "forget": _forget,
    "restore": _restore,
}


def about(conversation: "Conversation", models: Sequence[str]) -> dict[str, Any]:
    """Return what a list says of a conversation, which `models` replied to; times in seconds since 1970."""
    return {
        "id": conversation.id,
        "title": conversation.title,
        "model": conversation.model.name,
        "models": list(models),
        "created": conversation.created,
        "updated": conversation.updated,
    }


def _transcript(conversation: "Conversation", branch: Sequence["Node"]) -> Report:
    """Return the messages under their speakers' names; thoughts as one line."""
    parts, model = [f"System:\n{conversation.system}"] if conversation.system else [], ""
    for node in branch:
        named = f" · {node.model_name}" if node.model_name not in ("", model) else ""
        model = node.model_name or model
        stopped = " (stopped)" if node.state == "cancelled" else ""
        thought = f"Thought: {len(node.thinking):,} characters\n" if node.thinking else ""
        parts.append(f"{SPEAKERS[node.role]}{stopped}{named}:\n{thought}{node.text}".rstrip())
    lines = [line for part in parts for line in ("", *part.split("\n"))]
    return Report(conversation.title, (Lines(lines),))


TASK = Sessions()
