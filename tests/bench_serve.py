"""The server's cost: time to the first token of a cached prompt, and time per token beside one-shot runs.

Run it with `make bench-serve`. With the `peers` group, or MLX_LM_PYTHON naming a Python that has mlx-lm,
`mlx_lm.server` is measured in the same run, on the same model and prompt.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from qchat.core.hub.catalog import BUILT_IN_MODEL
from qchat.core.native.compiler import find_compiler
from qchat.core.text.tokenizer import Tokenizer
from tests.tui.serve.running_server import RunningServer

ROUNDS, TOKENS, PROMPT_TOKENS = 5, 200, 2000
PEER_NAME = "mlx_lm.server"
PEER = os.environ.get("MLX_LM_PYTHON", sys.executable)
START_SECONDS = 120.0
USAGE = {"stream_options": {"include_usage": True}}
WORDS = "The harbour was quiet and the boats lay still under a grey sky. "


def longer_model(folder: Path) -> Path:
    """A copy of the embedded model whose context holds the prompt and the reply."""
    shutil.copytree(BUILT_IN_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prompt_of(tokenizer: Tokenizer) -> str:
    """A text of about PROMPT_TOKENS tokens."""
    each = len(tokenizer.encode(WORDS))
    return WORDS * (PROMPT_TOKENS // each)


def body_of(prompt: str, **fields: Any) -> dict[str, Any]:
    question = {"role": "user", "content": prompt}
    return {"messages": [question], "max_tokens": TOKENS, "temperature": 0, "stream": True, **USAGE, **fields}


def stream_seconds(http: httpx2.Client, body: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first text of a streamed reply, and seconds for each of its later tokens."""
    begin, times, tokens = time.perf_counter(), [], 0
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            chunk = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            if _has_text(chunk):
                times.append(time.perf_counter())
    return times[0] - begin, (times[-1] - times[0]) / max(tokens - 1, 1)


def _has_text(chunk: dict[str, Any]) -> bool:
    delta = (chunk.get("choices") or [{}])[0].get("delta") or {}
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"))


def measure(url: str, prompt: str, **fields: Any) -> tuple[float, float]:
    """The medians of both over ROUNDS, after a first round that fills the cache."""
    with httpx2.Client(base_url=url, timeout=600) as http:
        found = [stream_seconds(http, body_of(prompt, **fields)) for _ in range(ROUNDS + 1)][1:]
    first, each = zip(*found, strict=True)
    return statistics.median(first), statistics.median(each)


def measure_alone(folder: Path, prompt: str) -> float:
    """Seconds per token of the same reply in one-shot runs."""
    words = [
        "-p",
        prompt,
        "--json",
        "--max-tokens",
        str(TOKENS),
        "--temperature",
        "0",
        "-o",
        "stop_loops=false",
    ]
    command = [sys.executable, "-m", "qchat.tui", str(folder), *words]
    runs = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(ROUNDS))
    return 1 / statistics.median(json.loads(run)["timings"]["decode_tokens_per_s"] for run in runs)


def peer_urls(folder: Path) -> Iterator[str]:
    """Start `mlx_lm.server` on the folder and yield its address; print why where that fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run([PEER, "-c", "import mlx_lm"], capture_output=True, env=environment).returncode:
        print(f"{PEER_NAME:<16} not measured: {PEER} has no mlx-lm; MLX_LM_PYTHON names another Python")
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [PEER, "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            if _answers(url, process):
                yield url
            else:
                log.seek(0)
                print(f"{PEER_NAME:<16} not measured: it did not start: {log.read().strip()[-500:]}")
        finally:
            process.kill()
            process.wait()


def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until a server answers; return False if it ends, or takes too long."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            httpx2.get(f"{url}/health", timeout=1)
        except httpx2.HTTPError:
            time.sleep(0.2)
            continue
        return True
    return False


def report(name: str, first: float, each: float, alone: float | None = None) -> None:
    beside = "" if alone is None else f", {each / alone - 1:+.1%} against the one-shot"
    print(
        f"{name:<16} first token {1000 * first:7.1f} ms, then {1000 * each:6.2f} ms each{beside}", flush=True
    )


def main() -> None:
    # both compute alike from the first token on
    os.environ |= {"QCHAT_NATIVE": "on" if find_compiler() else "off", "QCHAT_DRAFTING": "off"}
    with tempfile.TemporaryDirectory() as home:
        folder = longer_model(Path(home) / "embedded")
        prompt = prompt_of(Tokenizer.load(folder))
        alone = measure_alone(folder, prompt)
        print(f"{'one-shot':<16} {'':19} {1000 * alone:15.2f} ms each", flush=True)
        with RunningServer(model=folder, settings={"stop_loops": False}) as server:
            report("qchat serve", *measure(server.url, prompt), alone)
        for url in peer_urls(folder):
            report(PEER_NAME, *measure(url, prompt, model=str(folder)))


if __name__ == "__main__":
    main()
