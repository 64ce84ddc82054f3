"""List, search, show, export, import, rename and delete conversations. ID is a number, the beginning of a
title, or `latest`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.errors import StoreError, UsageError
from ...chat.conversations import find, open_store, when
from ...text.columns import columns
from ...text.output import write

if TYPE_CHECKING:
    from ....core import Store
    from ....core.storage.records import Conversation, Node

SPEAKERS = {"system": "System", "user": "You", "assistant": "Qwen", "tool": "Tool"}
LIMIT = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_list, limit=LIMIT, json=False)
    actions = parser.add_subparsers(metavar="ACTION", title="actions")

    def add(name: str, action: Callable[["Store", Any], None], help_: str, ids: str = "") -> Any:
        part = actions.add_parser(name, help=help_, description=help_.capitalize() + ".", allow_abbrev=False)
        part.set_defaults(action=action)
        if ids:
            part.add_argument("id", nargs=ids if ids == "+" else None, metavar="ID")
        return part

    def add_json(part: Any, default: Any = argparse.SUPPRESS) -> None:
        part.add_argument("--json", action="store_true", default=default, help="print it as JSON")

    def add_limit(part: Any) -> None:
        part.add_argument("-n", "--limit", type=int, default=LIMIT, metavar="N", help=f"at most N ({LIMIT})")

    add_json(parser, default=False)
    listed = add("list", _list, "list the conversations, newest first")
    add_limit(listed)
    searched = add("search", _search, "list where all of some words were said")
    searched.add_argument("words", nargs="+", metavar="WORD")
    add_limit(searched)
    shown = add("show", _show, "print a conversation", ids="1")
    for part in (listed, searched, shown):
        add_json(part)
    exported = add("export", _export, "write a conversation to a file", ids="1")
    exported.add_argument("file", type=Path, metavar="FILE", help="its name ends in .md, .html or .json")
    exported.add_argument("--force", action="store_true", help="replace the file")
    imported = add("import", _import, "add conversations that were exported as JSON")
    imported.add_argument("files", nargs="+", type=Path, metavar="FILE")
    renamed = add("rename", _rename, "give a conversation another title", ids="1")
    renamed.add_argument("title", nargs="+", metavar="TITLE")
    add("rm", _remove, "delete conversations", ids="+")
    add("restore", _restore, "bring back what was deleted less than a minute ago", ids="1")


def run(args: argparse.Namespace) -> int:
    """Do what was asked; returns the exit code. Raises QchatError."""
    if getattr(args, "limit", 1) < 1:
        raise UsageError(f"--limit is {args.limit}, wanted a number from 1")
    with open_store() as store:
        args.action(store, args)
    return 0


def _list(store: "Store", args: argparse.Namespace) -> None:
    found = store.conversations(args.limit)
    if args.json:
        _print_json([about(one) for one in found])
    elif not found:
        _say("there are no conversations yet")
    else:
        rows = [(str(one.id), when(one.updated), one.model.name, one.title) for one in found]
        write(sys.stdout, columns([("id", "changed", "model", "title"), *rows], right=(0,)))


def _search(store: "Store", args: argparse.Namespace) -> None:
    hits = store.search(" ".join(args.words), args.limit)
    if args.json:
        _print_json([asdict(hit) for hit in hits])
    elif not hits:
        _say("nothing was found")
    else:
        rows = [
            (
                str(hit.conversation),
                SPEAKERS[hit.role] if hit.role else "title",
                f"{hit.title}: {hit.snippet}",
            )
            for hit in hits
        ]
        write(sys.stdout, columns([("id", "where", "what"), *rows], right=(0,)))


def _show(store: "Store", args: argparse.Namespace) -> None:
    conversation = find(store, args.id)
    branch = store.branch(conversation.id)
    if args.json:
        messages = [{key: value for key, value in asdict(node).items() if key != "ids"} for node in branch]
        _print_json({**about(conversation), "system": conversation.system, "messages": messages})
    else:
        write(sys.stdout, as_text(conversation, branch))


def _export(store: "Store", args: argparse.Namespace) -> None:
    from ....core import export_conversation

    export_conversation(store, find(store, args.id).id, args.file, overwrite=args.force)
    _say(f"written to {args.file}")


def _import(store: "Store", args: argparse.Namespace) -> None:
    from ....core import import_conversation

    for path in args.files:
        number = import_conversation(store, path)
        _say(f"{path} is conversation {number}: {store.conversation(number).title}")


def _rename(store: "Store", args: argparse.Namespace) -> None:
    store.rename(find(store, args.id).id, " ".join(args.title))


def _remove(store: "Store", args: argparse.Namespace) -> None:
    for id, title in [_named(store, word) for word in args.id]:  # all are there before one is deleted
        store.delete(id)
        _say(f"deleted: {title} (for a minute `qchat sessions restore {id}` brings it back)")


def _named(store: "Store", word: str) -> tuple[int, str]:
    """The number and title of a conversation, which may be damaged."""
    number = word.removeprefix("#")
    try:
        found = find(store, word)
    except StoreError:
        if number.isdecimal() and store.has(int(number[:18])):
            return int(number[:18]), f"conversation {number}, which is damaged"
        raise
    return found.id, found.title


def _restore(store: "Store", args: argparse.Namespace) -> None:
    if not args.id.isdecimal():
        raise UsageError("restore wants the number of a conversation")
    store.restore(int(args.id[:18]))
    _say(f"brought back: {_named(store, args.id)[1]}")


def about(conversation: "Conversation") -> dict[str, Any]:
    """What a list says of a conversation; times in seconds since 1970."""
    return {
        "id": conversation.id,
        "title": conversation.title,
        "model": conversation.model.name,
        "created": conversation.created,
        "updated": conversation.updated,
    }


def as_text(conversation: "Conversation", branch: Sequence["Node"]) -> str:
    """The messages under their speakers' names; thoughts as one line."""
    parts = [conversation.title]
    if conversation.system:
        parts.append(f"System:\n{conversation.system}")
    for node in branch:
        stopped = " (stopped)" if node.state == "cancelled" else ""
        thought = f"Thought: {len(node.thinking):,} characters\n" if node.thinking else ""
        parts.append(f"{SPEAKERS[node.role]}{stopped}:\n{thought}{node.text}".rstrip())
    return "\n\n".join(parts) + "\n"


def _print_json(value: Any) -> None:
    write(sys.stdout, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _say(sentence: str) -> None:
    write(sys.stderr, f"qchat: {sentence}\n")
