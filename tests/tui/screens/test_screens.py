"""The full-height screens on a scripted engine: what they list, and what each key of theirs does."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from textual.widgets import Input, OptionList, Static

from qchat.core import Measurements, Store
from qchat.core.conversation.summary import SnapshotSummary, TurnStats
from qchat.core.errors import UsageError
from qchat.core.hub import cache as hubcache
from qchat.core.hub.library import LocalModel
from qchat.core.quant.results import PlanSummary
from qchat.tui.chat.turns import new_turn
from qchat.tui.commands import COMMANDS
from qchat.tui.screens.convert_form import BITS, ConvertForm, Cycle, plan_line, source_line
from qchat.tui.screens.listing import Ask, Column, Listing, Row, painted, shown_columns
from qchat.tui.screens.models import ModelsScreen
from qchat.tui.screens.rewind import RewindScreen, rows_of
from qchat.tui.screens.sessions import SessionsScreen
from qchat.tui.screens.theme import ThemeScreen
from qchat.tui.text.sanitise import printable
from qchat.tui.user.keymap import ACTIONS
from qchat.tui.user.paths import config_file, measurements_file
from qchat.tui.user.settings import Settings
from qchat.tui.widgets.hints import hint_line
from tests.checkpoints import write_checkpoint
from tests.tui.conversing import talk
from tests.tui.fake_jobs import RESULTS_OF_JOBS
from tests.tui.running_app import Running, chatting

Check = Callable[[Running, Any], Awaitable[None]]
SIZES = [(100, 30), (60, 16), (200, 60), (40, 10)]


def list_text(screen: Any) -> list[str]:
    """The rows of the list as they are drawn."""
    options = screen.query_one(OptionList)
    return [str(options.get_option_at_index(place).prompt) for place in range(options.option_count)]


def static_text(screen: Any, selector: str) -> str:
    return str(screen.query_one(selector, Static).content)


async def open_screen(it: Running, line: str, kind: type[Any]) -> Any:
    await it.say(line)
    await it.until(lambda: isinstance(it.app.screen, kind))
    return it.app.screen


# --- columns ---


COLUMNS = (Column("", 1), Column("name"), Column("size", 8, "right"), Column("more", 12, rank=1))


@pytest.mark.parametrize("width", range(10, 90, 7))
def test_a_row_is_never_wider_than_there_is_room(width: int):
    row = Row("1", ("●", "模型" * 40 + "\x1b[31m\n", "5 GB", "x" * 50))
    content = painted(row, COLUMNS, width)
    assert content.cell_length <= max(width, 1 + 2 + 1 + 2 + 8)
    assert not set(content.plain) & set("\x1b\n")


def test_columns_give_way_by_rank():
    assert [n for n, _ in shown_columns(COLUMNS, 60)] == [0, 1, 2, 3]
    assert [n for n, _ in shown_columns(COLUMNS, 40)] == [0, 1, 2]
    assert dict(shown_columns(COLUMNS, 40))[1] == 40 - 1 - 8 - 4


# --- conversations ---


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """1 on planets, 2 on plants, 3 on cheese."""
    opened = Store(tmp_path / "conversations.db")
    talk(opened, "Which planets are there?", "Eight of them.")
    talk(opened, "Which plants climb?", "Ivy does.")
    talk(opened, "Name a cheese.", "Brie.", title="On cheese\x1b[31m")
    return opened


def in_sessions(tmp_path: Path, store: Store, **options: Any) -> Callable[[Check], None]:
    def run(check: Check) -> None:
        @chatting(tmp_path, store=store, **options)
        async def checked(it: Running) -> None:
            screen = await open_screen(it, "/sessions", SessionsScreen)
            await it.until(lambda: len(screen.rows) == 3)
            await check(it, screen)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_conversations_are_listed_in_windows_of_all_sizes(tmp_path: Path, store: Store, size):
    @in_sessions(tmp_path, store, size=size)
    async def check(it: Running, screen: SessionsScreen) -> None:
        await it.until(lambda: len(list_text(screen)) == 1 + 3)
        assert "today" in list_text(screen)[0].lower(), "the day stands over its conversations"
        assert "cheese" in list_text(screen)[1]
        assert "\x1b" not in "".join(list_text(screen))
        wide = size[0] >= 80
        assert screen.query_one("#sheet-detail").display == wide
        await it.until(lambda: "Brie." in static_text(screen, "#sheet-preview"))


def test_the_cursor_shows_the_end_of_each_conversation_and_enter_opens_it(tmp_path: Path, store: Store):
    @in_sessions(tmp_path, store)
    async def check(it: Running, screen: SessionsScreen) -> None:
        await it.until(lambda: "Brie." in static_text(screen, "#sheet-preview"))
        await it.pilot.press("j")
        await it.until(lambda: "Ivy" in static_text(screen, "#sheet-preview"))
        await it.pilot.press("enter")
        await it.until(lambda: it.app.screen is it.screen)
        await it.until(lambda: it.engine.asked("open") == [{"conversation": 2}])


@pytest.mark.slow
def test_the_search_looks_into_what_was_said(tmp_path: Path, store: Store):
    @in_sessions(tmp_path, store)
    async def check(it: Running, screen: SessionsScreen) -> None:
        await it.pilot.press("/", *"eight")
        await it.until(lambda: [row.id for row in screen.rows] == ["1"])
        await it.pilot.press(*"xyz")
        await it.until(lambda: not screen.rows)
        said = " ".join(list_text(screen)[0].split())
        assert len(list_text(screen)) == 1 and said == SessionsScreen.NOT_FOUND
        await it.pilot.press("enter")
        assert it.app.screen is screen
        await it.pilot.press("escape")
        await it.until(lambda: len(screen.rows) == 3)
        await it.pilot.press("escape")
        await it.until(lambda: it.app.screen is it.screen)


def test_a_deleted_conversation_comes_back_with_one_key(tmp_path: Path, store: Store):
    @in_sessions(tmp_path, store)
    async def check(it: Running, screen: SessionsScreen) -> None:
        await it.pilot.press("d")
        await it.until(lambda: [row.id for row in screen.rows] == ["2", "1"])
        await it.pilot.press("u")
        await it.until(lambda: len(screen.rows) == 3)


def test_a_title_to_be_changed_has_no_control_characters():
    assert Ask("Title", "t\x1b]0;owned\x07")._text == printable("t\x1b]0;owned\x07") != "t\x1b]0;owned\x07"


def test_a_conversation_is_renamed(tmp_path: Path, store: Store):
    @in_sessions(tmp_path, store)
    async def check(it: Running, screen: SessionsScreen) -> None:
        await it.pilot.press("down", "r")
        await it.until(lambda: isinstance(it.app.screen, Ask))
        field = it.app.screen.query_one(Input)
        assert field.value == "Which plants climb?"
        field.value = "Climbers"
        await it.pilot.press("enter")
        await it.until(lambda: "Climbers" in "".join(list_text(screen)))
        assert store.conversation(2).title == "Climbers"
        await it.pilot.press("r")
        await it.until(lambda: isinstance(it.app.screen, Ask))
        await it.pilot.press("escape")
        await it.until(lambda: it.app.screen is screen)


@pytest.mark.slow
def test_a_conversation_is_exported_and_a_taken_name_is_refused(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    @in_sessions(tmp_path, store)
    async def check(it: Running, screen: SessionsScreen) -> None:
        for _ in range(2):
            await it.pilot.press("e")
            await it.until(lambda: isinstance(it.app.screen, Ask))
            await it.pilot.press("enter")
            await it.until(lambda: it.app.screen is screen)
        text = next(tmp_path.glob("*.md")).read_text()
        assert "Brie." in text
        await it.until(lambda: len(it.app._notifications) == 2)
        assert [toast.severity for toast in it.app._notifications] == ["information", "error"]


def test_a_fork_is_a_copy_and_the_chat_goes_there(tmp_path: Path, store: Store):
    @in_sessions(tmp_path, store)
    async def check(it: Running, _: SessionsScreen) -> None:
        await it.pilot.press("f")
        await it.until(lambda: it.engine.asked("open") == [{"conversation": 4}])
        assert store.conversation(4).title.endswith("(fork)")
        assert [node.text for node in store.branch(4)] == [node.text for node in store.branch(3)]


def test_the_conversation_at_hand_is_marked_and_not_deleted(tmp_path: Path, store: Store):
    @chatting(tmp_path, store=store)
    async def check(it: Running) -> None:
        await it.say("/open 3")
        await it.until(lambda: it.chat.state.conversation == 3)
        await it.idle()
        screen = await open_screen(it, "/sessions", SessionsScreen)
        await it.until(lambda: len(list_text(screen)) == 4)
        assert list_text(screen)[0].strip() == "Today"
        assert list_text(screen)[1].startswith("●")
        await it.pilot.press("d")
        await it.until(lambda: it.app._notifications)
        assert len(store.conversations()) == 3


def test_without_a_store_the_screen_is_a_sentence(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await it.say("/sessions")
        await it.until(lambda: ("error", "conversations are not kept in this run") in it.said)


# --- models ---


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models, one of them measured, and one that lacks its weights."""
    folder = tmp_path / "models"
    for name in ("alpha", "beta", "broken"):
        write_checkpoint(folder / name)
    (folder / "broken" / "model.safetensors").unlink()
    monkeypatch.setattr(hubcache.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    figures = {"decode_tokens_per_s": 41.7, "kl_mean": 0.123}
    Measurements(measurements_file()).add(folder / "beta", figures)
    return folder


def in_models(tmp_path: Path, models: Path, *steps: Any, **options: Any) -> Callable[[Check], None]:
    def run(check: Check) -> None:
        @chatting(tmp_path, *steps, models_dir=[str(models)], **options)
        async def checked(it: Running) -> None:
            screen = await open_screen(it, "/model", ModelsScreen)
            await it.until(lambda: screen.rows and len(list_text(screen)) == len(screen.rows))
            await check(it, screen)

    return run


async def go_to(it: Running, screen: ModelsScreen, name: str) -> None:
    """The cursor onto the model `name`, with the keys in the list."""
    place = next(n for n, row in enumerate(screen.rows) if row.cells[1] == name)
    screen.options.focus()
    screen.options.highlighted = place
    await it.until(lambda: screen.current is not None and screen.current.cells[1] == name)


@pytest.mark.parametrize("size", SIZES[:2])
def test_models_are_listed_in_windows_of_all_sizes(tmp_path: Path, models: Path, size):
    @in_models(tmp_path, models, size=size)
    async def check(_: Running, screen: ModelsScreen) -> None:
        rows = {row.cells[1]: " ".join(row.cells) for row in screen.rows}
        assert {"alpha", "beta", "broken", "embedded"} <= rows.keys()
        assert "41.7" in rows["beta"]
        assert "0.123" in rows["beta"]
        assert "has no weights" in rows["broken"]
        drawn = "\n".join(list_text(screen))
        assert "alpha" in drawn
        assert ("41.7" in drawn) == (size[0] >= 100)


def test_the_most_useful_model_is_marked_under_its_heading_and_the_cursor_passes_headings(
    tmp_path: Path, models: Path
):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        headings = [place for place, row in enumerate(screen.rows) if row.heading]
        assert headings[0] == 0 and len(headings) == 2
        assert [row.cells[0] for row in screen.rows].count("★") <= 1
        assert screen.current is not None and not screen.current.heading
        screen.options.focus()
        await it.pilot.press("home")
        assert screen.options.highlighted == 1
        marked = screen.options.render_line(1)
        assert marked.text.startswith("› ") and not screen.options.render_line(2).text.startswith("›")


def test_typing_filters_and_enter_loads_the_first(tmp_path: Path, models: Path):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        await it.pilot.press(*"bet")
        await it.until(lambda: len(list_text(screen)) == 1)
        await it.pilot.press("enter")
        await it.until(lambda: it.engine.asked("load")[-1]["model"] == str(models / "beta"))


def test_escape_empties_the_filter_and_what_follows_is_typed(tmp_path: Path, models: Path):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        await it.pilot.press(*"zzz", "escape")
        await it.until(lambda: screen.filter.value == "" and screen.filter.has_focus)
        await it.pilot.press(*"bet")
        await it.until(lambda: len(list_text(screen)) == 1)
        await it.pilot.press("escape", "escape")
        await it.until(lambda: it.app.screen is not screen)


def test_a_letter_in_the_list_is_a_command(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        lines: list[str | None] = []
        monkeypatch.setattr(screen, "dismiss", lines.append)
        await go_to(it, screen, "beta")
        await it.pilot.press("b", "c")
        await it.until(lambda: isinstance(it.app.screen, ConvertForm))
        await it.pilot.press("enter")
        await it.until(lambda: len(lines) == 2 and it.app.screen is screen)
        await it.pilot.press("i")
        expected = [f"/{name} {models / 'beta'}" for name in ("bench", "convert", "inspect")]
        expected[1] += " -q --q-recipe none --q-bits 4"
        assert lines == expected


async def convert_form(it: Running, screen: ModelsScreen) -> ConvertForm:
    """The form for beta, with its first plan."""
    await go_to(it, screen, "beta")
    await it.pilot.press("c")
    await it.until(lambda: isinstance(it.app.screen, ConvertForm))
    form = cast(ConvertForm, it.app.screen)
    await it.until(lambda: form.plan is not None)
    return form


def test_a_plan_that_fails_after_its_form_was_closed_does_no_harm(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        form = await convert_form(it, screen)

        async def closed() -> None:
            form.dismiss(None)
            await it.until(lambda: not form.is_attached)
            raise UsageError("the engine has stopped")

        monkeypatch.setattr(form, "_planner", closed)
        plan: Any = ConvertForm.refresh_plan
        await plan.__wrapped__(form)  # the worker itself would be cancelled
        assert form.problem == "the engine has stopped"
        assert it.app._exception is None


def test_convert_alone_opens_the_form_for_the_loaded_model(tmp_path: Path, models: Path):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        await go_to(it, screen, "beta")
        await it.pilot.press("enter")
        await it.until(lambda: it.engine.asked("load")[-1]["model"] == str(models / "beta"))
        await it.until(lambda: it.app.chat.status.phase == "idle" and not it.app.chat.busy)
        loaded = it.app.chat.model
        assert loaded is not None
        it.app.chat.model = replace(loaded, path=str(models / "beta"))
        await it.say("/convert")
        await it.until(lambda: isinstance(it.app.screen, ConvertForm))
        form = cast(ConvertForm, it.app.screen)
        await it.until(lambda: form.plan is not None)
        assert "Convert beta" in words_of(form)
        await it.pilot.press("escape")


def words_of(form: ConvertForm) -> str:
    return "\n".join(str(one.content) for one in form.query(Static))


def test_a_form_that_is_closed_before_it_planned_does_no_harm(tmp_path: Path, models: Path):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        form = await convert_form(it, screen)
        await it.pilot.press("escape")
        await it.until(lambda: it.app.screen is screen and not form.is_attached)
        worker = form.refresh_plan()
        await worker.wait()


@pytest.mark.slow
def test_one_letter_converts_nothing_before_enter_in_the_form(tmp_path: Path, models: Path):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        form = await convert_form(it, screen)
        said = words_of(form)
        assert "beta" in said and "none" in said and "GB free" in said and "0.00 GB, 5.80 bits" in said
        assert str(models / "beta-4bit") == form.query_one("#convert-folder", Input).value
        await it.pilot.press("n", "y", "escape")
        await it.until(lambda: it.app.screen is screen)
        assert not it.chat.jobs and not it.engine.asked("convert")
        await convert_form(it, screen)
        await it.pilot.press("enter")
        await it.until(lambda: it.chat.jobs and it.chat.jobs[0].method == "convert")
        await it.until(lambda: it.engine.asked("convert"))
        (asked,) = it.engine.asked("convert")
        assert asked["target"] == str(models / "beta-4bit") and asked["options"]["bits"] == 4


@pytest.mark.slow
def test_the_form_plans_what_its_fields_say_and_converts_that(tmp_path: Path, models: Path):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        form = await convert_form(it, screen)
        recipe, bits = form.query_one("#convert-recipe", Cycle), form.query_one("#convert-bits", Cycle)
        await it.pilot.press("right")
        await it.until(lambda: len(it.engine.asked("plan")) == 2)
        assert (recipe.value, bits.value) == ("unsloth", "4")
        await it.pilot.press("down", "left")
        await it.until(lambda: len(it.engine.asked("plan")) == 3)
        assert (
            it.engine.asked("plan")[-1]["options"] | {"recipe": "unsloth", "bits": 3}
            == (it.engine.asked("plan")[-1]["options"])
        )
        folder = form.query_one("#convert-folder", Input)
        await it.until(lambda: folder.value == str(models / "beta-unsloth-3bit"))
        await it.pilot.press("down", *"-mine")
        await it.until(lambda: form.plan is not None and not form.problem)
        await it.pilot.press("enter")
        await it.until(lambda: it.engine.asked("convert"))
        (asked,) = it.engine.asked("convert")
        assert asked["target"] == str(models / "beta-unsloth-3bit-mine")
        assert asked["options"]["recipe"] == "unsloth" and asked["options"]["bits"] == 3


def test_a_choice_made_while_the_planner_starts_is_planned(tmp_path: Path, models: Path):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        await go_to(it, screen, "beta")
        await it.pilot.press("c")
        await it.until(lambda: isinstance(it.app.screen, ConvertForm))
        form = cast(ConvertForm, it.app.screen)
        form.refresh_plan()  # ends the first plan, whose process has not started
        await it.until(lambda: form.plan is not None)


ALLOCATED = {
    "budget": "4.5 bits per weight",
    "nbytes": 300_000,
    "predicted_kl": 0.05,
    "sensitivity": "beta-sensitivity.json",
    "digest": "d",
    "text": "t",
    "tokens": 1536,
    "curve": [{"nbytes": 200_000, "kl": 1.0}, {"nbytes": 400_000, "kl": 0.01}],
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [(100, 40), (44, 40), (80, 24)])
def test_the_form_shows_the_curve_of_the_recipe_best(size: tuple[int, int], tmp_path: Path, models: Path):
    known = RESULTS_OF_JOBS["plan"] | {"allocation": ALLOCATED, "predicted_kl": 0.05}
    steps = ({"method": "plan"}, {"method": "plan"}, {"method": "plan", "result": known})

    @in_models(tmp_path, models, *steps, size=size)
    async def check(it: Running, screen: ModelsScreen) -> None:
        form = await convert_form(it, screen)
        await it.pilot.press("left")  # the last recipe
        await it.until(lambda: "measured first" in words_of(form))
        assert form.query_one("#form-budget").display and not form.query_one("#form-bits").display
        asked = it.engine.asked("plan")[-1]
        assert asked["budget"] == {"bits_per_weight": 4.5} and asked["measure"] is False
        await it.pilot.press("down", *["backspace"] * 6, *"0.3MB")
        await it.until(lambda: it.engine.asked("plan")[-1]["budget"] == {"nbytes": 300_000})
        await it.until(lambda: "predicted KL divergence 0.05 nats" in " ".join(words_of(form).split()))
        assert ("X 0.3 MB" in words_of(form)) is (size[1] > 24)
        await it.pilot.press("backspace")
        await it.until(lambda: form.problem.startswith("the budget is '0.3M', wanted one like 15GB"))


@pytest.mark.slow
def test_the_form_refuses_a_folder_that_exists(tmp_path: Path, models: Path):
    (models / "beta-4bit").mkdir()

    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        await go_to(it, screen, "beta")
        await it.pilot.press("c")
        await it.until(lambda: isinstance(it.app.screen, ConvertForm))
        form = cast(ConvertForm, it.app.screen)
        await it.until(lambda: "beta-4bit exists already" in words_of(form))
        await it.pilot.press("enter")
        assert it.app.screen is form
        for _ in BITS:  # other bits, another folder
            if form.problem:
                await it.pilot.press("down", "right", "up")
                await it.until(lambda: form.plan is not None or form.problem)
        await it.until(lambda: form.plan is not None)


def test_before_a_second_quantization_the_form_says_so(tmp_path: Path):
    model = LocalModel("beta", tmp_path / "beta", "models folder", nbytes=5 * 10**9, bits_per_weight=5.0)
    assert "quantized already (5.0 bpw)" in source_line(model)
    whole = replace(model, bits_per_weight=16.0)
    assert "quantized already" not in source_line(whole)
    assert source_line(replace(model, bits_per_weight=None)) == "5.00 GB"
    plan = PlanSummary("beta", {}, 4_500_000_000, 4.5, 0, 4_600_000_000, (), ("a note",))
    said = plan_line(plan, tmp_path / "not" / "there")
    assert "→ 4.50 GB, 4.50 bits per weight; needs 4.60 GB of" in said and said.endswith("free\na note")


def test_two_marked_models_are_compared(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        lines: list[str | None] = []
        monkeypatch.setattr(screen, "dismiss", lines.append)
        await go_to(it, screen, "alpha")
        await it.pilot.press("space")
        assert any(line.startswith("◆  alpha") for line in list_text(screen))
        await go_to(it, screen, "beta")
        await it.pilot.press("space")
        assert lines == [f"/compare {models / 'alpha'} {models / 'beta'}"]


def test_what_cannot_be_loaded_says_why(tmp_path: Path, models: Path):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        await go_to(it, screen, "broken")
        await it.pilot.press("enter")
        await it.until(lambda: it.app._notifications)
        assert it.app.screen is screen


@pytest.mark.slow
def test_a_model_is_deleted_only_after_a_yes(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qchat.tui.screens.models.UNDO_SECONDS", 0.01)

    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        for answer in "ny":
            assert (models / "beta").exists()
            await go_to(it, screen, "beta")
            await it.pilot.press("d")
            await it.until(lambda: it.app.screen is not screen)
            await it.pilot.press(answer)
            await it.until(lambda: it.app.screen is screen)
        await it.until(lambda: not (models / "beta").exists())
        await it.until(lambda: "beta" not in {row.cells[1] for row in screen.rows})


async def delete(it: Running, screen: ModelsScreen, name: str) -> None:
    await go_to(it, screen, name)
    await it.pilot.press("d")
    await it.until(lambda: it.app.screen is not screen)
    await it.pilot.press("y")
    await it.until(lambda: name not in {row.cells[1] for row in screen.rows})


@pytest.mark.slow
def test_a_model_on_its_way_out_is_kept_with_one_key(tmp_path: Path, models: Path):
    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        await delete(it, screen, "beta")
        await it.pilot.press("u")
        await it.until(lambda: "beta" in {row.cells[1] for row in screen.rows})
        await it.pilot.press("escape")
        await it.until(lambda: it.app.screen is it.screen)
        assert (models / "beta").exists()


@pytest.mark.slow
@pytest.mark.parametrize("after", ["escape", "d"])
def test_no_time_to_keep_a_model_is_left_when_one_goes_on(tmp_path: Path, models: Path, after: str):
    """To the chat, or to the next deletion."""

    @in_models(tmp_path, models)
    async def check(it: Running, screen: ModelsScreen) -> None:
        await delete(it, screen, "beta")
        assert (models / "beta").exists()
        if after == "d":
            await delete(it, screen, "alpha")
        else:
            await it.pilot.press("escape")
        await it.until(lambda: not (models / "beta").exists())


# --- rewind ---


@pytest.mark.slow
def test_rewinding_lists_the_questions_and_edits_or_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        for question in ("one", "two", "three"):
            await it.ask(question)
        screen = await open_screen(it, "/rewind", RewindScreen)
        await it.until(lambda: len(list_text(screen)) == 3)
        assert screen.current is not None
        assert screen.current.cells[1] == "three"
        await it.pilot.press("k", "f")
        await it.until(lambda: it.engine.asked("fork") == [{"turn": 2}])
        await it.idle()
        screen = await open_screen(it, "/rewind", RewindScreen)
        await it.until(lambda: len(list_text(screen)) == 2)
        lines: list[str | None] = []
        monkeypatch.setattr(screen, "dismiss", lines.append)
        await it.pilot.press("enter")
        assert lines == ["/edit 2"]


def test_what_going_back_costs_is_told_from_the_kept_states():
    turns = [
        replace(new_turn(n, "q"), stats=TurnStats(prompt_tokens=1000 * n, generated_tokens=500))
        for n in (1, 2, 3)
    ]
    snapshots = [SnapshotSummary(1, "B", tokens, 1 << 20) for tokens in (1480, 9999)]
    rows = rows_of(turns, snapshots)
    assert [row.cells[3] for row in rows] == ["instant", "instant", "re-reads 1.0k tokens"]
    assert [row.cells[3] for row in rows_of(turns, ())][1] == "re-reads 1.5k tokens"


# --- help, statistics ---


def test_the_help_holds_every_key_and_command_as_they_are_now(tmp_path: Path):
    @chatting(tmp_path, keys={"sessions": "f9"})
    async def check(it: Running) -> None:
        await it.pilot.press("f1")
        await it.until(lambda: it.app.screen is not it.screen)
        await it.until(lambda: "esc" in static_text(it.app.screen, "#sheet-report"))
        text = static_text(it.app.screen, "#sheet-report")
        assert "f9" in text
        assert "f3" not in text.split()
        for action in ACTIONS:
            assert it.front.keymap.shown(action.id).split()[0] in text
            assert action.id in text.split()
        for command in COMMANDS:
            assert f"/{command.name}" in text
        before = it.app.screen.query_one("#sheet-text").scroll_y
        await it.pilot.press("j", "j", "space")
        await it.until(lambda: it.app.screen.query_one("#sheet-text").scroll_y > before)
        await it.pilot.press("q")
        await it.until(lambda: it.app.screen is it.screen)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES[1:3])
def test_the_sheets_are_drawn_in_windows_of_all_sizes(tmp_path: Path, size):
    @chatting(tmp_path, size=size)
    async def check(it: Running) -> None:
        await it.ask("one")
        for command, word in (("/stats", "tok"), ("/help", "/model")):
            await it.say(command)
            await it.until(lambda: it.app.screen is not it.screen)
            await it.until(lambda word=word: word in static_text(it.app.screen, "#sheet-report"))
            await it.pilot.press("escape")
            await it.until(lambda: it.app.screen is it.screen)


# --- themes ---


@pytest.mark.slow
def test_a_theme_is_worn_under_the_cursor_kept_with_enter_and_put_off_with_escape(tmp_path: Path):
    @chatting(tmp_path)
    async def check(it: Running) -> None:
        assert it.app.theme == "night"
        screen = await open_screen(it, "/theme", ThemeScreen)
        await it.pilot.press("down")
        await it.until(lambda: it.app.theme != "night")
        await it.pilot.press("escape")
        await it.until(lambda: it.app.theme == "night" and it.app.screen is it.screen)
        assert not config_file().exists()
        screen = await open_screen(it, "/theme", ThemeScreen)
        await it.pilot.press("down")
        worn = screen._worn
        await it.pilot.press("enter")
        await it.until(lambda: it.app.screen is it.screen)
        assert it.app.theme == worn != "night"
        assert Settings.load(cwd=tmp_path)["theme"] == worn


@pytest.mark.slow
def test_a_theme_edited_beside_the_picker_is_seen(tmp_path: Path):
    folder = config_file().parent / "themes"
    folder.mkdir(parents=True)

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        screen = await open_screen(it, "/theme", ThemeScreen)
        (folder / "mine.toml").write_text("nonsense = 1\n")
        await it.until(lambda: "mine.toml" in static_text(screen, "#theme-problems"))


@pytest.mark.slow
def test_a_theme_added_or_edited_while_the_app_runs_can_be_kept(tmp_path: Path):
    text = 'description = "mine"\n[colors]\nprimary = "{}"\nforeground = "white"\nbackground = "black"\n'
    file = config_file().parent / "themes" / "mine.toml"
    file.parent.mkdir(parents=True)

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        file.write_text(text.format("#ff0000"))
        screen = await open_screen(it, "/theme", ThemeScreen)
        screen._show("mine")
        await it.pilot.press("enter")
        await it.until(lambda: it.app.screen is it.screen and it.is_at_rest())
        assert it.app.theme == "mine" and not it.said
        file.write_text(text.format("#00ff0a"))
        await it.say("/theme mine")
        await it.until(lambda: it.app.theme_variables["primary"] == "#00FF0A")


@pytest.mark.slow
def test_a_settings_file_that_cannot_be_changed_keeps_the_theme_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(name: str, value: str) -> None:
        raise UsageError(f"{name} cannot be {value}")

    monkeypatch.setattr("qchat.tui.screens.theme.save", refuse)

    @chatting(tmp_path)
    async def check(it: Running) -> None:
        await open_screen(it, "/theme", ThemeScreen)
        await it.pilot.press("down", "enter")
        await it.until(lambda: it.app.screen is it.screen and it.app.theme != "night")
        await it.until(lambda: any("cannot be" in toast.message for toast in it.app._notifications))


@pytest.mark.slow
def test_screens_over_a_reply_do_not_hold_it_up(tmp_path: Path):
    """A list is open while words arrive: nothing is lost, and the chat is up to date when it is closed."""

    @chatting(tmp_path, {"method": "send", "answer": "word " * 400, "seconds": 0.01})
    async def check(it: Running) -> None:
        await it.say("one")
        await it.until(lambda: it.phase == "answering")
        await it.pilot.press("f2")
        await it.until(lambda: isinstance(it.app.screen, Listing))
        await it.idle()
        await it.pilot.press("escape")
        await it.until(lambda: it.app.screen is it.screen)
        assert it.chat.state.turns[0].answer.count("word") == 400


@pytest.mark.parametrize("width", [30, 60, 100])
def test_keys_without_room_go_but_the_way_out_stays(width: int):
    line = hint_line(SessionsScreen.KEYS, width)
    assert line.cell_length <= width
    assert line.plain.endswith("esc close")
