"""The app on a scripted engine: saying, stopping, queueing, keys, screens, death and the ways out."""

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest
from textual import events
from textual.widgets import OptionList

from qchat.core import Store
from qchat.tui.commands import COMMANDS
from qchat.tui.user import clipboard, editor
from qchat.tui.user.history import History
from tests.run_async import run_async
from tests.tui.running_app import ENDLESS, PLAY_SECONDS, Running, chatting, quick_keys, running

__all__ = ["quick_keys"]
pytestmark = pytest.mark.usefixtures("quick_keys")


def test_what_is_typed_is_answered_and_the_row_rests_again(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "thought": "Hm.", "answer": "Paris."})
    async def check(it: Running) -> None:
        await it.pilot.press(*"hi", "enter")
        await it.until(lambda: it.chat.state.turns)
        await it.idle()
        assert it.chat.state.turns[0].answer == "Paris."
        row = it.screen.status_row.render_line(0).text
        assert "ready" in row
        assert "last 25.0 tok/s" in row
        assert "fake" in it.screen.header.render_line(0).text
        assert "Paris." in "".join(it.screen.transcript.render_line(y).text for y in range(20))


def test_what_is_typed_while_the_model_loads_is_sent_then(tmp_path: Path):
    async def main() -> None:
        load = {
            "method": "load",
            "seconds": 0.1,
            "events": [{"event": "load", "done_nbytes": 1, "total_nbytes": 9, "detail": "layers"}] * 4,
        }
        async with running(tmp_path, load) as it:
            await it.until(lambda: it.phase == "loading")
            await it.say("early")
            await it.until(lambda: it.chat.queue == ["early"] and it.screen.queued.display)
            await it.until(lambda: "early" in it.screen.queued.render_line(0).text)
            await it.until(lambda: it.chat.state.turns)
            await it.idle()
            assert it.engine.asked("send")[0]["text"] == "early"
            assert not it.screen.queued.display

    run_async(main(), PLAY_SECONDS)


def test_a_reply_ends_with_its_figures_where_they_are_wanted(tmp_path: Path):
    @chatting(tmp_path, stats=True)
    async def check(it: Running) -> None:
        await it.ask("one")
        told = [text for _, text in it.said if "generated" in text]
        assert told == [
            "20 prompt tokens (10 reused) · first token after 0.50 s · "
            "2 generated (0 thinking) at 25.0/s · 6.44 GB at peak"
        ]
        await it.say("/set quiet")
        await it.ask("two")
        await it.say("/set verbose")
        await it.ask("three")
        assert len([text for _, text in it.said if "generated" in text]) == 2


def test_copying_on_selection_is_set_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        copied: list[str] = []
        monkeypatch.setattr(it.front, "copy", lambda text: copied.append(text) or "copied")
        monkeypatch.setattr(it.screen, "get_selected_text", lambda: "chosen")
        it.screen.on_text_selected()
        await it.say("/set copy_on_select off")
        await it.until(lambda: not it.chat.settings["copy_on_select"])
        it.screen.on_text_selected()
        assert copied == ["chosen"]


def test_the_first_words_of_the_command_line_are_sent(tmp_path: Path):
    async def main() -> None:
        async with running(tmp_path, text="first words") as it:
            await it.until(lambda: it.chat.state.turns)
            assert it.chat.state.turns[0].question == "first words"

    run_async(main(), PLAY_SECONDS)


def test_a_queued_message_comes_back_with_up(tmp_path: Path):
    @chatting(tmp_path, ENDLESS)
    async def check(it: Running) -> None:
        await it.say("one")
        await it.until(lambda: it.phase == "thinking")
        await it.pilot.press(*"two", "tab")
        await it.until(lambda: it.chat.queue == ["two"] and it.screen.queued.display)
        await it.pilot.press("up")
        await it.until(lambda: not it.chat.queue and not it.screen.queued.display)
        assert it.prompt.text == "two"


async def let_undo_wait(it: Running) -> None:
    """Ask, and give a command that waits for the endless reply."""
    await it.say("one")
    await it.until(lambda: it.phase == "answering")
    await it.say("/undo")
    await it.until(lambda: it.chat.queue == ["/undo"])


