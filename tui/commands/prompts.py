"""Prompt templates: listed, filled in, and written in the user's editor."""

from typing import TYPE_CHECKING

from ...core.errors import QchatError
from ..tasks.words import words
from ..text.report import Lines, Report, Table
from ..text.sanitise import printable
from ..user.prompts import (
    check_name,
    fill,
    places,
    prompt_files,
    prompts_dir,
    read_prompt,
    save_prompt,
    wants_words,
)
from .base import Command, Front, first_words, starting

if TYPE_CHECKING:
    from ..chat.controller import Chat

EDIT = "edit"
BEGINNING = "Write the prompt here. $1 to $9 are words that follow its name, $ARGUMENTS all of them.\n"


class Prompts(Command):
    """Fill in a prompt template with WORDS and put it into the prompt; edit writes one; alone list them.

    Templates are the text files NAME.md in the folder `prompts` of the settings. In them $1 to $9 are the
    words, $ARGUMENTS all of them, and $$ a dollar sign.
    """

    names = ("prompts",)
    usage = "[NAME [WORDS] | edit NAME]"
    while_busy = True

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        del chat
        word, space, name = argument.partition(" ")
        if space and word == EDIT:
            return [f"{EDIT} {one}" for one in starting(name, list(prompt_files()))]
        return [] if space else starting(argument, [*prompt_files(), EDIT])

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        name, _, rest = argument.partition(" ")
        rest = rest.strip()
        if not name:
            front.report(prompts_report())
        elif name == EDIT:
            await self._edit(front, check_name(rest, "prompt"))
        else:
            template = read_prompt(name)
            text = printable(fill(template, rest, words(rest) if wants_words(template) else ()))
            if front.can_edit:
                front.put_prompt(text)
            else:
                await chat.send(text)

    async def _edit(self, front: Front, name: str) -> None:
        before = read_prompt(name) if name in prompt_files() else BEGINNING
        text = await front.edit_text(before)
        if text is None or not text.strip() or text.strip() == before.strip():
            front.note("nothing was changed")
            return
        front.note(f"written to {save_prompt(name, text)}")


def prompts_report() -> Report:
    """Return the templates with what they ask for, and how they begin."""
    rows = []
    for name in prompt_files():
        try:
            text = read_prompt(name)
        except QchatError as error:
            rows.append((name, "", str(error)))
        else:
            rows.append((name, " ".join(places(text)), first_words(text, 80)))
    folder = f"/prompts NAME WORDS fills one in, /prompts edit NAME writes one; they are in {prompts_dir()}"
    table = [Table(("prompt", "takes", "text"), rows)] if rows else [Lines(("there is none yet",))]
    return Report("Prompts", (*table, Lines((folder,), "dim")))
