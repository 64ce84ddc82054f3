"""Personas: a system prompt and settings of replies that are put on together, and off again."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...core.errors import QchatError, UsageError
from ..text.report import Lines, Report, Table
from ..user.personas import PERSONAL, persona_files, personas_dir, read_persona, save_persona
from ..user.prompts import check_name
from .base import Command, Front, first_words, starting
from .parameters import format_value, take_effect

if TYPE_CHECKING:
    from ..chat.controller import Chat

OFF, SAVE = "off", "save"


class Persona(Command):
    """Take over the system prompt and the settings of a persona; off ends it; save keeps the present ones.

    Personas are the files NAME.toml in the folder `personas` of the settings, with `system = "..."` and
    settings of replies, such as `temperature = 0.3`. Without NAME they are listed.
    """

    names = ("persona",)
    usage = "[NAME|off|save NAME]"

    def runs_at_once(self, argument: str) -> bool:
        return argument.partition(" ")[0] in ("", SAVE)

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        del chat
        word, space, name = argument.partition(" ")
        if space:
            return [f"{SAVE} {one}" for one in starting(name, list(persona_files())) if word == SAVE]
        return starting(argument, [*persona_files(), OFF, SAVE])

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        name, _, rest = argument.partition(" ")
        if not name:
            front.report(personas_report(chat))
        elif name == SAVE:
            await self._save(chat, front, check_name(rest.strip(), "persona"))
        elif rest:
            raise self.wrong(f"{argument!r:.60} is no persona")
        elif name == OFF:
            if not chat.settings.persona:
                raise UsageError("no persona is on")
            await wear(chat, front, "", {})
            front.note("the persona is off; system prompt and settings are those from before")
        else:
            values = read_persona(name)
            await wear(chat, front, name, values)
            front.note(
                f"the persona {name} is on from the next question: {', '.join(values) or 'it sets nothing'}"
            )

    async def _save(self, chat: "Chat", front: Front, name: str) -> None:
        if name in (OFF, SAVE):
            raise UsageError(f"{name} cannot be the name of a persona: /persona {name} means something else")
        if not any(chat.settings.given(key) for key in PERSONAL):
            raise UsageError(
                "there is nothing to save: set a system prompt with /system, or a setting with /set"
            )
        taken = persona_files().get(name)
        if taken and not await front.confirm(f"{taken} exists already. Replace it?"):
            front.note("nothing was written")
            return
        front.note(f"written to {save_persona(name, chat.settings)}")


async def wear(chat: "Chat", front: Front, name: str, values: Mapping[str, Any]) -> None:
    """Put a persona on in place of the one before, if any; an empty name puts that one off.

    Raises QchatError, and then changes nothing more.
    """
    settings = chat.settings
    before = settings.before_persona()
    after = {key: setting.value for key, setting in before.items()} | dict(values)
    under = before | {key: settings.setting(key) for key in values if key not in before}
    for key in PERSONAL:
        if (
            key in after
            and after[key] != settings[key]
            and (chat.model is not None or key == "show_thinking")
        ):
            await take_effect(chat, front, key, after[key])
    settings.put_on(name, values, under)
    front.status(chat.status)


def personas_report(chat: "Chat") -> Report:
    """Return the personas with their settings; the one that is on is marked."""
    rows = []
    for name in persona_files():
        mark = "●" if name == chat.settings.persona else ""
        try:
            values = read_persona(name)
        except QchatError as error:
            rows.append((mark, name, "", str(error)))
            continue
        given = [f"{key} {format_value(value)}" for key, value in values.items() if key != "system"]
        rows.append(
            (mark, name, first_words(" · ".join(given), 60), first_words(values.get("system") or "", 80))
        )
    how = f"/persona NAME puts one on, /persona save NAME keeps the present settings in {personas_dir()}"
    table = (
        [Table(("", "persona", "settings", "system prompt"), rows)]
        if rows
        else [Lines(("there is none yet",))]
    )
    return Report("Personas", (*table, Lines((how,), "dim")))