def test_a_queued_command_is_shown_comes_back_with_up_and_is_done_after_the_reply(tmp_path: Path):
    @chatting(tmp_path, ENDLESS)
    async def check(it: Running) -> None:
        await it.say("one")
        await it.until(lambda: it.phase == "answering")
        for line in ("/new", "/undo"):
            await it.say(line)
        await it.until(lambda: it.chat.queue == ["/new", "/undo"] and it.screen.queued.display)
        await it.until(lambda: "queued 2 · ↑ edit  /undo" in it.screen.queued.render_line(0).text)
        await it.pilot.press("up")
        await it.until(lambda: it.chat.queue == ["/new"])
        assert it.prompt.text == "/undo"
        await it.pilot.press("escape")
        await it.until(lambda: not it.chat.state.turns and not it.chat.queue)
        assert it.said == []


def test_what_a_queued_command_puts_into_the_prompt_does_not_replace_what_is_typed(tmp_path: Path):
    @chatting(tmp_path, ENDLESS)
    async def check(it: Running) -> None:
        await let_undo_wait(it)
        it.prompt.put("half a sen")
        await it.pilot.press("ctrl+c")  # stops the reply
        await it.until(lambda: not it.chat.state.turns and not it.chat.busy)
        await it.until(lambda: "it is in the history" in it.keys)
        assert it.prompt.text == "half a sen"


def test_what_a_queued_command_gives_back_does_not_slip_in_between_two_lines(tmp_path: Path):
    """The prompt is empty for a moment, between one line and the next."""

    @chatting(tmp_path, ENDLESS)
    async def check(it: Running) -> None:
        await let_undo_wait(it)
        await it.pilot.press(*"/stop", "enter")
        await it.until(lambda: "it is in the history" in it.keys)
        assert it.prompt.text == "" and not it.chat.state.turns
        await it.pilot.press("up")
        assert it.prompt.text == "one"


