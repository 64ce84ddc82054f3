"""The command on real checkpoints: a trained one where it is at hand, a random one made here."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from qchat.core import Store, load_session
from qchat.core.errors import ModelError
from qchat.tui.user.paths import conversations_file
from tests.checkpoints import write_checkpoint
from tests.paths import QTINY, ROOT

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Berlin"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
needs_qtiny = pytest.mark.skipif(not QTINY.exists(), reason="needs the trained checkpoint qtiny-24m")


def start(*words: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qchat.tui", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".dev")},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def qchat(model: Path, *arguments: str, piped: str = "") -> tuple[int, str, str]:
    """The exit code, stdout and stderr."""
    return run_qchat(str(model), *arguments, piped=piped)


def run_qchat(*words: str, piped: str = "") -> tuple[int, str, str]:
    process = start(*words, stdin=subprocess.PIPE)
    out, err = process.communicate(piped, timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


@pytest.mark.slow
@needs_qtiny
def test_the_capital_of_france_is_paris():
    code, out, err = qchat(QTINY, "-p", "What is the capital of France?", "--no-think", "--temperature", "0")
    assert (code, out) == (0, "The capital of France is Paris.\n")
    assert "no chat template" in err


@pytest.mark.slow
@needs_qtiny
def test_a_piped_sum_is_thought_about_on_stderr_and_answered_on_stdout():
    code, out, err = qchat(
        QTINY, "--think", "--show-thinking", "--temperature", "0", piped="What is 17 + 25?\n"
    )
    assert code == 0
    assert out.rstrip(".\n").endswith("42")
    assert "37 + 5 = 42" in err


@pytest.mark.slow
def test_equal_seeds_give_equal_replies_and_the_counts_add_up(random_model: Path):
    arguments = (
        "-p",
        "hello",
        "--json",
        "--seed",
        "5",
        "--max-tokens",
        "12",
        "--think",
        "--temperature",
        "1",
    )
    runs = [qchat(random_model, *arguments) for _ in range(2)]
    replies = [json.loads(out) for _, out, _ in runs]
    assert [code for code, _, _ in runs] == [0, 0]
    assert replies[0]["text"] == replies[1]["text"]
    assert replies[0]["thinking"] == replies[1]["thinking"]
    assert replies[0]["usage"] == replies[1]["usage"]
    assert replies[0]["usage"]["completion_tokens"] <= 12
    assert replies[0]["finish_reason"] in ("stop", "length")


@pytest.mark.slow
@needs_qtiny
def test_an_interrupt_stops_a_real_reply_between_tokens():
    arguments = ("-p", "Tell me a story", "--jsonl", "--no-think", "--temperature", "0")
    with start(str(QTINY), *arguments) as process:
        assert process.stdout is not None
        while json.loads(process.stdout.readline())["event"] != "text":
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    done = json.loads(out.splitlines()[-1])
    assert (done["event"], done["finish_reason"]) == ("done", "cancelled")


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        (("--temperature", "-1"), 2, "temperature is -1.0, wanted a number from 0 to 100"),
        (("--max-tokens", "0"), 2, "max_tokens is 0"),
        (("--stop", ""), 2, "stop is"),
    ],
)
def test_a_value_out_of_range_is_one_sentence(
    random_model: Path, arguments: tuple[str, ...], code: int, wanted: str
):
    got, out, err = qchat(random_model, "-p", "hello", *arguments)
    assert (got, out) == (code, "")
    assert wanted in err
    assert err.count("\n") == 1


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(random_model: Path):
    code, out, err = qchat(random_model, piped="word " * 2000)
    assert (code, out) == (4, "")
    assert "tokens and the context holds 4,096" in err


def test_a_missing_model_is_code_3(tmp_path: Path):
    code, out, err = qchat(tmp_path / "nowhere", "-p", "hello")
    assert (code, out) == (ModelError.exit_code, "")
    assert f"the model folder {tmp_path / 'nowhere'} does not exist" in err


# --- answers in the form of a schema ---


@pytest.fixture
def city(tmp_path: Path) -> str:
    (tmp_path / "city.json").write_text(json.dumps(CITY))
    return str(tmp_path / "city.json")


def test_an_answer_is_the_json_of_its_schema_and_nothing_else(random_model: Path, city: str):
    code, out, err = qchat(
        random_model, "-p", "Where?", "--schema", city, "--no-think", "--temperature", "2", "--seed", "1"
    )
    assert code == 0, err
    jsonschema.validate(json.loads(out), CITY)
    assert out.startswith("{") and out.endswith("}\n")


@pytest.mark.slow
def test_it_follows_a_free_thought_and_streams_as_it_comes(random_model: Path, city: str):
    thinking = ("--think", "--thinking-budget", "9", "--temperature", "2", "--seed", "2")
    code, out, _ = qchat(random_model, "-p", "Where?", "--schema", city, *thinking, "--show-thinking")
    assert code == 0
    jsonschema.validate(json.loads(out), CITY)
    code, lines, _ = qchat(random_model, "-p", "Where?", "--schema", city, *thinking, "--jsonl")
    events = [json.loads(line) for line in lines.splitlines()]
    pieces = [event["text"] for event in events if event["event"] == "text"]
    assert code == 0 and len(pieces) > 5
    assert "".join(pieces) == events[-1]["text"]
    assert json.loads("".join(pieces)) == json.loads(out)
    assert events[-1]["reasoning_tokens"] >= 9 and events[-1]["thinking"]


@pytest.mark.slow
@needs_qtiny
@pytest.mark.parametrize("think", ["--think", "--no-think"])
def test_a_trained_model_answers_in_the_form_of_a_schema(think: str, city: str):
    question = ("-p", "What is the capital of France?", "--temperature", "0", "--thinking-budget", "40")
    code, out, err = qchat(QTINY, *question, think, "--schema", city)
    assert code == 0, err
    jsonschema.validate(json.loads(out), CITY)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"type": "name"}', '{"not": {}}', " " * (5 << 20)])
def test_a_bad_schema_is_code_2_before_a_model_is_looked_for(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    code, out, err = qchat(tmp_path / "nowhere", "-p", "hello", "--schema", str(tmp_path / "bad.json"))
    assert (code, out) == (2, "")
    assert err.startswith("qchat: --schema: schema is '") and "nowhere" not in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("limit", [("--max-tokens", "4"), ("--stop", "c")])
def test_half_a_document_is_code_1(random_model: Path, city: str, limit: tuple[str, ...]):
    code, out, err = qchat(random_model, "-p", "Where?", "--schema", city, "--no-think", *limit)
    assert code == 1
    assert out.startswith("{")
    assert err.endswith("the answer ends before its JSON does, so it does not satisfy the schema\n")


@pytest.mark.slow
def test_a_conversation_goes_on_with_and_without_a_schema(random_model: Path, city: str):
    with Store(conversations_file()) as store:
        session = load_session(random_model, store=store, max_new_tokens=4, temperature=0)
        session.send("hello")
        session.close()
    brief = ("--max-tokens", "120", "--temperature", "0", "--no-think", "--json")
    for schema in (("--schema", city), (), ("--schema", city)):
        code, out, err = run_qchat("-c", "-p", "and?", *brief, *schema)
        assert code == 0, err
        reply = json.loads(out)
        assert reply["usage"]["cached_tokens"] > 0
        if schema:
            jsonschema.validate(json.loads(reply["text"]), CITY)


@pytest.mark.slow
def test_the_last_conversation_goes_on_and_is_kept(random_model: Path):
    """Twice, so that the second run meets what the first one wrote; the model is the one it was held with."""
    with Store(conversations_file()) as store:
        session = load_session(random_model, store=store, max_new_tokens=4, temperature=0)
        session.send("hello")
        session.close()
        first = [node.ids for node in store.branch(session.conversation or 0)]
    for question in ("and then?", "go on"):
        code, out, err = run_qchat("-c", "-p", question, "--max-tokens", "4", "--temperature", "0", "--json")
        assert code == 0, err
        assert json.loads(out)["usage"]["cached_tokens"] > 0
    with Store(conversations_file()) as store:
        nodes = store.branch(store.conversations()[0].id)
    assert [node.text for node in nodes if node.role == "user"] == ["hello", "and then?", "go on"]
    assert [node.ids for node in nodes][: len(first)] == first
