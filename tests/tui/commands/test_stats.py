"""Statistics: live figures after each reply, replies of all branches and models, and files for programs."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from qchat.core import Store
from qchat.core.conversation.summary import TurnStats
from qchat.core.events import Performance
from qchat.tui.chat.turns import new_turn
from qchat.tui.commands.stats import stats_csv, stats_json, stats_report
from qchat.tui.text.report import Spark, Table, report_lines, report_text
from qchat.tui.text.trend import Trend
from tests.tui.chat_stage import ChatStage
from tests.tui.running_app import Running, chatting

CAPITALS = ("What is the capital of France?", "And of Germany?")


async def other_model(stage: ChatStage) -> None:
    await stage.chat.load("/models/other-8bit")


def rows(report) -> list:
    return [row for part in report.parts if isinstance(part, Table) for row in part.rows]


def test_while_live_the_replies_of_all_branches_and_models_are_shown(tmp_path: Path):
    stage = ChatStage(tmp_path, store=Store(tmp_path / "conversations.db"))
    front = stage.play(
        *CAPITALS, "/bench live on", other_model, "/retry", "/stats", "/bench live off", "/stats"
    )
    live, usual = front.all("report")
    assert [tuple(row[:2]) for row in rows(live)] == [
        ("fake-4bit", "1"),
        ("fake-4bit", "2"),
        ("other-8bit", "2"),
    ]
    assert [row[1] for row in rows(usual)] == ["1", "2"]
    trend = next(part for part in live.parts if isinstance(part, Trend))
    assert [one.name for one in trend.series] == ["fake-4bit", "other-8bit"]
    assert [[x for x, _ in one.points] for one in trend.series] == [[1, 2], [3]]
    styles = {style for line in report_lines(live, 100) for style, text in line if set(text) & set("●■")}
    assert len(styles) == 2, "models differ in colour"
    said = [text for kind, text in front.notes if kind == "info"]
    assert said[0].startswith("live benchmarking is on") and "live benchmarking is off" in said


@pytest.mark.slow
def test_the_speed_over_a_reply_is_recorded_while_live_only(tmp_path: Path):
    stage = ChatStage(tmp_path, {"method": "send", "answer": "word " * 40, "seconds": 0.02})
    stage.play(CAPITALS[0], "/bench live on", CAPITALS[1])
    before, live = stats_json(stage.chat)["turns"]
    assert not before["speeds"] and live["speeds"]
    assert any(
        isinstance(part, Spark) and "over the last" in part.label for part in stats_report(stage.chat).parts
    )


def test_statistics_are_written_as_csv_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    stage = ChatStage(tmp_path)
    stage.front.answers = [False, True]
    front = stage.play(
        *CAPITALS, "/stats csv t.csv", "/stats json t.json", "/stats csv t.csv", "/stats json t.json"
    )
    table = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["turn"] for row in table] == ["1", "2"]
    assert table[0]["model"] == "fake-4bit" and float(table[0]["decode_tokens_per_s"]) == 25.0
    assert float(table[0]["cached_share"]) == 0.5 and table[0]["on_branch"] == "True"
    told = json.loads((tmp_path / "t.json").read_text())
    assert told["turns"][0]["performance"]["decode_tokens_per_s"] == 25.0
    assert (tmp_path / "t.csv").stat().st_mode & 0o077 == 0
    assert len(front.all("confirm")) == 2 and ("info", "nothing was written") in front.notes


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/stats csv", "there is no reply yet"),
        ("/stats csv /nowhere/at/all.csv", "there is no reply yet"),
        ("/bench live maybe", "wanted on or off"),
        ("/stats xml", "csv"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_sentence(tmp_path: Path, line: str, sentence: str):
    assert sentence in ChatStage(tmp_path).play(line).said


def test_a_file_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path):
    front = ChatStage(tmp_path).play(CAPITALS[0], "/stats csv /nowhere/at/all.csv")
    assert ("error", "/nowhere/at/all.csv cannot be written: No such file or directory") in front.notes


def test_live_and_the_forms_are_completed(tmp_path: Path):
    stage = ChatStage(tmp_path)
    from qchat.tui.commands import completions

    def lines(begun: str) -> list[str]:
        return [one.line for one in completions(begun, stage.chat)]

    assert "/bench live on" in lines("/bench live o")
    assert "/bench live" in lines("/bench li")
    assert lines("/stats ") == ["/stats json", "/stats csv"]


def test_figures_that_a_file_would_garble_stay_in_their_cells(tmp_path: Path):
    stage = ChatStage(tmp_path)
    stats = TurnStats(performance=Performance(drafts_by_place=(0.5, 0.25)))
    turn = replace(new_turn(1, "q", 'a, "b"\nc'), stats=stats)
    stage.chat.state = replace(stage.chat.state, turns=(turn,))
    read = list(csv.DictReader(stats_csv(stage.chat).splitlines(keepends=True)))
    assert read[0]["model"] == 'a, "b"\nc' and read[0]["drafts_by_place"] == "0.5 0.25"


def test_a_key_turns_live_figures_on_and_off(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.pilot.press("f6")
        await it.until(lambda: it.chat.settings["live_bench"])
        await it.ask("one")
        await it.until(lambda: any("25.0 tok/s" in text and "fake" in text for _, text in it.said))
        assert "25.0 tok/s" in it.screen.transcript.blocks[-1].text
        await it.pilot.press("f6")
        await it.until(lambda: not it.chat.settings["live_bench"])
        noted = len(it.said)
        await it.ask("two")
        assert len(it.said) == noted


def test_statistics_read_aloud_name_models_and_speeds(tmp_path: Path):
    front = ChatStage(tmp_path).play(*CAPITALS, "One more?", "/stats")
    assert "fake-4bit: 25 to 25, on average 25 tokens/s" in report_text(front.all("report")[0])


def test_the_columns_of_drafts_are_there_where_drafts_were_tried(tmp_path: Path):
    stage = ChatStage(tmp_path)
    speed = Performance(drafts_accepted=0.5, draft_cost=1.25, draft_gain=1.1)
    plain = new_turn(1, "q", "fake")
    for turns, columns in (((plain,), 9), ((plain, replace(plain, stats=TurnStats(performance=speed))), 12)):
        stage.chat.state = replace(stage.chat.state, turns=turns)
        table = next(part for part in stats_report(stage.chat).parts if isinstance(part, Table))
        assert len(table.columns) - ("model" in table.columns) == columns
        assert all(len(row) == len(table.columns) == len(table.align) for row in table.rows)
        assert len(turns) == 1 or list(table.rows[1][-3:]) == ["50%", "×1.10", "×1.25"]
