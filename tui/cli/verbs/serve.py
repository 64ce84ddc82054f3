"""Serve a model to other programs over HTTP, with OpenAI's and Anthropic's interfaces: chat completions,
completions, responses and messages. Only this machine reaches it unless --host says otherwise."""

import argparse
import asyncio
import os

from ....core.errors import UsageError
from ...chat.client import EngineClient, spawn_early
from ...serve.defaults import HOST, KEY_VARIABLE, MAX_WAITING, PORT
from ...text.output import note
from ...user.paths import conversations_file
from ...user.settings import Settings

MISSING = "qchat serve needs the packages of its extra: pip install 'qchat[serve]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a model's folder, name or Hugging Face id (default: the last one used, or the small one in the "
        "package)",
    )
    parser.add_argument("--host", default=HOST, help=f"the address to listen on ({HOST})")
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"the port to listen on ({PORT}); 0 takes a free one"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(KEY_VARIABLE) or None,
        help=f"answer only requests with this key; {KEY_VARIABLE} in the environment hides it from others",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="listen on an address that others reach, without a key"
    )
    parser.add_argument(
        "--cors",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="let web pages of ORIGIN ask, such as http://localhost:3000; may be repeated",
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a further name by which clients reach this machine; may be repeated",
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        metavar="N",
        default=MAX_WAITING,
        help=f"refuse requests while N wait ({MAX_WAITING})",
    )
    parser.add_argument(
        "--log-requests", action="store_true", help="print a line for each request, without what was said"
    )
    parser.add_argument(
        "--context-limit", type=int, metavar="N", help="refuse contexts of more than N tokens"
    )
    parser.add_argument("--kv-bits", type=int, choices=(8, 16), help="bits of each cached key and value (16)")
    parser.add_argument(
        "--no-disk",
        action="store_true",
        help="keep nothing of requests on disk; otherwise long prompts that were read are saved and reused "
        "after a restart",
    )
    parser.add_argument("--yes", action="store_true", help="download a missing model without asking")
    parser.add_argument(
        "-o",
        "--option",
        dest="options",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting that `qchat config show` lists; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until ctrl+c and return the exit code. Raises QchatError."""
    flags = {name: vars(args)[name] for name in ("context_limit", "kv_bits") if vars(args)[name] is not None}
    settings = Settings.load(flags, options=args.options)
    if args.max_waiting < 0:
        raise UsageError(f"--max-waiting is {args.max_waiting}, wanted a number from 0")
    try:
        from ...serve import server
        from ...serve.backend import Backend
        from ...serve.engines import OwnEngine
    except ModuleNotFoundError as error:
        raise UsageError(MISSING) from error
    from ..choice import choose_model

    options = server.ServeOptions(
        args.host, args.port, args.api_key, args.insecure, args.cors, args.allow_host, args.log_requests
    )
    options.check()
    folder, said = choose_model(args.model, settings, yes=args.yes)
    if said:
        note(said)
    spawn_early()
    loading = {name: value for name, value in settings.session().items() if name != "system"}
    if not args.no_disk:
        loading["store"] = str(conversations_file())
    source = OwnEngine(EngineClient, {**loading, "model": str(folder)})
    backend = Backend(source, settings=settings.reply(), max_waiting=args.max_waiting)
    asyncio.run(server.serve_until_interrupted(source, server.Server(backend, options)))
    return 0
