"""Forms of operations are tried and raced in a child process, whatever they do there."""

import json
import sys
import threading
from pathlib import Path

import pytest

from qchat.core import Session
from qchat.core.engine.engine import Engine
from qchat.core.events import Done
from qchat.core.kernels import launch
from qchat.core.machine.backend import mx
from qchat.core.ops import choices, tuning
from qchat.core.ops.candidates import Dimensions, contests
from qchat.core.ops.gated_delta import delta_forms
from qchat.core.ops.race import run, without_paths
from qchat.core.ops.tuning import GPU_LIMIT_SECONDS, GRACE_SECONDS, Tuner, sentences
from qchat.core.ops.verdicts import ENDED, Record, Result, winners
from tests.checkpoints import write_checkpoint

PLANTED = Path(__file__).with_name("planted.py")
DIMENSIONS = Dimensions("float32", (2, 32, 6, 16, 4), (4, 2, 32, 8))
SHAPE = choices.delta_shape(2, 32, 6, 16)


@pytest.fixture(autouse=True)
def forget_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QCHAT_TUNE", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # without other tests' verdicts
    yield
    choices.forget()
    launch._distrusted.clear()
    launch._trusted.clear()


def planted(kinds: str, folder: Path, *, limit: float = 60.0) -> Tuner:
    """A tuner whose child tries the forms `kinds`, the usual one first."""
    command = [sys.executable, str(PLANTED), kinds]
    return Tuner(DIMENSIONS, Record(folder / "record.jsonl"), command=command, limit_seconds=limit)


def finished(kinds: str, folder: Path, *, limit: float = 60.0) -> Tuner:
    tuner = planted(kinds, folder, limit=limit)
    assert tuner.wait(240)
    return tuner


def forms_of(tuner: Tuner) -> dict[str, Result]:
    return {result.form: result for result in tuner.results}


# --- planted forms ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "failure"),
    [
        ("wrong", "it is off by 5.0e-02"),
        ("no_number", "it is off by nan"),
        ("raising", "unable to build ... at all"),
    ],
)
def test_a_form_that_is_wrong_is_never_chosen(kind: str, failure: str, tmp_path: Path):
    tuner = finished(f"slow,{kind}", tmp_path)
    assert forms_of(tuner)[kind].failure == failure
    assert tuner.winners == {("planted", "shape"): "mlx"}
    assert tuner.adopt() == [f"the form {kind} of planted is not used here: {failure}"]


@pytest.mark.slow
def test_a_form_that_is_slow_loses_and_a_fast_one_wins(tmp_path: Path):
    (tmp_path / "other").mkdir()
    assert finished("right,slow", tmp_path).winners == {("planted", "shape"): "mlx"}
    assert finished("slow,right", tmp_path / "other").winners == {("planted", "shape"): "right"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crash", "hang", "deaf"])
def test_a_form_that_ends_the_process_costs_a_sentence_and_the_others_are_tried(kind: str, tmp_path: Path):
    tuner = finished(f"slow,{kind},right", tmp_path, limit=60.0 if kind == "crash" else 2.0)
    assert forms_of(tuner)[kind].failure == ENDED
    assert tuner.winners == {("planted", "shape"): "right"}
    assert tuner.adopt() == [f"the form {kind} of planted is not used here: {ENDED}"]


def test_a_hang_is_said_within_five_seconds():
    assert GPU_LIMIT_SECONDS + GRACE_SECONDS < 5


def test_what_ended_a_process_is_not_tried_again_by_another_one(tmp_path: Path):
    record = Record(tmp_path / "record.jsonl")
    record.begin(Result("planted", "shape", "crash", 1e-3))
    tuner = finished("slow,crash", tmp_path)
    assert forms_of(tuner)["crash"].failure == ENDED
    assert tuner._children == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crash", "hang", "wrong"])
def test_a_chat_runs_on_mlxs_operations_where_our_kernels_fail(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_checkpoint(tmp_path / "model", head_dim=256)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "_device", lambda: "cuda")
    monkeypatch.setattr("qchat.core.ops.verdicts.compiler_version", lambda: "1")
    monkeypatch.setattr(tuning, "COMMAND", [sys.executable, str(PLANTED), f"right,{kind},ours"])
    monkeypatch.setattr(tuning, "GPU_LIMIT_SECONDS", 2.0)
    monkeypatch.setattr(tuning, "LOAD_SECONDS", 240.0)
    engine = Engine.load(tmp_path / "model")
    said = "are off by 5%" if kind == "wrong" else "do not run here"
    assert [notice for notice in engine.notices if f"qchat's GPU kernels {said}" in notice]
    assert launch.backend() is None
    *_, done = Session(engine, max_new_tokens=4, seed=1).stream("hello")
    assert isinstance(done, Done) and done.finish_reason in ("length", "stop")


def test_while_a_first_trial_is_running_our_kernels_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "_device", lambda: "cuda")
    tuner = planted("right,hang", tmp_path)
    with tuner.record.lock() as alone:
        assert alone and tuner.record.racing
        tuner.record.begin(Result("planted", "shape", choices.OURS, 1e-3))
        assert tuner.adopt() == [] and launch.backend() is None
        tuner.record.add(Result("planted", "shape", choices.OURS, 1e-3, error=0.0, seconds=1e-3))
        tuner.record.end()
    assert tuner.adopt() == [] and launch.backend() == "cuda"


# --- records ---


