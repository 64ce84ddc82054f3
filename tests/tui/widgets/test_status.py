"""The status row: what it says in each phase, what it drops when narrow, and that it rests when idle."""

import asyncio
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from textual.app import App, ComposeResult

from qchat.core.conversation.summary import Branch
from qchat.core.events import Done, Performance
from qchat.core.worker.wire import ModelInfo
from qchat.tui.chat.meter import Status as Facts
from qchat.tui.chat.turns import NO_STATE
from qchat.tui.user.themes import extra_defaults
from qchat.tui.widgets.header import Header
from qchat.tui.widgets.keybar import Keybar
from qchat.tui.widgets.line import fit, piece
from qchat.tui.widgets.status import Status
from tests.paths import ROOT
from tests.run_async import run_async

MODEL = ModelInfo(
    name="Qwen",
    path="/models/Qwen",
    nbytes=9 << 30,
    bits_per_weight=2.68,
    max_position_embeddings=262_144,
    context_limit=32_768,
    moe=False,
    mtp=True,
    can_preserve_thinking=True,
    thinks_by_default=True,
    notices=(),
    forms={},
    parameters={},
    template="",
    bytes_per_token=9 << 30,
)
LAST = Done("stop", performance=Performance(decode_tokens_per_s=23.1, seconds_to_first_token=0.9))
CSS = ROOT / "themes" / "app.tcss"
GB = 10**9
WRITING = Facts(
    phase="answering",
    seconds=69.4,
    tokens_per_s=23.44,
    history_of_speed=[5, 10, 20, 23, 23, 20, 23, 24],
    thought_tokens=212,
    answer_tokens=1148,
    context_tokens=3100,
    context_limit=32_768,
    active_nbytes=11 * GB,
    cache_nbytes=GB // 2,
    peak_nbytes=12 * GB,
    limit_nbytes=24 * GB,
)


class Rows(App[None]):
    CSS_PATH = CSS

    def __init__(self) -> None:
        super().__init__()
        self.status, self.header, self.keybar = Status(), Header(), Keybar()

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return extra_defaults()

    def compose(self) -> ComposeResult:
        self.status.has_model = True
        yield self.header
        yield self.status
        yield self.keybar

    def said(self, facts: Facts) -> str:
        self.status.show(facts)
        return self.status.render_line(0).text


@asynccontextmanager
async def rows(width: int = 120):
    app = Rows()
    async with app.run_test(size=(width, 10)):
        yield app


def run(check, width: int = 120) -> None:
    async def main() -> None:
        async with rows(width) as app:
            result = check(app)
            if asyncio.iscoroutine(result):
                await result

    run_async(main())


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (Facts(phase="starting"), ["starting the engine"]),
        (
            Facts(phase="loading", done=int(6.9 * GB), total=int(11.1 * GB), seconds_left=1.94),
            ["◔ loading", "━━━━━━╌╌╌╌", "6.9/11.1 GB", "1.9 s left", "you can type already"],
        ),
        (
            Facts(phase="reading", done=8192, total=12842, tokens_per_s=412, seconds_left=11),
            ["◔ reading", "━━━━━━╌╌╌╌", "8,192/12,842 tokens", "412 tok/s", "11 s left", "esc to stop"],
        ),
        (
            WRITING,
            ["● 23.4 tok/s", "▂▄▇", "think 212", "answer 1,148", "3.1k/33k", "mem 11.5/24 GB", "1:09"],
        ),
        (replace(WRITING, drafts_accepted=0.71, bandwidth_share=0.63), ["drafts 71%", "bw 63%"]),
        (
            replace(WRITING, drafts_accepted=0.71, draft_gain=1.62, draft_cost=1.3),
            ["drafts 71%", "gain ×1.62 cost ×1.30"],
        ),
        (
            replace(WRITING, phase="idle", last=LAST),
            ["○ ready", "last 23.1 tok/s · first token 0.9 s", "3.1k/33k", "mem 11.5/24 GB"],
        ),
        (
            replace(WRITING, phase="idle", background="compiling faster kernels for this model"),
            ["○ ready", "compiling faster kernels for this model", "3.1k/33k"],
        ),
        (
            replace(WRITING, phase="idle", context_tokens=31_000),
            ["▲ context 95% full", "/compact summarises", "silently"],
        ),
        (
            Facts(phase="dead", reason="out of memory\n"),
            ["✖ engine stopped: enter restarts it, nothing is lost (out of memory)"],
        ),
    ],
)
def test_each_phase_says_what_matters(facts: Facts, said: list[str]):
    def check(app: Rows) -> None:
        row = app.said(facts)
        assert [words for words in said if words not in row] == [], row

    run(check, 140)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_the_row_is_exactly_as_wide_as_the_window_and_keeps_the_speed(width: int):
    def check(app: Rows) -> None:
        for facts in (WRITING, replace(WRITING, phase="idle"), Facts(phase="dead", reason="x" * 300)):
            assert len(app.said(facts)) == width
        assert "23.4 tok/s" in app.said(WRITING)

    run(check, width)


