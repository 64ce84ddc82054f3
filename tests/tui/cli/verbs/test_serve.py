"""`qchat serve` from its command line: what is refused, and a server that ctrl+c ends."""

import os
import re
import signal
import subprocess
import sys

import httpx2
import pytest

from qchat.tui.cli.main import main
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--host", "0.0.0.0"], "others on the network reach 0.0.0.0"),
        (["--port", "70000"], "--port is 70000"),
        (["--port", "many"], "invalid int value"),
        (["--api-key", ""], "--api-key is empty"),
        (["--max-waiting", "-1"], "--max-waiting is -1"),
        (["--option", "nothing=1"], "there is no setting nothing"),
    ],
)
def test_bad_options_are_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "built-in", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_server_answers_until_ctrl_c_and_logs_what_was_done_but_not_what_was_said():
    command = [sys.executable, "-m", "qchat.tui", "serve", "built-in", "--port", "0", "--log-requests"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".dev")}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            greeting = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", greeting)
            assert found, greeting
            body = {"messages": [{"role": "user", "content": "secret words"}], "max_tokens": 2}
            assert httpx2.post(f"{found[0]}/v1/chat/completions", json=body, timeout=60).status_code == 200
            process.send_signal(signal.SIGINT)
            log = process.stderr.read()
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert "/v1/chat/completions from 127.0.0.1" in log
    assert "2 generated" in log
    assert "secret" not in log


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_exit_code(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "./nowhere", "--port", "0"]) == 3
    assert "nowhere" in capsys.readouterr().err
