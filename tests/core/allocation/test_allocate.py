"""Budgets: kept to the byte, used up, refused where nothing fits; what a conversion makes of the choice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qchat.core.allocation.allocate import Budget, allocate, predict_folder
from qchat.core.allocation.measure import measure_sensitivity
from qchat.core.checkpoint.config import ModelConfig
from qchat.core.conversion.convert import Conversion, convert
from qchat.core.conversion.source import Source
from qchat.core.errors import UsageError
from qchat.core.quant.allocated import Allocation
from qchat.core.quant.plan import make_plan
from qchat.core.quant.recipes import Options
from qchat.core.quant.results import AllocationSummary
from qchat.core.worker.jobs import run_job
from tests.checkpoints import write_checkpoint

TEXT = "<|im_start|>user\nHow deep is the well?<|im_end|>\n" * 3
BEST = Options(recipe="best")
LARGEST_STEP = 288 * 64 * 2 // 8 + 288 * 64 // 32 * 4  # of the embedding, from 6 to 8 bits in smaller groups


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its sensitivities beside it."""
    place = tmp_path_factory.mktemp(request.param)
    folder, text = place / "model", place / "text.txt"
    write_checkpoint(folder, moe=request.param == "moe", tied=request.param == "dense")
    text.write_text(TEXT)
    measure_sensitivity(Source.open(folder), place / "model-sensitivity.json", text=text)
    return folder


def summary(allocation: Allocation) -> AllocationSummary:
    assert allocation.summary is not None
    return allocation.summary


def sizes(folder: Path) -> range:
    """Some sizes between the least and the largest."""
    curve = summary(allocate(folder, BEST, Budget(bits_per_weight=8))).curve
    headers = 30_000  # or a little less
    first, last = curve[0].nbytes + headers, curve[-1].nbytes
    return range(first, last, (last - first) // 4)


@pytest.mark.slow
def test_the_files_never_exceed_the_budget_and_use_it_up(model: Path, tmp_path: Path):
    for nbytes in sizes(model):
        allocation = allocate(model, BEST, Budget(nbytes=nbytes))
        conversion = Conversion(model, tmp_path / f"{nbytes}", BEST, allocation=allocation)
        report = convert(conversion, lambda _: None)
        written = sum(path.stat().st_size for path in conversion.target.glob("*.safetensors"))
        assert nbytes - LARGEST_STEP < written <= nbytes
        assert written == report.nbytes
        assert report.plan.total_bytes == summary(allocation).nbytes


def test_more_bytes_are_predicted_to_be_better(model: Path):
    found = [summary(allocate(model, BEST, Budget(nbytes=nbytes))) for nbytes in sizes(model)]
    assert [one.predicted_kl for one in found] == sorted((one.predicted_kl for one in found), reverse=True)
    curve = found[0].curve
    assert [point.nbytes for point in curve] == sorted(point.nbytes for point in curve)
    assert [point.kl for point in curve] == sorted((point.kl for point in curve), reverse=True)
    assert all(one.curve == curve for one in found)


def test_a_budget_of_bits_and_one_of_speed_are_kept(model: Path):
    config = ModelConfig.load(model)
    by_bits = allocate(model, BEST, Budget(bits_per_weight=6))
    assert 5.8 < make_plan(config, BEST, by_bits.table).total.bits_per_weight <= 6
    read = make_plan(config, Options(recipe="none", bits=4)).total.read_nbytes
    speed = Budget(tokens_per_s=1e6, bandwidth_gb_s=read / 1000)
    plan = make_plan(config, BEST, allocate(model, BEST, speed).table)
    assert plan.tokens_per_s(read / 1000) >= 1e6
    assert plan.total.read_nbytes > 0.95 * read


def test_what_every_recipe_pins_stays_pinned(model: Path):
    table = allocate(model, BEST, Budget(bits_per_weight=5)).table
    plan = make_plan(ModelConfig.load(model), BEST, table)
    modes = {row.name: row.mode for row in plan.rows if row.name in ("router", "delta a/b")}
    assert set(modes.values()) == {"affine 8-bit group 64"}
    kept = replace(BEST, keep_bf16=True)
    plan = make_plan(ModelConfig.load(model), kept, allocate(model, kept, Budget(bits_per_weight=8)).table)
    dense = {row.name for row in plan.rows if row.mode == "bfloat16"}
    assert {"attention o", "delta out", "delta a/b"} <= dense


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        (Budget(nbytes=1000), r"cannot be met: the least size is [\d,]+ bytes"),
        (Budget(bits_per_weight=1), r"cannot be met: the least is [\d.]+ bits per weight"),
        (Budget(tokens_per_s=1e9, bandwidth_gb_s=1), r"cannot be met: the most is [\d.]+ tokens/s"),
        (Budget(), "give one of --target-size, --target-bpw and --target-speed"),
        (Budget(nbytes=-1), "--target-size is -1, wanted a finite number above 0"),
        (Budget(bits_per_weight=float("nan")), "--target-bpw is nan"),
        (Budget(tokens_per_s=1.0), "--bandwidth is 0, wanted"),
    ],
)
def test_an_impossible_budget_gets_one_sentence(budget: Budget, sentence: str, model: Path):
    with pytest.raises(UsageError, match=sentence) as caught:
        allocate(model, BEST, budget)
    assert "\n" not in str(caught.value)


