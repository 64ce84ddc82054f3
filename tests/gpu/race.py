"""Decode and prefill of random models at true dimensions on this GPU, and mlx-lm's on the same tensors.

`PYTHONPATH=.dev python tests/gpu/race.py CONFIG.json... --variants UD-Q2_K_XL ... --engines qchat mlx-lm`;
with `mlx.launch -n 2 -- python tests/gpu/race.py ...` one model on two GPUs. The first prompt of a model is
cold: it pays for compilation. Prefill is timed from the prompt to the first token, decode over TOKENS greedy
tokens after the shortest prompt; of REPEATS times the best counts, as a fast GPU's steps wait for a host that
may have other guests. Shares are of what a large copy moves on this device.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.packed import Packed
from qchat.core.checkpoint.weights import Weights
from qchat.core.engine.followers import LeaderModel, follow
from qchat.core.engine.launcher import follows
from qchat.core.engine.loading import build_model
from qchat.core.engine.ranks import join_ranks
from qchat.core.generation.decode import Decoder, prefill
from qchat.core.generation.sampling import Sampling
from qchat.core.machine.backend import choose_policy, mx
from qchat.core.measuring.random_model import random_model, random_weights
from qchat.core.model.cache import Cache, KVBuffer, KVCache
from qchat.core.model.network import Model
from qchat.core.model.weight_traffic import step_nbytes
from qchat.core.quant.plan import load_config
from qchat.core.quant.recipes import VARIANTS, Options

TOKENS = 64
REPEATS = 3
COPY_NBYTES = 4 << 30
ENGINES = ("qchat", "mlx-lm")
GREEDY = Sampling(temperature=0)

M = TypeVar("M", bound=Model)
Generate = Callable[[list[int]], Iterator[int]]


@dataclass
class EngineSpeed:
    """Tokens/s and seconds of one engine on one model: prefill by prompt length, the rest by context."""

    engine: str
    model: str
    variant: str
    nbytes_per_token: int
    load_s: float = 0.0
    cold_s: float = 0.0
    prefill: dict[int, float] = field(default_factory=dict)
    decode: dict[int, float] = field(default_factory=dict)
    active_nbytes: dict[int, int] = field(default_factory=dict)
    peak_nbytes: int = 0


def open_qchat(model: Model) -> Generate:
    def generate(ids: list[int]) -> Iterator[int]:
        cache = model.new_cache()
        for _ in prefill(model, cache, ids):
            pass
        yield from decoded(model, cache)

    return generate


def decoded(model: Model, cache: Cache) -> Iterator[int]:
    decoder = Decoder(model, cache, GREEDY)
    while True:
        yield decoder.next()


def grown_cache(model: Model, length: int) -> Cache:
    """As if `length` tokens had been read."""
    cache = model.new_cache()
    model.hidden([1, 2, 3], cache)
    for layer in cache.layers:
        if isinstance(layer, KVCache):
            _, heads, _, dim = layer.buffer.parts[0].shape
            shape = (1, heads, -(-(length + REPEATS * TOKENS + 2) // 256) * 256, dim)
            parts = [mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2)]
            layer.buffer, layer.length = KVBuffer(parts, length), length
    cache.length = length
    mx.eval(cache.arrays())
    return cache


def open_model(path: Path, options: Options) -> Model:
    """Return the random model; under `mlx.launch` rank 0's share of it, which the other ranks follow."""
    ranks = join_ranks()
    if ranks is None:
        return random_model(load_config(path), options)
    what = json.dumps([str(path), asdict(options)])
    return LeaderModel.load_on_ranks(ranks, what, lambda _: make_share(LeaderModel, path, options))


def make_share(kind: type[M], path: Path, options: Options) -> M:
    """Return this rank's share of a random model."""
    config = load_config(path)
    return build_model(kind, config, random_weights(config, options), ranks=join_ranks())


def make_follower_share(what: str) -> Model:
    """Return this rank's share of the model that rank 0 describes as JSON."""
    path, options = json.loads(what)
    return make_share(Model, Path(path), Options(**options))


def open_mlx_lm(config: ModelConfig, random: Weights) -> Generate:
    """mlx-lm's model with the tensors of `random_weights`."""
    nn = import_module("mlx.nn")
    family = import_module("mlx_lm.models." + config.raw["model_type"].removesuffix("_text"))
    generate_step = import_module("mlx_lm.generate").generate_step
    model = family.Model(family.ModelArgs.from_dict(dict(config.raw)))
    weights, geometries = {}, {}
    for name, tensor in random.tensors.items():
        path = f"language_model.{name}" if name == "lm_head" else f"language_model.model.{name}"
        if isinstance(tensor, Packed):
            geometries[path] = {"group_size": tensor.group_size, "bits": tensor.bits, "mode": tensor.mode}
            parts = zip(("weight", "scales", "biases"), tensor.arrays, strict=False)
            weights |= {f"{path}.{part}": array for part, array in parts}
        elif name.endswith(("A_log", "dt_bias")):
            weights[path] = tensor
        else:
            tensor = tensor[..., None] if name.endswith("conv1d") else tensor
            weights[f"{path}.weight"] = tensor.astype(mx.bfloat16)
    nn.quantize(model, class_predicate=lambda path, _: geometries.get(path, False))
    model.load_weights(list(weights.items()))
    del weights
    model.eval()
    mx.eval(model.parameters())
    return lambda ids: (int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=-1))


