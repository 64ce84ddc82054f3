"""Run a coding agent with a local model: claude, codex, opencode, aider, or any program that reads the
environment of the official OpenAI and Anthropic clients. Uses the server that runs at the address, or starts
one until the tool ends, and prints what it sets. Whatever follows TOOL goes to the tool."""

import argparse
import contextlib
import os

from ....core.errors import UsageError
from ...serve.defaults import HOST, KEY_VARIABLE, PORT, url_of
from ...text.output import note
from .serve import MISSING


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tool", metavar="TOOL", help="claude, codex, opencode, aider, or another program")
    parser.add_argument("-m", "--model", metavar="MODEL", help="the model to serve if no server runs")
    parser.add_argument("--host", default=HOST, help=f"the address of the server ({HOST})")
    parser.add_argument("--port", type=int, default=PORT, help=f"the port of the server ({PORT})")
    parser.add_argument(
        "--api-key", metavar="KEY", default=os.environ.get(KEY_VARIABLE) or None, help="the server's key"
    )
    parser.add_argument(
        "--context-limit", type=int, metavar="N", help="refuse contexts of more than N tokens"
    )
    parser.add_argument("--print", action="store_true", help="print what would be set, and run nothing")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments for the tool")


def run(args: argparse.Namespace) -> int:
    """Run the tool and return its exit code. Raises QchatError."""
    try:
        from ...serve import launching
        from ...serve.tools import Connection, tool_named
    except ModuleNotFoundError as error:
        raise UsageError(MISSING) from error
    tool, url = tool_named(args.tool), url_of(args.host, args.port)
    found = launching.find_server(url, args.api_key)
    if args.print:
        shown = found or Connection(url, args.model or "MODEL", args.api_key)
        note(launching.describe(tool.setup(shown), tool.command, args.api_key))
        return 0
    with contextlib.ExitStack() as stack:
        if found is None:
            note(f"no server answers at {url}: starting one")
            found = stack.enter_context(launching.started_server(_serve_arguments(args), url, args.api_key))
        elif args.model or args.context_limit:
            note(f"a server already runs at {url}: --model and --context-limit have no effect")
        setup = tool.setup(found)
        note(launching.describe(setup, tool.command, args.api_key))
        return launching.run_tool(tool, setup, args.arguments)


def _serve_arguments(args: argparse.Namespace) -> list[str]:
    """Return the arguments of `qchat serve`; the key goes through its environment."""
    model = [args.model] if args.model else []
    limit = ["--context-limit", str(args.context_limit)] if args.context_limit else []
    return [*model, "--host", args.host, "--port", str(args.port), *limit]
