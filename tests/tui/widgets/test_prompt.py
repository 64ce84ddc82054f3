"""The prompt: sending, history, search, completion, pastes, and what it leaves to the screen."""

from collections.abc import Awaitable, Callable

import pytest
from textual import events
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from qchat.tui.user.history import History
from qchat.tui.user.keymap import Keymap
from qchat.tui.user.pastes import Pastes
from qchat.tui.user.themes import extra_defaults
from qchat.tui.widgets.completion import Candidate, Completion
from qchat.tui.widgets.prompt import Prompt, Sources
from tests.paths import ROOT
from tests.run_async import run_async
from tests.tui.running_app import quick_keys

__all__ = ["quick_keys"]
pytestmark = pytest.mark.usefixtures("quick_keys")

CSS = ROOT / "themes" / "app.tcss"
COMMANDS = ("/help", "/history [preserve|strip]", "/retry [temp=…]", "/system TEXT")


def candidates(before: str) -> list[Candidate]:
    if before.startswith("@"):
        return [Candidate(f"@{name}", name) for name in ("notes.md", "src/") if name.startswith(before[1:])]
    if not before.startswith("/") or " " in before:
        return []
    return [_command(usage) for usage in COMMANDS if usage.startswith(before)]


def _command(usage: str) -> Candidate:
    name, _, argument = usage.partition(" ")
    return Candidate(name + " " * bool(argument), usage, ready=not argument or argument.startswith("["))


class Typing(App[None]):
    CSS_PATH = CSS

    def __init__(self, history: History):
        super().__init__()
        self.sent: list[str] = []
        self.asked: list[str] = []
        self.queue: list[str] = []
        self.popup = Completion()
        sources = Sources(candidates, lambda text: " [N]" if text == "/edit" else "", self._recall)
        self.prompt = Prompt(Keymap(), history, self.popup, sources)

    def _recall(self) -> str | None:
        return self.queue.pop() if self.queue else None

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return extra_defaults()

    def compose(self) -> ComposeResult:
        yield self.popup
        yield self.prompt

    def on_mount(self) -> None:
        self.prompt.focus()

    def on_prompt_submitted(self, event: Prompt.Submitted) -> None:
        self.sent.append(event.text)

    def on_prompt_asked(self, event: Prompt.Asked) -> None:
        self.asked.append(event.action)


def typing(check: Callable[[Typing, Pilot], Awaitable[None]], *earlier: str) -> None:
    """Run `check` on a prompt whose history has `earlier` prompts in it."""
    history = History()
    for text in earlier:
        history.add(text)

    async def main() -> None:
        app = Typing(history)
        async with app.run_test(size=(80, 24)) as pilot:
            await check(app, pilot)

    run_async(main())


async def paste(app: Typing, pilot: Pilot, text: str) -> None:
    app.prompt.post_message(events.Paste(text))
    await pilot.pause()


def test_enter_sends_and_empties_the_prompt():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press(*"hi", "enter")
        assert (app.sent, app.prompt.text) == (["hi"], "")

    typing(check)


@pytest.mark.parametrize("key", ["ctrl+j", "shift+enter", "alt+enter"])
def test_new_lines_have_keys_of_their_own(key: str):
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press("a", key, "b", "enter")
        assert app.sent == ["a\nb"]

    typing(check)


def test_a_backslash_before_enter_is_a_new_line():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press("a", "\\", "enter", "b")
        assert (app.sent, app.prompt.text) == ([], "a\nb")

    typing(check)


def test_an_empty_enter_is_the_screens():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press("space", "enter")
        assert (app.sent, app.asked) == ([], ["send"])

    typing(check)


def test_while_held_a_draft_stays_and_commands_go():
    async def check(app: Typing, pilot: Pilot) -> None:
        app.prompt.held = True
        await pilot.press("a", "enter")
        assert (app.sent, app.asked, app.prompt.text) == ([], ["send"], "a")
        app.prompt.put("/help")
        await pilot.press("enter")
        assert app.sent == ["/help"]

    typing(check)


def test_the_prompt_grows_to_ten_rows_and_shrinks_again():
    async def check(app: Typing, pilot: Pilot) -> None:
        heights = []
        for _ in range(12):
            heights.append(app.prompt.size.height)
            await pilot.press("ctrl+j")
            await pilot.pause()
        assert heights == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10]
        await pilot.press("a", "enter")
        await pilot.pause()
        assert app.prompt.size.height == 1

    typing(check)


def test_a_question_mark_asks_for_the_keys_only_when_nothing_is_typed():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press("question_mark")
        assert (app.asked, app.prompt.text) == (["keys"], "")
        await pilot.press("a", "question_mark")
        assert (app.asked, app.prompt.text) == (["keys"], "a?")

    typing(check)


# --- history ---


def test_up_and_down_walk_through_earlier_prompts_and_keep_the_draft():
    async def check(app: Typing, pilot: Pilot) -> None:
        seen = []
        await pilot.press(*"draft")
        for key in ("up", "up", "up", "down", "down"):
            await pilot.press(key)
            seen.append(app.prompt.text)
        assert seen == ["two\nlines", "one", "one", "two\nlines", "draft"]

    typing(check, "one", "two\nlines")


def test_in_a_changed_earlier_prompt_up_moves_the_cursor_first():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press("up", "x", "up")
        assert app.prompt.text == "two\nlinesx"
        await pilot.press("up")
        assert app.prompt.text == "one"

    typing(check, "one", "two\nlines")


def test_up_takes_back_what_is_queued_before_the_history():
    async def check(app: Typing, pilot: Pilot) -> None:
        app.queue = ["queued"]
        await pilot.press("up")
        assert (app.prompt.text, app.queue) == ("queued", [])

    typing(check, "one")


