"""What a submitted line is, and every command through the controller with a scripted engine and front end."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qchat.core import Store
from qchat.core.conversation.summary import Branch, ConversationState, TurnStats
from qchat.core.errors import UsageError
from qchat.tui import commands
from qchat.tui.chat.turns import new_turn
from qchat.tui.commands import (
    BY_NAME,
    COMMANDS,
    completions,
    help_report,
    hint,
    markdown_table,
    parse,
    perform,
)
from qchat.tui.commands.conversation import turns_with_room
from qchat.tui.commands.settings import AT_START
from qchat.tui.text.report import Table, report_text
from qchat.tui.user.keymap import Keymap
from qchat.tui.user.paths import config_file
from qchat.tui.user.settings import KEYS
from tests.paths import ROOT
from tests.tui.chat_stage import ChatStage, at_rest, render
from tests.tui.fake_front import FakeFront

WANTED = [
    "help",
    "?",
    "model",
    "load",
    "models",
    "new",
    "clear",
    "retry",
    "regen",
    "edit",
    "editor",
    "undo",
    "fork",
    "switch",
    "rewind",
    "think",
    "thinking",
    "effort",
    "budget",
    "history",
    "copy",
    "read",
    "system",
    "set",
    "show",
    "stats",
    "status",
    "tokens",
    "usage",
    "cache",
    "sessions",
    "resume",
    "chat",
    "continue",
    "rename",
    "save",
    "export",
    "import",
    "find",
    "compact",
    "convert",
    "calibrate",
    "eval",
    "bench",
    "compare",
    "inspect",
    "theme",
    "keys",
    "mouse",
    "plain",
    "log",
    "about",
    "bye",
    "exit",
    "quit",
    "stop",
]
CAPITALS = ("What is the capital of France?", "And of Germany?")
CODE = "Two ways:\n\n```python\nprint(1)\n```\n\nand\n\n~~~\nplain\n~~~\n"


def fakes(answer: str = "Paris.") -> dict[str, Any]:
    return {"method": "send", "answer": answer, "thought": "hm"}


# --- lines ---


def test_every_command_of_the_design_is_there():
    assert set(WANTED) <= BY_NAME.keys()


def test_no_name_means_two_commands():
    names = [name for command in COMMANDS for name in command.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_explains_itself_in_one_line_of_the_table(command):
    assert command.help.endswith((".", "…")) and len(command.help) <= 110
    assert f"/{command.name}" in report_text(help_report())
    assert f"`/{command.name}" in markdown_table()
    assert f"/{command.name}" in report_text(command.page())


def test_every_name_is_in_the_markdown_table():
    assert all(f"/{name}" in markdown_table() for name in BY_NAME)


@pytest.mark.parametrize("line", ["hello", " /new", "what is /new?", "", "a\n/new"])
def test_a_line_without_a_leading_slash_is_something_to_say(line):
    assert parse(line) == line


@pytest.mark.parametrize(
    ("line", "name", "argument"),
    [
        ("/new", "new", ""),
        ("/clear", "new", ""),
        ("/CLEAR", "new", ""),
        ("/?", "help", ""),
        ("/undo  ", "undo", ""),
        ("/set parameter temperature 0.7", "set", "parameter temperature 0.7"),
        ("/comp", "compact", None),
        ("/conv a b", "convert", "a b"),
        ("/system You\nare", "system", "You\nare"),
        ("exit", "bye", ""),
        ("quit", "bye", ""),
        ("/exit", "bye", ""),
    ],
)
def test_a_command_is_known_by_any_name_and_by_a_beginning_that_is_its_own(line, name, argument):
    if argument is None:
        with pytest.raises(UsageError, match="/compact, /compare"):
            parse(line)
        return
    command, given = parse(line)
    assert (command.name, given) == (name, argument)  # pyright: ignore


@pytest.mark.parametrize(("line", "near"), [("/nwe", "/new"), ("/retri", "/retry"), ("/zzzzzz", "/help")])
def test_an_unknown_command_is_refused_with_the_nearest(line, near):
    with pytest.raises(UsageError, match=re.escape(near)):
        parse(line)


def test_a_path_that_exists_is_something_to_say(tmp_path):
    line = f"{tmp_path} is what?"
    assert parse(line) == line
    with pytest.raises(UsageError):
        parse(f"{tmp_path}/absent is what?")


@given(st.text())
def test_any_line_is_text_a_command_or_one_sentence(line):
    try:
        found = parse(line)
    except UsageError as error:
        assert str(error)
    else:
        assert found == line or found[0] in COMMANDS


def test_an_unknown_command_never_reaches_the_model(tmp_path):
    stage = ChatStage(tmp_path)
    front = stage.play("/nonsense now", "/undo the last", "   ")
    assert not stage.fake.asked("send")
    assert len(front.all("error")) == 2
    assert "takes no words" in front.said


def test_completion_offers_commands_by_use_and_arguments_of_their_kind(tmp_path):
    stage = ChatStage(tmp_path)
    lines = [one.line for one in completions("/", stage.chat)]
    assert lines[:3] == ["/help ", "/model ", "/load "]
    assert [one.line for one in completions("/unu", stage.chat)] == []
    assert [one.line for one in completions("/und", stage.chat)] == ["/undo"]
    assert [one.line for one in completions("/think o", stage.chat)] == ["/think on", "/think off"]
    assert "/set parameter temperature" in [one.line for one in completions("/set parameter t", stage.chat)]
    assert "/set think off" in [one.line for one in completions("/set think o", stage.chat)]
    assert "/set history strip" in [one.line for one in completions("/set history ", stage.chat)]
    begun = [one.line for one in completions("/retry temperature=1 top", stage.chat)]
    assert begun == ["/retry temperature=1 top_p=", "/retry temperature=1 top_k="]
    assert completions("hello", stage.chat) == []


def test_completion_of_turns_begins_with_the_last(tmp_path):
    seen = []

    async def complete(stage: ChatStage) -> None:
        seen.extend(one.line for one in completions("/edit ", stage.chat))

    ChatStage(tmp_path).play(*CAPITALS, complete)
    assert seen == ["/edit 2", "/edit 1"]


def test_files_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("x")
    stage = ChatStage(tmp_path)
    assert "/read notes.md" in [one.line for one in completions("/read not", stage.chat)]
    assert "/read a notes.md" in [one.line for one in completions("/read a not", stage.chat)]
    assert "/system @notes.md" in [one.line for one in completions("/system @n", stage.chat)]


def test_the_hint_shows_what_may_follow():
    assert hint("/edit") == " [N] [TEXT]"
    assert hint("/edit ") == "[N] [TEXT]"
    assert hint("/edit 1") == hint("/undo") == hint("hello") == ""


# --- the conversation ---


def test_retry_passes_settings_for_one_reply(tmp_path):
    stage = ChatStage(tmp_path)
    front = stage.play(CAPITALS[0], "/retry temp=0.9 top_k=5", "/retry")
    assert stage.fake.asked("retry")[0]["settings"] == {"temperature": 0.9, "top_k": 5}
    assert stage.fake.asked("retry")[1]["settings"] == {}
    assert not front.all("error")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/retry temp=hot", "temperature is 'hot', wanted a number from 0 to 100"),
        ("/retry temp", "wanted SETTING=VALUE"),
        ("/retry temprature=1", "did you mean temperature"),
        ("/retry theme=dark", "is not a setting of replies"),
        ("/edit 5 new", "there is no question 5: this conversation has 1"),
        ("/edit x", "wanted its number: /edit [N] [TEXT]"),
        ("/fork 2", "there is no question 2: this conversation has 1"),
        ("/switch 99", "there is no reply 99"),
        ("/switch x", "wanted a whole number"),
        ("/think maybe", "wanted one of on, off"),
        ("/think onn", "on perhaps"),
        ("/effort huge", "wanted"),
        ("/budget -1", "wanted a whole number from 0"),
        ("/history keep", "preserve, strip"),
        ("/copy 3", "wanted a whole number from 1 to 1"),
        ("/copy code", "no code block"),
        ("/copy everything now", "cannot be copied: /copy"),
        ("/read", "say which files: /read"),
        ("/read absent.txt", "there is no such file"),
        ("/read *.nothing", "no file matches"),
        ("/read 'open", "cannot be told apart"),
        ("/read ~nosuchuser/x", "~nosuchuser/x cannot be read"),
        (f"/read {'n' * 300}", "cannot be read"),
        ("/convert embedded ~nosuchuser/x", "~nosuchuser/x is no path"),
        ("/compare 'open", "cannot be told apart"),
        ("/set temperature 101", "wanted a number from 0 to 100"),
        ("/set temperature", "wanted a number from 0 to 100"),
        ("/set temprature 1", "did you mean temperature"),
        ("/set parameter", "say which parameter: /set NAME VALUE"),
        ("/show everything", "wanted one of info"),
        ("/stats xml", "json"),
        ("/mouse maybe", "wanted on or off"),
        ("/mouse", "wanted on or off"),
        ("/theme nosuch", "wanted"),
        ("/help nosuch", "there is no command /nosuch"),
        ("/find", "say what to find: /find TEXT"),
        ("/rename", "say the new title: /rename TITLE"),
        ("/sessions 1", "not kept"),
        ("/export a.md", "not kept"),
        ("/compact", "nothing to summarise: 1 turn,"),
        ("/compact -1", "wanted a whole number from 0"),
        ("/compare a", "say which two models"),
        ("/convert", "say which model to convert: /convert MODEL"),
        ("/convert embedded --q-bits 4", "would change nothing without -q"),
        ("/convert embedded --frobnicate", "unrecognized arguments"),
        ("/bench --runs 0", "wanted 1 to 100"),
        ("/bench --runs x", "invalid int value"),
        ("/import", "say which file"),
    ],
)
def test_a_wrong_argument_is_one_sentence_with_what_is_right(tmp_path, line, sentence, monkeypatch):
    monkeypatch.chdir(tmp_path)
    front = ChatStage(tmp_path).play(CAPITALS[0], line)
    errors = front.all("error")
    assert len(errors) == 1
    assert sentence in errors[0]
    assert "\n" not in errors[0]


@pytest.mark.parametrize("line", ["/retry", "/edit", "/undo", "/fork", "/switch", "/rewind", "/copy"])
def test_without_a_question_there_is_nothing_to_go_back_to(tmp_path, line):
    errors = ChatStage(tmp_path).play(line).all("error")
    assert len(errors) == 1 and ("yet" in errors[0] or "no question" in errors[0])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_before_a_model_is_loaded_no_command_fails_but_with_a_sentence(tmp_path, command):
    stage = ChatStage(tmp_path, front=FakeFront(None, None, screens=True))
    stage.play(f"/{command.name}", load="")


def test_edit_asks_anew_with_text_or_with_the_editor(tmp_path):
    front = FakeFront("And of Spain?", None, "And of Spain? ")
    stage = ChatStage(tmp_path, front=front)
    stage.play(*CAPITALS, "/edit 1 And of Italy?", "/edit", "/edit 1", "/edit")
    asked = [(one["turn"], one["text"]) for one in stage.fake.asked("edit")]
    assert asked == [(1, "And of Italy?"), (1, "And of Spain?")]
    assert front.all("edit_text")[0] == "And of Italy?"
    assert "nothing changed" in front.said


def test_undo_returns_the_question_to_the_prompt(tmp_path):
    front = ChatStage(tmp_path).play(*CAPITALS, "/undo")
    assert front.all("put_prompt") == [CAPITALS[1]]
    assert front.all("rebuilt")[-1] == [CAPITALS[0]]


def test_fork_and_switch_move_between_branches(tmp_path):
    front = FakeFront("1", "4")
    stage = ChatStage(tmp_path, front=front)
    stage.play(*CAPITALS, "/fork", "And of Spain?", "/switch")
    assert [one["turn"] for one in stage.fake.asked("fork")] == [1]
    first, second = front.all("choose")
    assert [value for value, _ in first] == ["2", "1"]
    assert len(second) == 2 and any("(here)" in label for _, label in second)
    assert front.all("rebuilt")[-1] == list(CAPITALS)


def test_rewind_uses_the_screen_or_asks(tmp_path):
    assert ChatStage(tmp_path, front=FakeFront(screens=True)).play(CAPITALS[0], "/rewind").all("screen") == [
        "rewind"
    ]
    front = FakeFront("1", "Otherwise?")
    stage = ChatStage(tmp_path, front=front)
    stage.play(CAPITALS[0], "/rewind")
    assert stage.fake.asked("edit")[0]["text"] == "Otherwise?"


def test_new_begins_another_conversation(tmp_path):
    assert ChatStage(tmp_path).play(CAPITALS[0], "/new").all("rebuilt")[-1] == []


def test_compact_goes_on_from_a_summary_and_keeps_the_last_turns(tmp_path):
    stage = ChatStage(tmp_path, fakes(), fakes("Berlin."), fakes("Madrid."), fakes("Capitals were named."))
    seen: list[ConversationState] = []

    async def look(stage: ChatStage) -> None:
        seen.append(stage.chat.state)

    front = stage.play(*CAPITALS, "And of Spain?", "/compact", look)
    asked = stage.fake.asked("send")[-1]
    assert asked["settings"] == {"enable_thinking": False, "max_new_tokens": 1024}
    assert len(stage.fake.asked("undo")) == len(stage.fake.asked("reset")) == 1
    (state,) = seen
    turns = [(turn.question, turn.answer) for turn in state.turns]
    assert turns[0][0].endswith("Capitals were named.")
    assert turns[1:] == [("And of Spain?", "Madrid.")]
    assert state.title == f"{CAPITALS[0]} (summary)"
    assert "summarised 2 turns, kept 1" in front.said and "/sessions" in front.said


def test_a_summary_that_was_not_finished_changes_nothing(tmp_path):
    done = {"event": "done", "finish_reason": "cancelled", "text": "Cap", "thinking": ""}
    filled = dict.fromkeys(("prompt_tokens", "cached_tokens", "prefilled_tokens"), 0)
    filled |= {"reasoning_tokens": 0, "generated_tokens": 1, "performance": {}, "detail": ""}
    stage = ChatStage(
        tmp_path,
        fakes(),
        fakes(),
        {"method": "send", "events": [{"event": "text", "text": "Cap", "tokens": 1}, done | filled]},
    )
    front = stage.play(*CAPITALS, "/compact")
    assert "the conversation is as it was" in front.said
    assert not stage.fake.asked("reset")
    assert front.all("rebuilt")[-1] == list(CAPITALS)


def test_compact_in_a_full_context_reads_fewer_turns_and_keeps_the_others(tmp_path):
    steps = (fakes(), fakes("Berlin."), fakes("Madrid."))
    stage = ChatStage(tmp_path, *steps, {"method": "edit", "answer": "France was asked for."})
    seen: list[ConversationState] = []

    async def fill_and_compact(stage: ChatStage) -> None:
        stage.chat.status.context_limit = stage.chat.state.tokens
        await perform("/compact", stage.chat, stage.front)
        seen.append(stage.chat.state)

    front = stage.play(*CAPITALS, "And of Spain?", fill_and_compact)
    assert [asked["turn"] for asked in stage.fake.asked("edit")] == [2]
    assert len(stage.fake.asked("switch")) == 1 and not stage.fake.asked("undo")
    turns = [(turn.question, turn.answer) for turn in seen[0].turns]
    assert turns[0][0].endswith("France was asked for.")
    assert turns[1:] == [(CAPITALS[1], "Berlin."), ("And of Spain?", "Madrid.")]
    assert "summarised 1 turn, kept 2" in front.said


def test_a_summary_reads_as_many_turns_as_leave_it_room():
    stats = [TurnStats(prompt_tokens=tokens) for tokens in (400, 900, 1500, 1900)]
    filled = [replace(new_turn(number, "q"), stats=one) for number, one in enumerate(stats, 1)]
    assert turns_with_room(filled, 3, tokens=1300, limit=2048) == 4
    assert turns_with_room(filled, 3, tokens=2000, limit=2048) == 1
    assert turns_with_room(filled, 3, tokens=2000, limit=2600) == 2
    assert turns_with_room(filled, 3, tokens=2000, limit=2200) == 2
    assert turns_with_room(filled, 3, tokens=9999, limit=0) == 4


def test_a_summary_without_room_names_compact_and_never_shows_its_request(tmp_path):
    error = {"kind": "ContextLengthExceeded", "message": "the prompt has 9 tokens", "exit_code": 4}
    stage = ChatStage(tmp_path, fakes(), fakes(), {"method": "send", "events": [], "error": error})
    front = stage.play(*CAPITALS, "/compact")
    assert front.all("error") == ["/compact has no room for a summary: the prompt has 9 tokens"]
    assert not front.all("returned") and not stage.fake.asked("reset")
    assert stage.chat.replies.gives_back


def test_cache_tells_what_was_reused_and_why(tmp_path):
    said = ChatStage(tmp_path).play(CAPITALS[0], "/cache").said
    assert "turn 1, how extend, reused 10, read 10, why the live state goes on" in said
    assert "MiB" in said


# --- thinking ---


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("/think on", {"enable_thinking": True}),
        ("/think off", {"enable_thinking": False}),
        ("/think auto", {}),
        ("/think 512", {"enable_thinking": True, "thinking_token_budget": 512}),
        ("/set think", {"enable_thinking": True}),
        ("/set nothink", {"enable_thinking": False}),
        ("/set think off", {"enable_thinking": False}),
        ("/effort high", {"reasoning_effort": "high"}),
        ("/budget 99", {"thinking_token_budget": 99}),
        ("/set parameter temperature 0.7", {"temperature": 0.7}),
        ("/set parameter num_predict 5", {"max_new_tokens": 5}),
        ("/set top-k 7", {"top_k": 7}),
        ("/set seed 3", {"seed": 3}),
        ("/set stop END", {"stop": ["END"]}),
    ],
)
def test_a_setting_goes_with_the_next_reply(tmp_path, line, settings):
    stage = ChatStage(tmp_path)
    front = stage.play(line, "hello")
    assert stage.fake.asked("send")[0]["settings"] == settings
    assert len(front.all("info")) == 1 and not front.all("error")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("/think 512", "/think off"),
        ("/budget 5", "/budget off"),
        ("/effort high", "/effort default"),
        ("/set temperature 1", "/set temperature default"),
    ],
)
def test_a_setting_can_be_taken_back(tmp_path, first, then):
    stage = ChatStage(tmp_path)
    stage.play(first, then, "hello")
    left = stage.fake.asked("send")[0]["settings"]
    assert set(left) <= {"enable_thinking"} and left.get("enable_thinking") in (None, False)


def test_thoughts_are_shown_and_hidden(tmp_path):
    front = ChatStage(tmp_path).play("/think show", "/think hide", "/think", "/set show_thinking on")
    assert front.all("show_thinking") == [True, False, True]
    assert "thoughts are folded" in front.said


def test_history_is_kept_or_stripped(tmp_path):
    stage = ChatStage(tmp_path)
    front = stage.play("/history strip", "/history", "/set history preserve")
    assert [one["mode"] for one in stage.fake.asked("history")] == ["strip", "preserve"]
    assert "dropped from the context" in front.said


# --- showing and setting ---


def test_the_system_prompt_is_set_shown_and_taken_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("role.txt").write_text("Be kind.\n")
    stage = ChatStage(tmp_path)
    front = stage.play(
        "/system Be brief.", "/system", "/system @role.txt", "/set system x", '/system ""', "/show system"
    )
    assert [one["text"] for one in stage.fake.asked("set_system")] == ["Be brief.", "Be kind.", "x", None]
    reports = [report_text(report) for report in front.all("report")]
    assert "Be brief." in reports[0] and "there is none" in reports[1]


def test_set_reaches_what_is_no_setting_of_replies(tmp_path):
    stage = ChatStage(tmp_path)
    seen = []

    async def look(stage: ChatStage) -> None:
        seen.append((stage.chat.settings["context_limit"], stage.chat.show_stats))

    front = stage.play(
        "/set theme dark", "/set mouse off", "/set num_ctx 4096", "/set verbose", look, "/set quiet", look
    )
    assert front.all("set_theme") == ["dark"] and front.all("mouse") == [False]
    assert seen == [(4096, True), (4096, False)]
    assert "context_limit is 4096 from the next /load" in front.said


def test_set_says_from_when_a_setting_counts(tmp_path):
    stage = ChatStage(tmp_path)
    front = stage.play("/set kv_bits 8", "/set copy_on_select off", "/set models_dir /else")
    assert front.all("info") == [
        "kv_bits is 8 from the next /load",
        "copy_on_select is off now",
        "models_dir is '/else' now",
    ]
    assert stage.chat.settings["models_dir"] == ["/else"] and not stage.chat.settings["copy_on_select"]


@pytest.mark.parametrize("name", AT_START)
def test_set_refuses_what_counts_only_at_the_start_and_says_where_it_is_set(tmp_path, name: str):
    stage = ChatStage(tmp_path)
    front = stage.play(f"/set {name} 60")
    assert str(config_file()) in front.all("error")[0]
    assert stage.chat.settings.origin(name) == "default"
    assert completions(f"/set {name}", stage.chat) == []


def test_every_setting_has_a_default_to_go_back_to(tmp_path):
    front = FakeFront(screens=True)
    stage = ChatStage(tmp_path, front=front)
    names = [name for name in KEYS if name not in ("model", *AT_START)]
    stage.play("/set num_ctx 4096", *(f"/set {name} default" for name in names))
    assert not front.all("error")
    assert (stage.chat.settings["context_limit"], stage.chat.settings.origin("context_limit")) == (
        None,
        "default",
    )


def test_show_prints_the_model_its_parameters_and_where_settings_come_from(tmp_path):
    front = ChatStage(tmp_path).play(
        "/set top_k 7", "/show", "/show parameters", "/show template", "/show config", "/set"
    )
    said = front.said
    assert "fake-4bit" in said and "4.50 bits per weight" in said
    assert "name temperature, value 0.7, from the model, wanted a number from 0 to 100" in said
    assert "name top_k, value 7, from you" in said
    assert "{{ messages }}" in said
    assert "name top_k, value 7, from /set" in said and "name theme, value auto, from default" in said


def test_show_prompt_has_the_exact_text_and_its_tokens(tmp_path):
    result = {"text": "<|im_start|>user\nhello<|im_end|>", "tokens": 1234}
    stage = ChatStage(tmp_path, {"method": "prompt", "result": result})
    said = stage.play("/show prompt hello").said
    assert "Prompt · 1,234 tokens" in said and "<|im_start|>user\nhello" in said
    assert stage.fake.asked("prompt")[0]["text"] == "hello"


def test_stats_have_a_row_for_each_turn_and_a_form_for_programs(tmp_path):
    front = ChatStage(tmp_path).play(*CAPITALS, "/stats", "/tokens json")
    table, form = front.all("report")
    rows = next(part for part in table.parts if isinstance(part, Table)).rows
    assert [row[0] for row in rows] == ["1", "2"] and rows[0][7] == "25.0"
    told = json.loads(report_text(form))
    assert told["turns"][0]["prompt_tokens"] == 20 and told["model"] == "fake-4bit"


def test_stats_before_the_first_question(tmp_path):
    assert "there is no reply yet" in ChatStage(tmp_path).play("/stats").said


# --- what is seen ---


def test_help_lists_all_or_explains_one(tmp_path):
    front = ChatStage(tmp_path).play("/help", "/help retry", "/help /regen")
    table, one, same = map(report_text, front.all("report"))
    assert all(f"/{command.name}" in table for command in COMMANDS)
    assert "temperature=0.9" in one and "/regen" in one and one == same


@pytest.mark.parametrize("name", ["help", "sessions", "stats", "theme", "keys", "rewind", "model"])
def test_a_front_end_with_a_screen_shows_that(tmp_path, name):
    with Store(tmp_path / "store.db") as store:
        front = ChatStage(tmp_path, front=FakeFront(screens=True), store=store).play("hello", f"/{name}")
    assert len(front.all("screen")) == 1 and not front.all("report")


def test_answers_and_code_are_copied(tmp_path):
    front = ChatStage(tmp_path, fakes(CODE)).play(
        "hello", "/copy", "/copy 1", "/copy code", "/copy code 1", "/copy all"
    )
    copied = front.all("copy")
    assert copied[0] == copied[1] == CODE
    assert [text.strip() for text in copied[2:4]] == ["plain", "print(1)"]
    assert copied[4].startswith("> hello\n")
    assert front.all("info") == ["copied"] * 5


def test_read_puts_files_into_the_next_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b c.txt", "d.bin"):
        Path(name).write_text("text")
    front = ChatStage(tmp_path).play("/read *.txt a.txt")
    assert front.all("put_prompt") == ['@a.txt @"b c.txt" ']
    assert "2 files with 8 characters" in front.said


def test_find_theme_mouse_log_about_and_leaving(tmp_path):
    front = ChatStage(tmp_path).play(
        "/find Paris", "/theme", "/theme auto", "/mouse off", "/keys", "/log", "/about", "/plain", "/bye"
    )
    assert front.all("find") == ["Paris"] and "2 matches" in front.said
    assert front.all("set_theme") == ["auto"] and front.all("mouse") == [False]
    assert front.all("leave") == ["plain", "shell"]
    assert "the log is empty" in front.said and "Python" in front.said and "ctrl+o" in front.said
    assert "delta net, 1 token" in front.said and "chunked" in front.said


DONE_IN_TURN = ("send", "retry", "edit", "undo", "reset", "prime", "set_system")
SLOW = {"method": "send", "answer": "word " * 200, "seconds": 0.01}


def play_during_a_reply(stage: ChatStage, meanwhile: Callable[[ChatStage], Awaitable[None]]) -> FakeFront:
    """Play a scene while a reply is being written; return when nothing is left to do."""

    async def scene(stage: ChatStage) -> None:
        sending = asyncio.create_task(perform("hello", stage.chat, stage.front))
        await stage.until(lambda: stage.front.text)
        await meanwhile(stage)
        await sending
        await stage.until(lambda: not stage.chat.queue and not stage.chat.busy)

    return stage.play(scene)


def test_a_command_that_has_to_wait_is_queued_while_a_reply_is_written(tmp_path):
    queued: list[list[str]] = []

    async def meanwhile(stage: ChatStage) -> None:
        for line in ("/undo", "/stats", "/stop"):
            await perform(line, stage.chat, stage.front)
            queued.append(stage.chat.queue)

    stage = ChatStage(tmp_path, SLOW)
    front = play_during_a_reply(stage, meanwhile)
    assert front.all("error") == []
    assert queued == [["/undo"]] * 3
    assert len(front.all("report")) == 1
    assert len(stage.fake.asked("cancel")) == 1
    assert front.all("put_prompt") == ["hello"] and not stage.chat.state.turns


def test_queued_messages_and_commands_are_done_in_the_order_in_which_they_were_given(tmp_path):
    async def meanwhile(stage: ChatStage) -> None:
        for line in ("/retry temperature=0.5", "two", "/compact 1", "/new", "three", "/system Be brief."):
            await perform(line, stage.chat, stage.front)
        await perform("/stop", stage.chat, stage.front)

    answers = [{"method": "send", "answer": text} for text in ("Two.", "A summary.", "Three.")]
    again = {"method": "retry", "answer": "Again."}
    stage = ChatStage(tmp_path, SLOW, again, *answers)
    front = play_during_a_reply(stage, meanwhile)
    assert front.all("error") == []
    methods = [one["method"] for one in stage.fake.requests() if one["method"] in DONE_IN_TURN]
    assert methods == [
        "send",
        "retry",
        "send",
        "send",
        "undo",
        "reset",
        "prime",
        "reset",
        "send",
        "set_system",
    ]
    assert [turn.question for turn in stage.chat.state.turns] == ["three"]


def test_what_waits_is_checked_and_asked_for_when_it_is_given(tmp_path):
    async def meanwhile(stage: ChatStage) -> None:
        for line in ("/retry warmth=1", "/edit", "/switch", "/undo now"):
            await perform(line, stage.chat, stage.front)
        assert stage.chat.queue == ["/edit 1 hello again"]
        assert stage.chat.waiting.take_back() == "/edit 1 hello again"
        await perform("/stop", stage.chat, stage.front)

    front = play_during_a_reply(ChatStage(tmp_path, SLOW, front=FakeFront("hello again")), meanwhile)
    assert front.all("edit_text") == ["hello"]
    said = front.all("error")
    assert len(said) == 3 and "warmth" in said[0] and "no branches" in said[1] and "no words" in said[2]


@pytest.mark.parametrize(
    ("line", "at_once"),
    [
        ("/set temperature 0.5", True), ("/set system Be brief.", False), ("/set num_ctx 4096", True),
        ("/think off", True), ("/model", True), ("/model x", False), ("/load x", False), ("/rewind", True),
        ("/system", True), ("/system x", False), ("/persona", True), ("/persona x", False), ("/show", True),
        ("/show prompt", False), ("/sessions", True), ("/sessions 3", False), ("/history", True),
        ("/history strip", False), ("/prompts", True), ("/read a.txt", True), ("/retry", False),
        ("/fork 1", False), ("/compact", False), ("/plain", False), ("/bye", True),
    ],
)  # fmt: skip
def test_commands_run_at_once_unless_they_change_what_the_reply_is_part_of(line, at_once):
    asked = parse(line)
    assert not isinstance(asked, str)
    assert asked[0].runs_at_once(asked[1]) is at_once


def test_a_command_that_waits_for_a_job_is_done_when_the_model_is_back(tmp_path):
    async def scene(stage: ChatStage) -> None:
        await perform("hello", stage.chat, stage.front)
        stage.chat.start_job("eval", "eval", {"models": ["m"]}, render, alone=True)
        await stage.until(lambda: stage.chat.parked)
        await perform("/new", stage.chat, stage.front)
        assert stage.chat.queue == ["/new"] and stage.chat.state.turns
        await at_rest(stage)
        await stage.until(lambda: not stage.chat.queue and not stage.chat.busy)

    progress = [{"event": "progress", "done": done, "total": 4} for done in range(4)]
    stage = ChatStage(tmp_path, {"method": "eval", "seconds": 0.05, "events": progress})
    front = stage.play(scene)
    assert front.all("error") == [] and not stage.chat.state.turns


# --- conversations on disk ---


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store.db") as store:
        number = store.create()
        node = store.add_node(number, None, "user", text="Where is Lisbon?")
        store.add_node(number, node, "assistant", text="In Portugal.")
        yield store


def test_sessions_are_listed_found_and_opened(tmp_path, store):
    stage = ChatStage(tmp_path, store=store)
    front = stage.play("/sessions", "/sessions portugal", "/resume 1", "/sessions latest", "/sessions 99")
    listed, found = map(report_text, front.all("report"))
    assert "Where is Lisbon?" in listed and "Portugal" in found
    assert [one["conversation"] for one in stage.fake.asked("open")] == [1, 1]
    assert front.all("error") == ["there is no conversation 99"]


def test_a_conversation_is_named_saved_exported_and_imported(tmp_path, store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    front = FakeFront(False, True)
    stage = ChatStage(tmp_path, store=store, front=front)
    stage.play(
        "hello", "/rename My talk", "/save", "/export", "/export my-talk.md", "/export my-talk.md",
        "/export a.txt", "/export b.json", "/export c.html", "/import b.json",
    )  # fmt: skip
    assert stage.fake.asked("rename")[0]["title"] == "My talk"
    assert len(stage.fake.asked("save_state")) == 2  # by /save, and by leaving
    assert Path("my-talk.md").read_text().startswith("# Where is Lisbon?")
    assert len(front.all("confirm")) == 2 and "nothing was written" in front.said
    (error,) = front.all("error")
    assert error.startswith("cannot export to a.txt, wanted a name that ends with .md, .json, .html: /export")
    assert stage.fake.asked("open")[-1]["conversation"] == 2
    assert store.conversation(2).title == "Where is Lisbon?"


def test_nothing_is_exported_before_the_first_word(tmp_path, store):
    assert "nothing was said yet" in ChatStage(tmp_path, store=store).play("/export a.md").said
    front = ChatStage(tmp_path, store=store).play("hello", f"/export {'n' * 300}.md")
    assert "File name too long" in front.all("error")[0]


def test_neither_mlx_nor_the_full_screen_is_imported_for_commands_and_lines():
    imports = "import sys, qchat.tui.plain.repl, qchat.tui.commands"
    code = f"{imports}; print({{'mlx.core', 'textual'}} & sys.modules.keys())"
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev")}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout == "set()\n"


def test_labels_of_branches_are_short():
    branch = Branch(4, "word " * 100, current=True)
    assert len(commands.conversation._branch_label(branch)) < 80


def test_the_readme_has_every_command_and_key_as_they_are():
    readme = (ROOT / "tui/README.md").read_text(encoding="utf-8")
    assert markdown_table() in readme
    for keys, meaning in Keymap().rows():
        assert f"| {' '.join(f'`{key}`' for key in keys.split())} | {meaning} |" in readme


def test_branches_of_one_question_are_told_apart_by_their_answers():
    asked, label = "What is the capital of France?", commands.conversation._branch_label
    assert label(Branch(4, asked, current=True, answer="Paris.")) == f"{asked} → Paris. (here)"
    assert label(Branch(7, asked, current=False, answer="Lyon.")) == f"{asked} → Lyon."