def test_the_least_size_that_is_named_can_be_met(model: Path):
    with pytest.raises(UsageError) as caught:
        allocate(model, BEST, Budget(nbytes=1000))
    least = int(str(caught.value).split("least size is ")[1].split(" ")[0].replace(",", ""))
    allocate(model, BEST, Budget(nbytes=least))
    with pytest.raises(UsageError):
        allocate(model, BEST, Budget(nbytes=least - 1))


@pytest.mark.parametrize("flag", [{"bits": 4}, {"group_size": 32}, {"mode": "mxfp4"}, {"mxfp": True}])
def test_flags_that_choose_bits_contradict_the_recipe(flag: dict, model: Path):
    with pytest.raises(UsageError, match="contradicts the recipe best"):
        allocate(model, replace(BEST, **flag), Budget(bits_per_weight=5))


def test_the_card_tells_the_budget_and_what_it_rests_on(model: Path, tmp_path: Path):
    found = run_job(
        "convert",
        {
            "source": str(model),
            "target": str(tmp_path / "new"),
            "options": {"recipe": "best"},
            "budget": {"bits_per_weight": 5.5},
            "flags": ["-q", "--q-recipe", "best", "--target-bpw", "5.5"],
        },
        lambda _: None,
    )
    card = (tmp_path / "new/README.md").read_text()
    told = found["allocation"]
    fields = json.loads((model.parent / "model-sensitivity.json").read_text())
    assert told["digest"] == fields["digest"] and told["text"] == fields["text"]
    for part in ("| budget | 5.5 bits per weight |", told["digest"], told["text"], "--target-bpw 5.5"):
        assert part in card
    assert f"{told['predicted_kl']:.3g} nats" in card
    assert "KL divergence of" not in card.partition("## Checks")[2]
    kept = json.loads((tmp_path / "new/conversion.json").read_text())
    assert kept["allocation"] == json.loads(json.dumps(told))


def test_a_plan_of_any_affine_recipe_has_a_predicted_divergence(model: Path):
    fine, coarse = (predict_folder(model, Options(recipe="none", bits=bits)) for bits in (8, 3))
    assert fine is not None and coarse is not None and 0 < fine < coarse
    assert predict_folder(model, Options(recipe="none", mode="mxfp4")) is None
    planned = run_job("plan", {"source": str(model), "options": {"bits": 3}}, lambda _: None)
    assert planned["predicted_kl"] == pytest.approx(coarse)


def test_a_plan_without_measurements_has_the_size_alone(tmp_path: Path):
    write_checkpoint(tmp_path / "model")
    params = {"source": str(tmp_path / "model"), "options": {"recipe": "best"}, "measure": False}
    plan = run_job("plan", params | {"budget": {"bits_per_weight": 5}}, lambda _: None)
    assert 4.8 < plan["bits_per_weight"] <= 5
    assert "allocation" not in plan and "predicted_kl" not in plan
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UsageError, match="the recipe best needs a budget"):
        run_job("plan", params, lambda _: None)
    with pytest.raises(UsageError, match=r"the budget .* is not one"):
        run_job("plan", params | {"budget": {"size": "15GB"}}, lambda _: None)