def test_a_long_paste_says_what_it_costs(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        it.prompt.post_message(events.Paste("four" * 1_000 + "\n" * 20))
        await it.until(lambda: "pasted 20 lines · about 1.0k tokens" in it.keys)
        assert it.prompt.text == "[pasted 20 lines]"


def test_escape_stops_the_reply_and_keeps_what_was_said(tmp_path: Path):
    @chatting(tmp_path, ENDLESS)
    async def check(it: Running) -> None:
        await it.say("one")
        await it.until(lambda: it.phase == "answering")
        assert "esc stop" in it.keys
        await it.pilot.press("escape")
        await it.idle()
        assert it.chat.state.turns[0].finish_reason == "cancelled"
        assert "enter send" in it.keys


def test_escape_closes_the_list_first_then_stops(tmp_path: Path):
    @chatting(tmp_path, ENDLESS)
    async def check(it: Running) -> None:
        await it.say("one")
        await it.until(lambda: it.phase == "thinking")
        await it.pilot.press("/")
        assert it.screen.completion.open
        await it.pilot.press("escape")
        assert not it.screen.completion.open
        assert it.chat.busy
        await it.pilot.press("escape")
        await it.idle()


def test_escape_twice_when_idle_goes_back_to_a_question(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.pilot.press("escape")
        assert it.app.screen is it.screen
        await it.pilot.press("escape")
        await it.pilot.pause()
        assert it.app.screen is not it.screen
        await it.pilot.press("escape")
        assert it.app.screen is it.screen


def test_the_wrap_up_key_closes_the_thought_and_is_redo_otherwise(tmp_path: Path):
    @chatting(tmp_path, ENDLESS)
    async def check(it: Running) -> None:
        await it.pilot.press("ctrl+y")
        assert not it.engine.asked("close_thought")
        await it.say("one")
        await it.until(lambda: it.phase == "thinking")
        assert "ctrl+y answer now" in it.keys
        await it.pilot.press("ctrl+y")
        await it.until(lambda: it.engine.asked("close_thought"))


def test_interrupt_stops_then_clears_then_asks_twice(tmp_path: Path):
    @chatting(tmp_path, ENDLESS)
    async def check(it: Running) -> None:
        await it.say("one")
        await it.until(lambda: it.phase == "answering")
        it.prompt.put("draft")
        await it.pilot.press("ctrl+c")
        await it.idle()
        assert it.prompt.text == "draft"
        await it.pilot.press("ctrl+c")
        assert it.prompt.text == ""
        await it.pilot.press("ctrl+c")
        assert "ctrl+c again quits" in it.keys
        await it.pilot.press("up")
        assert it.prompt.text == "draft"
        it.prompt.put("")
        await it.pilot.press("ctrl+c")
        await it.until(lambda: it.app.return_value == "shell")


def test_interrupt_copies_a_selection_and_says_how(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(clipboard, "_program", lambda: ["true"])

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        it.prompt.put("draft")
        it.prompt.select_all()
        await it.pilot.press("ctrl+c")
        assert "copied 5 characters" in it.keys
        assert it.prompt.text == "draft"


def test_ctrl_d_deletes_in_a_text_and_leaves_an_empty_prompt(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        it.prompt.put("ab")
        await it.pilot.press("home", "ctrl+d")
        await it.until(lambda: it.prompt.text == "b")
        await it.pilot.press("ctrl+d")
        await it.until(lambda: not it.prompt.text)
        await it.pilot.press("ctrl+d")
        await it.until(lambda: it.app.return_value == "shell")


def test_leaving_ends_the_engine_and_keeps_the_draft(tmp_path: Path):
    history = History()

    @chatting(tmp_path, history=history)
    async def check(it: Running) -> None:
        it.prompt.put("unsent")
        client = it.chat.client
        await it.pilot.press("ctrl+q")
        await it.until(lambda: it.app.return_value == "shell")
        assert history.entries[-1] == "unsent"
        assert client is not None
        assert not client.alive


# --- the engine's death ---


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["reading", "answering"])
def test_after_the_engines_death_all_stays_and_enter_begins_another(tmp_path: Path, phase: str):
    steps: dict[str, Any] = {"method": "send", "die": "SIGKILL"}
    steps |= (
        {"events": [{"event": "prefill", "done": 1, "total": 9, "cached": 0}]} if phase == "reading" else {}
    )
    steps |= {"answer": "partial answer"} if phase == "answering" else {}

    @chatting(tmp_path, steps)
    async def check(it: Running) -> None:
        it.engine.write()
        await it.say("one")
        await it.until(lambda: it.phase == "dead")
        row = it.screen.status_row.render_line(0).text
        assert "engine stopped" in row
        assert "SIGKILL" in row
        told = [block.text for block in it.screen.transcript.blocks if "SIGKILL" in block.text]
        assert len(told) == 1 and told[0].endswith("nothing is lost")
        assert "enter restart" in it.keys
        await it.say("draft")
        assert it.prompt.text == "draft"
        shown = "".join(it.screen.transcript.render_line(y).text for y in range(20))
        assert ("partial answer" if phase == "answering" else "one") in shown
        await it.until(lambda: it.phase == "idle")
        assert it.prompt.text == "draft"


def test_a_dead_engine_can_begin_again_with_half_the_context(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "die": "SIGKILL", "answer": "partial"})
    async def check(it: Running) -> None:
        it.engine.write()
        await it.say("one")
        await it.until(lambda: it.phase == "dead")
        limit = it.chat.status.context_limit
        assert f"ctrl+y restart with a context of {limit // 2:,}" in it.keys
        await it.pilot.press("ctrl+y")
        await it.until(lambda: it.phase == "idle")
        assert it.engine.asked("load")[-1]["context_limit"] == limit // 2


def test_an_engine_that_cannot_load_is_a_sentence(tmp_path: Path):
    error = {"kind": "WeightsError", "message": "shard 2 is missing", "exit_code": 3}

    async def main() -> None:
        async with running(tmp_path, {"method": "load", "error": error}) as it:
            await it.until(lambda: it.said)
            assert it.said == [("error", "shard 2 is missing")]
            assert "no model" in it.screen.status_row.render_line(0).text

    run_async(main(), PLAY_SECONDS)


# --- commands, files, the editor ---


@pytest.mark.slow
def test_every_command_runs_in_the_app_without_an_internal_error(tmp_path: Path, monkeypatch):
    """A command may refuse in a sentence; nothing else may come of it."""
    monkeypatch.setattr(editor, "edit", lambda text: text)
    monkeypatch.setattr(clipboard, "_program", lambda: ["true"])
    monkeypatch.chdir(tmp_path)
    leaving = {"bye", "plain"}
    refusal = {"kind": "UsageError", "message": "not in a test", "exit_code": 2}
    jobs = ("convert", "calibrate", "eval", "bench", "compare", "inspect", "fetch")

    @chatting(tmp_path, *({"method": method, "error": refusal} for method in jobs))
    async def check(it: Running) -> None:
        await it.ask("one")
        for command in COMMANDS:
            if command.name not in leaving:
                await it.say(f"/{command.name}")
                await it.until(lambda: it.app.screen is not it.screen or it.is_at_rest())
                while it.app.screen is not it.screen:
                    await asyncio.sleep(0.05)  # as nobody closes what is not yet seen
                    it.app.screen.dismiss()
                    await it.pilot.pause()
                await it.until(it.is_at_rest)
        assert it.app._exception is None


@pytest.mark.slow
def test_an_unknown_command_is_a_sentence_and_never_sent(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.say("/hlep")
        await it.until(lambda: it.said)
        assert it.said[0][0] == "error"
        assert "/help" in it.said[0][1]
        assert not it.engine.asked("send")


def test_a_mentioned_file_goes_along_and_a_bad_one_gives_the_line_back(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("content")
    (tmp_path / "b.bin").write_bytes(b"\0")

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("see @a.txt")
        assert it.engine.asked("send")[0]["text"] == "see @a.txt\n\na.txt:\n```txt\ncontent\n```"
        await it.say("see @b.bin")
        await it.until(lambda: it.said)
        assert it.said == [("error", "b.bin cannot be attached: it is not a text file")]
        assert it.prompt.text == "see @b.bin"


def test_files_are_completed_after_an_at_sign(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("x")

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.pilot.press(*"see @no", "tab")
        assert it.prompt.text == "see @notes.md"


def test_the_palette_runs_the_same_commands(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.pilot.press("ctrl+p")
        await it.until(lambda: it.app.screen is not it.screen)
        await it.pilot.press(*"think")
        await it.until(lambda: it.app.screen.query_one(OptionList).option_count)
        await it.pilot.press("enter")
        await it.until(lambda: it.said)
        assert "thinking" in it.said[0][1]


def test_the_palette_lists_themes_and_settings_and_begins_what_needs_a_value(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.pilot.press("ctrl+p")
        await it.until(lambda: it.app.screen is not it.screen)
        await it.pilot.press(*"theme: day", "enter")
        await it.until(lambda: it.app.theme == "day" and it.app.screen is it.screen)
        await it.pilot.press("ctrl+p")
        await it.until(lambda: it.app.screen is not it.screen)
        await it.pilot.press(*"temperature", "enter")
        await it.until(lambda: it.app.screen is it.screen)
        assert it.prompt.text == "/set temperature "


@pytest.mark.parametrize("key", ["question_mark", "f1", "ctrl+s", "f2"])
def test_screens_have_keys_and_escape_leaves_them(tmp_path: Path, key: str):
    @chatting(tmp_path, store=Store(tmp_path / "conversations.db"))
    async def check(it: Running) -> None:
        await it.pilot.press(key)
        await it.until(lambda: it.app.screen is not it.screen)
        await it.pilot.press("escape")
        await it.until(lambda: it.app.screen is it.screen)
        assert it.app.focused is it.prompt


@pytest.mark.slow
def test_a_conversation_is_saved_while_a_reply_is_written_once_that_has_ended(tmp_path: Path):
    long = {"method": "send", "answer": "word " * 60, "seconds": 0.01}

    @chatting(
        tmp_path, {"method": "send", "answer": "Hello."}, long, store=Store(tmp_path / "conversations.db")
    )
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.say("two")
        await it.until(lambda: it.phase == "answering")
        await it.say("/save My talk")
        await it.until(lambda: any("saved as conversation" in text for _, text in it.said))
        assert it.chat.state.turns[1].answer.count("word") == 60
        assert len(it.engine.asked("save_state")) == 1


# --- thinking, finding, the conversation's own keys ---


def test_the_thinking_key_goes_through_off_a_budget_and_on(tmp_path: Path):
    @chatting(tmp_path, size=(120, 30))
    async def check(it: Running) -> None:
        seen = []
        for _ in range(3):
            await it.pilot.press("ctrl+t")
            it.screen.keybar.hush()
            seen.append(it.keys.split("ctrl+t ")[1].split()[0])
        assert seen == ["think:off", "think:1024", "think:on"]
        await it.ask("one")
        assert it.engine.asked("send")[0]["settings"]["enable_thinking"] is True


def test_a_letter_typed_in_the_conversation_goes_to_the_prompt(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.pilot.press("shift+tab")
        assert it.app.focused is it.screen.transcript
        await it.pilot.press("W")
        await it.until(lambda: it.app.focused is it.prompt)
        await it.until(lambda: it.prompt.text == "W")


def test_editing_from_the_conversation_puts_the_question_into_the_prompt(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.pilot.press("shift+tab", "e")
        await it.pilot.pause()
        assert it.prompt.text == "/edit 1 one"
        await it.pilot.press("!", "enter")
        await it.until(lambda: it.engine.asked("edit"))
        assert it.engine.asked("edit")[0]["text"] == "one!"


def test_retrying_keeps_both_answers_and_the_arrows_flip_them(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("one")
        first = it.chat.state.turns[0].node
        await it.pilot.press("shift+tab", "r")
        await it.until(lambda: it.engine.asked("retry"))
        await it.idle()
        assert it.chat.state.turns[0].node != first
        it.screen.transcript.focus()
        await it.pilot.press("left")
        await it.until(lambda: it.chat.state.turns[0].node == first)


def test_finding_counts_and_escape_returns_to_the_prompt(tmp_path: Path):
    @chatting(tmp_path, {"method": "send", "answer": "Paris and Paris."})
    async def check(it: Running) -> None:
        await it.ask("one")
        await it.pilot.press("ctrl+f", *"paris")
        assert "2 found" in it.keys
        await it.pilot.press("enter", "escape")
        assert not it.screen.find_bar.display
        assert it.app.focused is it.prompt


def test_a_remapped_key_works_and_the_bar_shows_it(tmp_path: Path):
    @chatting(tmp_path, keys={"thinking": "f8", "history.search": "f7"})
    async def check(it: Running) -> None:
        assert "f8 think:on" in it.keys
        await it.pilot.press("f8")
        assert it.chat.settings["think"] is False
        await it.pilot.press("f7")
        assert it.prompt.searching


# --- the window ---


def test_a_narrow_window_keeps_the_essentials(tmp_path: Path):
    @chatting(tmp_path, size=(60, 16))
    async def check(it: Running) -> None:
        await it.ask("one")
        assert it.keys.split() == ["enter", "send", "?", "keys"]
        assert it.prompt.region.bottom <= 16


def test_a_window_too_small_says_so_and_recovers(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.pilot.resize_terminal(30, 8)

        def shown() -> list[str | None]:
            return [widget.id for widget in it.screen.children if widget.display and widget.size.height]

        await it.until(lambda: shown() == ["too-small"])
        await it.pilot.resize_terminal(100, 30)
        await it.until(lambda: "too-small" not in shown() and it.prompt.size.height == 1)


def test_a_paste_reaches_the_engine_whole(tmp_path: Path):
    text = "\n".join(f"line {n}" for n in range(500))

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        it.prompt.post_message(events.Paste(text))
        await it.pilot.pause()
        assert it.prompt.text == "[pasted 500 lines]"
        await it.pilot.press("enter")
        await it.until(lambda: it.engine.asked("send"))
        assert it.engine.asked("send")[0]["text"] == text


def test_when_idle_no_timer_runs(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("one")
        await asyncio.sleep(0.3)
        gc.collect()
        painted = it.screen.status_row.painted
        await asyncio.sleep(0.6)
        assert it.screen.status_row.painted == painted
        assert not it.screen.status_row.ticker._active.is_set()


def test_a_new_conversation_begins_without_the_notes_of_the_one_before(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("one")
        it.front.note("about one")
        await it.pilot.press("ctrl+n")
        await it.until(lambda: not it.chat.state.turns)
        await it.idle()
        assert not it.screen.transcript.blocks


def test_the_header_counts_branches_from_one(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.ask("one")
        for _ in range(2):
            await it.say("/retry")
            await it.idle()
        await it.until(lambda: "branch 3/3" in it.screen.header.render_line(0).text)


def test_a_refused_message_comes_back_as_it_was_typed(tmp_path: Path, monkeypatch):
    (tmp_path / "notes.txt").write_text("long\n" * 50)
    monkeypatch.chdir(tmp_path)
    error = {"kind": "ContextLengthExceeded", "message": "too long", "exit_code": 4}

    @chatting(tmp_path, {"method": "send", "events": [], "error": error})
    async def check(it: Running) -> None:
        await it.say("what is in @notes.txt?")
        await it.until(lambda: it.prompt.text)
        assert "long\nlong" in it.engine.asked("send")[0]["text"]
        assert it.prompt.text == "what is in @notes.txt?"
