"""The command on real checkpoints: a trained one where it is at hand, a random one made here."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qchat.core import Store, load_session
from qchat.core.errors import ModelError
from qchat.tui.user.paths import conversations_file
from tests.checkpoints import write_checkpoint
from tests.paths import QTINY, ROOT

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