def test_other_forms_than_the_usual_one_must_be_clearly_faster():
    def contest(*seconds: float | None) -> list[Result]:
        names = ("chunked", "mlx", "ours")
        return [
            Result("a", "b", name, 1.0, error=0.0, seconds=s, failure="" if s else "no")
            for name, s in zip(names, seconds, strict=False)
        ]

    key = ("a", "b")
    assert winners(contest(1.0, 0.97)) == {key: "chunked"}
    assert winners(contest(1.0, 0.9)) == {key: "mlx"}
    assert winners(contest(1.0, 0.9, 0.5)) == {key: "ours"}
    assert winners(contest(None, 5.0)) == {key: "mlx"}
    assert winners(contest(1.0)) == winners(contest(None, None)) == {}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"form": 1}', '{"operation": "a"}', "\x00\ufffd", '{"complete": true', "null\n3"]
)
def test_a_damaged_record_is_one_that_knows_nothing(text: str, tmp_path: Path):
    record = Record(tmp_path / "record.jsonl")
    record.path.write_text(text)
    assert record.results() == [] and not record.complete


def test_the_record_differs_by_shape_and_survives_json():
    other = Dimensions(
        "bfloat16", (2, 32, 6, 16, 4), (4, 2, 32, 8), ((8, 64, (4, 64, "affine")), (8, 64, None))
    )
    assert Record.of(DIMENSIONS).path != Record.of(other).path
    assert Record.of(DIMENSIONS).path == Record.of(DIMENSIONS).path
    assert Dimensions.from_json(json.loads(json.dumps(other.as_json()))) == other


def test_failures_name_no_paths():
    said = without_paths("cannot open /home/beatrix/.cache/x.metal: no ~/space; 3 of 4/5 at ../a/b, ok")
    assert said == "cannot open ...: no ...; 3 of 4... at ..., ok"


# --- what is chosen ---


def test_the_forms_of_the_delta_rule_pass_here_and_the_fastest_is_used(tmp_path: Path):
    record = Record(tmp_path / "record.jsonl")
    run(contests(DIMENSIONS), record)
    results = record.results()
    assert record.complete and sentences(results) == []
    assert {(r.operation, r.form) for r in results} == {
        (choices.delta_operation(length), form) for length in choices.LENGTHS for form in ("chunked", "mlx")
    }
    assert all(r.passed and r.error is not None and r.error <= r.limit == 2e-5 for r in results)
    choices.adopt(winners(results))
    for length, form in delta_forms(2, 32, 6, 16).items():
        assert form == winners(results)[choices.delta_operation(length), SHAPE]


def test_tune_off_takes_the_usual_forms(monkeypatch: pytest.MonkeyPatch):
    choices.adopt({(choices.delta_operation("1 token"), SHAPE): "mlx"})
    assert delta_forms(2, 32, 6, 16)["1 token"] == "mlx"
    monkeypatch.setenv("QCHAT_TUNE", "off")
    assert delta_forms(2, 32, 6, 16)["1 token"] == "chunked"
    monkeypatch.setattr(launch, "_device", lambda: "cuda")
    assert launch.backend() is None
    monkeypatch.setenv("QCHAT_KERNELS", "on")
    assert launch.backend() == "cuda"


def test_on_metal_kernels_are_used_once_all_have_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_device", lambda: "metal")
    assert launch.backend() is None
    tuner = planted("right", tmp_path)
    for name, seconds in (("mlx", 2e-3), (choices.OURS, 1e-3)):
        tuner.record.add(Result("attention, 1 token", "s", name, 1e-2, error=0.0, seconds=seconds))
    tuner.record.end()
    assert tuner.adopt() == []
    assert launch.backend() == "metal" and choices.takes_ours("attention, 1 token", "s")


def test_a_model_adopts_the_winner_and_its_saved_states_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_checkpoint(tmp_path / "model")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    monkeypatch.setenv("QCHAT_NATIVE", "off")
    usual = Engine.load(tmp_path / "model")
    shape = choices.delta_shape(2, 32, 4, 32)
    choices.adopt({(choices.delta_operation(length), shape): "mlx" for length in choices.LENGTHS})
    other = Engine.load(tmp_path / "model")
    assert (usual.model.delta_forms, other.model.delta_forms) == ("chunked", "mlx")
    assert mx.allclose(usual.logits(ids), other.logits(ids), 1e-3, 1e-3)
    assert usual.precompiler and other.precompiler
    from qchat.core.prompt_cache.disk_tier import DiskTier

    identities = [DiskTier(tmp_path, engine)._identity() for engine in (usual, other)]
    assert identities[0] != identities[1]


def test_idle_time_finds_the_verdict_after_the_first_reply_and_says_what_failed(tmp_path: Path):
    from types import SimpleNamespace
    from typing import Any, cast

    from qchat.core.worker.methods import TUNING, EngineMethods

    said: list[str] = []
    notes: list[str] = []
    over = threading.Event()

    def background(text: str) -> None:
        said.append(text)
        if not text:
            over.set()

    tuner = planted("slow,wrong", tmp_path)
    engine = SimpleNamespace(model=SimpleNamespace(tuner=tuner), precompiler=None)
    session = cast(Any, SimpleNamespace(engine=engine, note=notes.append))
    methods = EngineMethods(lambda _: None, lambda: False, background=background)
    methods._tune(session)
    assert said == [] and not tuner.results
    methods._replied = True
    methods._tune(session)
    assert over.wait(240)
    assert said == [TUNING, ""] and tuner.complete
    assert notes == ["the form wrong of planted is not used here: it is off by 5.0e-02"]
    methods._tune(session)
    assert said == [TUNING, ""]