def test_what_is_sent_and_what_is_cleared_is_found_again():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press("a", "enter", "b")
        app.prompt.clear_draft()
        await pilot.press("up")
        assert app.prompt.text == "b"
        await pilot.press("up")
        assert app.prompt.text == "a"

    typing(check)


def test_searching_backwards_finds_takes_and_leaves():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press(*"draft", "ctrl+r")
        app.prompt.text = ""
        await pilot.press(*"par")
        assert [candidate.text for candidate in app.popup.candidates] == ["Paris?", "parse it"]
        await pilot.press("ctrl+r", "enter")
        assert (app.prompt.text, app.sent, app.popup.open) == ("parse it", [], False)
        await pilot.press("ctrl+r")
        assert app.prompt.escape()
        assert (app.prompt.text, app.prompt.searching) == ("parse it", False)

    typing(check, "parse it", "Rome?", "Paris?")


# --- completion ---


def test_commands_are_listed_while_their_name_is_typed():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press("/", "h")
        assert [candidate.shown for candidate in app.popup.candidates] == [
            "/help",
            "/history [preserve|strip]",
        ]
        assert app.popup.display
        assert app.prompt.escape()
        assert not app.popup.display
        assert app.prompt.text == "/h"

    typing(check)


@pytest.mark.parametrize(
    ("keys", "sent", "left"),
    [
        (["/", "h", "enter"], ["/help"], ""),
        (["/", "h", "down", "enter"], ["/history "], ""),
        (["/", "h", "up", "up", "enter"], ["/help"], ""),
        ([*"/sys", "enter"], [], "/system "),
        ([*"/ret", "tab"], [], "/retry "),
        ([*"/ret", "tab", *"top_k=1", "enter"], ["/retry top_k=1"], ""),
        ([*"/unknown", "enter"], ["/unknown"], ""),
        ([*"@no", "tab"], [], "@notes.md"),
        ([*"@no", "enter"], ["@no"], ""),
        ([*"@n", "tab", *" ok", "enter"], ["@notes.md ok"], ""),
    ],
)
def test_tab_completes_and_enter_sends_what_stands_alone(keys: list[str], sent: list[str], left: str):
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press(*keys)
        assert (app.sent, app.prompt.text) == (sent, left)

    typing(check)


def test_a_hint_is_shown_and_never_becomes_text():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press(*"/edit")
        assert app.prompt.suggestion == " [N]"
        await pilot.press("right", "end", "enter")
        assert app.sent == ["/edit"]

    typing(check)


def test_a_recalled_command_opens_no_list():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press("up")
        assert (app.prompt.text, app.popup.open) == ("/help", False)

    typing(check, "/help")


def test_tab_queues_while_busy_and_does_nothing_otherwise():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press("a", "tab")
        assert (app.sent, app.prompt.text) == ([], "a")
        app.prompt.busy = True
        await pilot.press("tab")
        assert app.sent == ["a"]

    typing(check)


# --- pastes ---


def test_a_long_paste_is_folded_and_sent_whole():
    text = "\n".join(f"line {n}" for n in range(312))

    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press(*"see ")
        await paste(app, pilot, text.replace("\n", "\r\n"))
        assert app.prompt.text == "see [pasted 312 lines]"
        await pilot.press("!", "enter")
        assert app.sent == [f"see {text}!"]

    typing(check)


def test_what_is_put_into_the_prompt_reaches_the_screen_without_control_characters():
    """Questions that were imported, or that an editor left, come this way."""

    async def check(app: Typing, pilot: Pilot) -> None:
        app.prompt.put("hi \x1b]0;owned\x07 \x9b31m\nthere")
        await pilot.pause()
        assert not {"\x1b", "\x07", "\x9b"} & set(app.prompt.text)
        assert app.prompt.text.endswith("\nthere")

    typing(check)


def test_a_short_paste_is_text_without_control_characters():
    async def check(app: Typing, pilot: Pilot) -> None:
        await paste(app, pilot, "two\rlines\x1b[31m\x07")
        assert app.prompt.text == "two\nlines"

    typing(check)


def test_backspace_takes_a_folded_paste_as_a_whole():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press("a")
        await paste(app, pilot, "x" * 5000)
        assert app.prompt.text == "a[pasted 5,000 characters]"
        await pilot.press("backspace")
        assert app.prompt.text == "a"
        await pilot.press("backspace")
        assert app.prompt.text == ""

    typing(check)


def test_a_folded_paste_outlives_the_history():
    async def check(app: Typing, pilot: Pilot) -> None:
        await paste(app, pilot, "y\n" * 30)
        await pilot.press("enter", "up", "enter")
        assert app.sent == ["y\n" * 30] * 2

    typing(check)


def test_markers_are_told_apart_and_only_their_own_are_expanded():
    pastes = Pastes()
    one, other = pastes.fold("a\n" * 20), pastes.fold("b\n" * 20)
    assert (one, other) == ("[pasted 20 lines]", "[pasted 20 lines #2]")
    assert pastes.fold("a\n" * 20) == one
    assert (
        pastes.expand(f"{other} {one} [pasted 9 lines]")
        == "b\n" * 20 + " " + "a\n" * 20 + " [pasted 9 lines]"
    )
    assert pastes.expand(pastes.fold(f"{one}\n" * 20)) == f"{one}\n" * 20


def test_clearing_during_a_search_leaves_the_search_and_keeps_the_draft():
    async def check(app: Typing, pilot: Pilot) -> None:
        await pilot.press(*"draft", "ctrl+r", "x")
        app.prompt.clear_draft()
        assert (app.prompt.text, app.prompt.searching) == ("draft", False)

    typing(check, "one")
