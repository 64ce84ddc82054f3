"""Print a script that completes qchat's words in bash, zsh or fish. Add one line to the shell's own file:
bash: `eval "$(qchat completion bash)"`, zsh: `eval "$(qchat completion zsh)"`,
fish: `qchat completion fish | source`."""

import argparse
import sys

from ...text.output import write

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that runs the script")


def run(args: argparse.Namespace) -> int:
    """Print the script; returns the exit code."""
    from argcomplete.shell_integration import shellcode

    write(sys.stdout, shellcode(["qchat"], shell=args.shell).lstrip() + "\n")
    return 0
