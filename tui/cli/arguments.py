"""The arguments of `qchat` itself: one parser, the source of --help and of shell completion.

Every option that is a setting is named in the namespace as `settings.KEYS` names it. Imports nothing heavy.
"""

import argparse
from typing import Any

from .. import __version__
from ..tasks.parsers import Parser
from .verbs import VERBS

EFFORTS = ("none", "low", "medium", "high", "xhigh")


class HelpFormatter(argparse.HelpFormatter):
    """Wraps every paragraph by itself; lists, which are indented, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        paragraphs = text.split("\n\n")
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in paragraphs)


def parser() -> Parser:
    """Return the parser of everything but verbs."""
    verbs = "\n".join(f"  {verb:<11} {what}" for verb, what in VERBS.items())
    parser = Parser(
        prog="qchat",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        usage="qchat [MODEL] [WORDS ...] [options]\n       qchat COMMAND ...",
        description="Chat with a Qwen3.5 or Qwen3.6 model on this machine.\n\n"
        f"commands, described by `qchat help COMMAND`:\n{verbs}",
        epilog="At a terminal, a chat opens and WORDS are its first message. With -p or with text piped in, "
        "one prompt is answered: piped text comes first, then files, then the prompt. The answer goes to "
        "stdout, everything else to stderr.\n\n"
        "A name with a / in it is always a model's.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a model's folder, name or Hugging Face id (default: the last one used, or the small one "
        "in the package)",
    )
    parser.add_argument("words", nargs="*", type=_text, metavar="WORDS", help="the first message")
    parser.add_argument(
        "--version", action="version", version=f"qchat {__version__}", help="show the version and exit"
    )
    _add_input(parser.add_argument_group("input"))
    _add_tools(parser.add_argument_group("tools", "offered are those that the settings name"))
    _add_output(parser.add_argument_group("output"))
    _add_screen(parser.add_argument_group("chat"))
    _add_reply(parser.add_argument_group("reply"))
    _add_sampling(
        parser.add_argument_group("sampling", "defaults are those that the model's authors recommend")
    )
    _add_memory(parser.add_argument_group("memory"))
    _add_ranks(parser.add_argument_group("several processes or machines that share the model"))
    return parser


def _add_input(group: Any) -> None:
    group.add_argument("-p", "--prompt", type=_text, metavar="TEXT", help="answer TEXT, then end")
    group.add_argument(
        "-f",
        "--file",
        dest="files",
        action="append",
        metavar="FILE",
        help="add a text file or picture; may be repeated",
    )
    group.add_argument("-s", "--system", type=_text, metavar="TEXT", help="the system prompt")
    group.add_argument(
        "--persona", type=_text, metavar="NAME", help="take over the system prompt and settings of a persona"
    )
    group.add_argument(
        "--yes", action="store_true", help="download a model that is not on this machine without asking"
    )
    group.add_argument(
        "-c",
        "--continue",
        dest="session",
        action="store_const",
        const="latest",
        help="continue the last conversation",
    )
    group.add_argument(
        "--session", type=_text, metavar="ID", help="continue a conversation, given its number or title"
    )


def _add_tools(group: Any) -> None:
    group.add_argument(
        "--yes-tools",
        action="append",
        type=_text,
        default=[],
        metavar="NAME",
        help="let the answer to a prompt call the tool NAME without asking; may be repeated",
    )


def _add_output(group: Any) -> None:
    form = group.add_mutually_exclusive_group()
    form.set_defaults(form="text")
    form.add_argument(
        "--json",
        dest="form",
        action="store_const",
        const="json",
        help="print one JSON object: text, thinking, usage, timings, finish_reason, model",
    )
    form.add_argument(
        "--jsonl", dest="form", action="store_const", const="jsonl", help="print each event as a line of JSON"
    )
    form.add_argument(
        "-x",
        "--extract",
        nargs="?",
        const="",
        metavar="LANG",
        help="print only the first code block, or the first one in LANG",
    )
    group.add_argument("--show-thinking", action="store_const", const=True, help="show the model's thoughts")
    group.add_argument(
        "-u", "--stats", action="store_true", help="print token counts and speeds to stderr after each reply"
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but the answer and errors")


def _add_screen(group: Any) -> None:
    group.add_argument(
        "--plain", action="store_const", const=True, help="chat line by line instead of full-screen"
    )
    group.add_argument(
        "--screen-reader", action="store_const", const=True, help="the same, with words in place of drawings"
    )
    group.add_argument("--theme", metavar="NAME", help="colour theme; auto matches the terminal")
    group.add_argument(
        "-o",
        "--option",
        dest="options",
        action="append",
        type=_text,
        default=[],
        metavar="KEY=VALUE",
        help="any setting that `qchat config show` lists; may be repeated",
    )


def _add_reply(group: Any) -> None:
    group.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="think before answering, or answer at once",
    )
    group.add_argument("--effort", choices=EFFORTS, help="how much to think; none and low turn thinking off")
    group.add_argument("--thinking-budget", type=int, metavar="N", help="end each thought after N tokens")
    group.add_argument("--max-tokens", type=int, metavar="N", help="end the reply after N tokens (2048)")
    group.add_argument(
        "--stop",
        action="append",
        type=_text,
        metavar="TEXT",
        help="end the reply before TEXT; may be repeated",
    )
    group.add_argument(
        "--schema",
        type=_text,
        metavar="FILE",
        help="have the answer, after any thought, be JSON that satisfies the schema in FILE",
    )


def _add_sampling(group: Any) -> None:
    for name, kind, meaning in (
        ("temperature", float, "0 takes the most likely token"),
        ("top-p", float, "sample from the most likely tokens whose probabilities add up to X"),
        ("top-k", int, "sample from the N most likely tokens; 0 keeps all"),
        ("min-p", float, "drop tokens less likely than X times the most likely one"),
        ("repetition-penalty", float, "divide the logits of generated tokens by X; 1 has no effect"),
        ("presence-penalty", float, "subtract X from the logits of generated tokens"),
        ("frequency-penalty", float, "subtract X for each time a token was generated"),
        ("seed", int, "the same seed gives the same reply"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=meaning)


def _add_memory(group: Any) -> None:
    group.add_argument(
        "--history", choices=("preserve", "strip"), help="keep earlier thoughts in the context, or drop them"
    )
    group.add_argument("--context-limit", type=int, metavar="N", help="refuse contexts of more than N tokens")
    group.add_argument("--snapshot-budget", metavar="SIZE", help="memory for snapshots, such as '2 GB'")
    group.add_argument("--image-tokens", type=int, metavar="N", help="give a picture at most N tokens")
    group.add_argument("--kv-bits", type=int, choices=(8, 16), help="bits of each cached key and value (16)")


def _add_ranks(group: Any) -> None:
    shared = group.add_mutually_exclusive_group()
    shared.add_argument(
        "--ranks", type=int, metavar="N", help="share the model among N processes of this machine"
    )
    shared.add_argument(
        "--hostfile",
        type=_text,
        metavar="FILE",
        help="share it among the machines that FILE lists, a hostfile of mlx.launch whose first host is this "
        "machine; for a single prompt run mlx.launch -n N -- qchat MODEL -p TEXT",
    )


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not valid UTF-8") from None
    return value