def measure(row: EngineSpeed, generate: Generate, prompts: list[int]) -> None:
    """Fill in `cold_s`, `prefill`, and `decode` after the first of the prompt lengths."""
    mx.reset_peak_memory()
    for length in prompts:
        ids = [(7 * i * i + 3 * i) % 5000 for i in range(length)]
        times, tokens = [], generate(ids)
        for repeat in range(1 + REPEATS):
            began = time.perf_counter()
            tokens = generate(ids)
            next(tokens)
            times.append(time.perf_counter() - began)
            if times[-1] > 5 and repeat:
                break
        if length == prompts[0]:
            row.decode[length] = rate(tokens)
            row.active_nbytes[length] = mx.get_active_memory()
        row.prefill[length] = length / min(times[1:])
        row.cold_s = row.cold_s or times[0]
    row.peak_nbytes = mx.get_peak_memory()


def rate(tokens: Iterator[int]) -> float:
    """Tokens/s of the best of REPEATS stretches."""
    next(tokens)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in itertools.islice(tokens, TOKENS):
            pass
        times.append(time.perf_counter() - began)
    return TOKENS / min(times)


def race(path: Path, variant: str, args: argparse.Namespace) -> Iterator[EngineSpeed]:
    config = load_config(path)
    # as published: the first generation kept some matrices dense and had no MTP head
    options = replace(VARIANTS[variant], keep_bf16=not args.new, mtp="drop")
    name = path.name.removesuffix(".config.json")
    began = time.perf_counter()
    if "qchat" in args.engines:
        model = open_model(path, options)
        row = EngineSpeed("qchat", name, variant, model.step_nbytes, load_s=time.perf_counter() - began)
        measure(row, open_qchat(model), args.prompts)
        for length in args.contexts:
            tokens = decoded(model, grown_cache(model, length))
            row.decode[length] = rate(tokens)
            row.active_nbytes[length] = mx.get_active_memory()
            del tokens  # and the cache with it
        yield row
        del model
        mx.clear_cache()
    if "mlx-lm" in args.engines:
        weights = random_weights(config, options)
        row = EngineSpeed("mlx-lm", name, variant, step_nbytes(weights.tensors, config, choose_policy(0)))
        measure(row, open_mlx_lm(config, weights), args.peer_prompts)
        yield row
        mx.clear_cache()


def shown(row: EngineSpeed, bandwidth: float) -> str:
    decode = ", ".join(f"{length}: {speed:.1f}" for length, speed in row.decode.items())
    share = max(row.decode.values()) * row.nbytes_per_token / bandwidth
    prefills = ", ".join(f"{length}: {speed:,.0f}" for length, speed in row.prefill.items())
    parts = [
        f"{row.engine:7} {row.model} {row.variant:11} {row.nbytes_per_token / 1e9:6.2f} GB/token",
        f"decode {decode} ({share:.0%})",
        f"prefill {prefills}",
        f"load {row.load_s:.1f} s, cold {row.cold_s:.1f} s, peak {row.peak_nbytes / 1e9:.1f} GB",
    ]
    return "; ".join(parts)


def prefill_cost(row: EngineSpeed) -> str:
    """Seconds of a prompt of T tokens as a + b T + c T^2 by least relative squares; c is attention."""
    lengths = np.array(list(row.prefill), float)
    seconds = lengths / np.array(list(row.prefill.values()))
    terms = np.stack([np.ones_like(lengths), lengths, lengths**2], axis=1)
    (a, b, c), *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones_like(lengths), rcond=None)
    per_token = (seconds - a - c * lengths**2) / lengths
    spread = ", ".join(
        f"{length:.0f}: {1e6 * each:.0f}" for length, each in zip(lengths, per_token, strict=True)
    )
    return f"prefill: {1e3 * a:.1f} ms + {1e6 * b:.1f} us T + {1e9 * c:.2f} ns T^2; us a token by T: {spread}"


def copy_bandwidth() -> float:
    """Bytes/s read and written by a copy that dwarfs caches and launches."""
    source = mx.zeros(COPY_NBYTES // 4)
    mx.eval(source)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        mx.eval(source + 1)
        times.append(time.perf_counter() - began)
    return 2 * COPY_NBYTES / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time random models on this GPU.")
    parser.add_argument("configs", type=Path, nargs="+", help="config.json files, NAME.config.json")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help="decode after so many tokens")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["qchat"])
    parser.add_argument("--peer-prompts", type=int, nargs="+", default=[512])
    parser.add_argument("--new", action="store_true", help="the second generation of the recipes")
    parser.add_argument("--output", type=Path, help="append a JSON line per row")
    args = parser.parse_args()
    if follows():
        follow(make_follower_share)
        return
    if join_ranks() and args.contexts:
        parser.error("--contexts are for one process: caches are grown in this one alone")
    bandwidth = copy_bandwidth()
    print(f"{mx.device_info().get('device_name')}: a copy moves {bandwidth / 1e12:.2f} TB/s", flush=True)
    for path, variant in itertools.product(args.configs, args.variants):
        for row in race(path, variant, args):
            print(shown(row, bandwidth), flush=True)
            if len(row.prefill) > 3:
                print(prefill_cost(row), flush=True)
            if args.output:
                record: dict[str, Any] = asdict(row) | {"bandwidth": bandwidth}
                with args.output.open("a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
