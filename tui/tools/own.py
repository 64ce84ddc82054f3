"""The four tools of qchat's own, each with its bounds; all are off until the user names them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import files
from .base import Asking, Tool, ToolError, check_arguments
from .calculate import evaluate
from .processes import run_program

SHELL_SECONDS, MAX_SHELL_SECONDS = 60, 600
TEXT, NUMBER = {"type": "string"}, {"type": "integer"}


def own_tools(folder: Path) -> dict[str, Tool]:
    """Return the tools by name; files and commands are those of the working `folder`."""

    async def read_file(given: Mapping[str, Any]) -> str:
        count = given.get("lines", files.MAX_LINES)
        return files.read_lines(given["path"], folder, given.get("first_line", 1), count)

    async def find_files(given: Mapping[str, Any]) -> str:
        return await files.find(
            folder, given.get("folder", "."), given.get("glob", ""), given.get("text", "")
        )

    async def shell(given: Mapping[str, Any]) -> str:
        return await run_command(given["command"], folder, given.get("seconds", SHELL_SECONDS))

    async def calculate(given: Mapping[str, Any]) -> str:
        return str(evaluate(given["expression"]))

    tools = (
        _tool(
            read_file,
            "Read a text file below the working folder.",
            {
                "path": TEXT | {"description": "relative to the working folder"},
                "first_line": NUMBER | {"description": "where to begin, from 1"},
                "lines": NUMBER | {"description": f"how many, at most {files.MAX_LINES}"},
            },
            required=("path",),
        ),
        _tool(
            find_files,
            "List the files below the working folder, or search them for a text.",
            {
                "folder": TEXT | {"description": "where to look, relative to the working folder"},
                "glob": TEXT | {"description": "a pattern for names, such as *.py"},
                "text": TEXT | {"description": "the text to find; without it files are listed"},
            },
        ),
        _tool(
            shell,
            "Run a shell command in the working folder. The user is asked first.",
            {
                "command": TEXT,
                "seconds": NUMBER | {"description": f"the longest it may take, {SHELL_SECONDS} by default"},
            },
            required=("command",),
            asks="always",
        ),
        _tool(
            calculate,
            "Evaluate an arithmetic expression, such as sqrt(2) * 3**4.",
            {"expression": TEXT},
            required=("expression",),
            asks="never",
        ),
    )
    return {tool.name: tool for tool in tools}


def _tool(
    run: Any,
    description: str,
    properties: Mapping[str, Any],
    *,
    required: tuple[str, ...] = (),
    asks: Asking = "until allowed",
) -> Tool:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }

    async def checked(arguments: Mapping[str, Any]) -> str:
        check_arguments(parameters, arguments)
        return await run(arguments)

    name = run.__name__
    return Tool(name, description, parameters, checked, asks, key=f"qchat/{name}")


async def run_command(command: str, folder: Path, seconds: int) -> str:
    """Run a command by the shell; return its output and how it ended. Raises ToolError."""
    if not 1 <= seconds <= MAX_SHELL_SECONDS:
        raise ToolError(f"seconds is {seconds}, wanted 1 to {MAX_SHELL_SECONDS}")
    try:
        done = await run_program(("/bin/sh", "-c", command), folder, seconds)
    except (OSError, ValueError) as error:
        raise ToolError(f"the command could not be started: {error}") from None
    if done.code is None:
        ending = f"[killed: it took longer than {seconds} s]"
    else:
        ending = f"[exit code {done.code}]" if done.code else ""
    return "\n".join(part for part in (done.output.rstrip("\n"), ending) if part)