@pytest.mark.parametrize("facts", [WRITING, replace(WRITING, phase="idle", last=LAST)])
def test_the_row_names_the_schema_of_answers(facts: Facts):
    def check(app: Rows) -> None:
        assert "schema" not in app.said(facts)
        app.status.schema = "city.json"
        assert " schema city.json " in app.said(facts)

    run(check, 100)


def test_a_narrow_row_keeps_the_context():
    run(lambda app: _assert_in("ctx 9%", app.said(WRITING)), 40)


def _assert_in(words: str, row: str) -> None:
    assert words in row


@pytest.mark.parametrize(("share", "style"), [(0.5, "ok"), (0.8, "warn"), (0.92, "hot")])
def test_a_gauge_turns_amber_and_then_red(share: float, style: str):
    def check(app: Rows) -> None:
        facts = replace(WRITING, context_tokens=int(share * 10_000) + 1, context_limit=10_000)
        app.status.show(facts)
        wanted = app.status.get_component_rich_style(f"status--{style}")
        cells = [part for part in app.status.render_line(0) if "━" in part.text]
        assert [part.style for part in cells] == [wanted]

    run(check)


@pytest.mark.slow
def test_nothing_is_painted_while_idle_and_four_times_a_second_while_busy():
    async def check(app: Rows) -> None:
        app.status.show(replace(WRITING, phase="idle"))
        await asyncio.sleep(0.1)
        before = app.status.painted
        await asyncio.sleep(0.6)
        assert app.status.painted == before
        app.status.show(WRITING)
        for _ in range(60):
            await asyncio.sleep(0.01)
            app.status.show(WRITING)
        assert 2 <= app.status.painted - before <= 5

    run(check)


def test_control_characters_in_a_reason_or_a_name_do_not_reach_the_terminal():
    def check(app: Rows) -> None:
        assert "\x1b" not in app.said(Facts(phase="dead", reason="a\x1b[2Jb"))
        app.header.show(replace(MODEL, name="evil\x1b]0;x\x07"), replace(NO_STATE, title="a\x1b[31mb"))
        assert "\x1b" not in app.header.render_line(0).text

    run(check)


def test_the_header_names_model_title_and_branch():
    def check(app: Rows) -> None:
        branches = (Branch(1, "", False), Branch(2, "", True))
        app.header.show(MODEL, replace(NO_STATE, title="Sorting", branches=branches))
        row = app.header.render_line(0).text
        assert row.startswith(" Qwen  · 2.7 bpw  · MLX")
        assert row.rstrip().endswith("Sorting  branch 2/2")

    run(check)


def test_a_narrow_header_keeps_the_model():
    def check(app: Rows) -> None:
        app.header.show(replace(MODEL, name="Qwen3.6-27B-UD-Q2_K_XL-mlx"), replace(NO_STATE, title="Sorting"))
        assert app.header.render_line(0).text.strip() == "Qwen3.6-27B-UD-Q2_K_XL-mlx"

    run(check, 30)


def test_the_key_bar_shows_six_keys_at_most_and_two_when_narrow():
    keys = [(f"f{n}", f"does {n}") for n in range(1, 9)]

    def wide(app: Rows) -> None:
        app.keybar.show(keys)
        assert app.keybar.render_line(0).text.count("does") == 6

    def narrow(app: Rows) -> None:
        app.keybar.show(keys)
        assert app.keybar.render_line(0).text.split() == ["f1", "does", "1", "f6", "does", "6"]

    run(wide)
    run(narrow, 60)


def test_a_word_covers_the_keys_for_a_while():
    async def check(app: Rows) -> None:
        app.keybar.show([("esc", "stop")])
        app.keybar.say("copied", seconds=0.05)
        assert app.keybar.render_line(0).text.strip() == "copied"
        await asyncio.sleep(0.2)
        assert app.keybar.render_line(0).text.strip() == "esc stop"

    run(check)


def _widths() -> Iterator[int]:
    yield from range(1, 60)


def test_whatever_the_width_pieces_fit_and_the_least_important_go_first():
    left, right = [piece("aaaa"), piece("bbbb", rank=2)], [piece("漢字漢字", rank=1)]
    for width in _widths():
        kept = [part for side in fit(left, right, width, 2) for part in side]
        assert sum(part.width for part in kept) + 2 * (len(kept) - 1) <= width
    assert fit(left, right, 15, 2) == (left[:1], right)
