"""Importance matrices against the `gguf` package's own reading, and damaged ones."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchat.core.checkpoint.config import ModelConfig
from qchat.core.checkpoint.layouts import body_specs, mtp_specs
from qchat.core.errors import ModelError, UsageError
from qchat.core.machine.backend import mx
from qchat.core.quant.imatrix import Statistics, read_imatrix, write_imatrix
from tests.checkpoints import tiny_config
from tests.paths import QTINY, SHARED

gguf = pytest.importorskip("gguf")

QTINY_IMATRIX = SHARED / "models" / "qtiny-24m.imatrix.gguf"
# llama.cpp's samples, and the sizes of the models they were made from
SAMPLES = {
    "sample.imatrix.qwen35-tiny.gguf": {"moe": False, "intermediate_size": 512},
    "sample.imatrix.qwen35moe-tiny-random.gguf": {
        "moe": True,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
}
PAIRS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}


def config(**shape: Any) -> ModelConfig:
    return ModelConfig.parse(tiny_config(**shape))


def sample_config(name: str, tensors: dict[str, np.ndarray]) -> ModelConfig:
    """A config whose rows are as long as the sample's."""
    sizes = dict(SAMPLES[name])
    hidden = tensors["blk.0.attn_qkv.weight.in_sum2"].shape[-1]
    values = tensors["blk.0.ssm_out.weight.in_sum2"].shape[-1]
    queries = tensors["blk.3.attn_output.weight.in_sum2"].shape[-1]
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": values // 4}
    return config(hidden_size=hidden, num_attention_heads=4, head_dim=queries // 4, **heads, **sizes)


def gguf_tensors(path: Path) -> dict[str, np.ndarray]:
    """The file as the `gguf` package reads it."""
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def means(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    return tensors[f"{name}.weight.in_sum2"] / tensors[f"{name}.weight.counts"]


def sample(name: str) -> Path:
    path = SHARED / "qwen" / name
    if not path.exists():
        pytest.skip("the samples are not here")
    return path


@pytest.mark.parametrize("name", SAMPLES)
def test_llama_cpps_samples_read_as_the_gguf_package_reads_them(name: str):
    path = sample(name)
    tensors = gguf_tensors(path)
    model = sample_config(name, tensors)
    imatrix = read_imatrix(path, model)
    compared = 0
    for stored in tensors:
        block, _, stem = stored.removesuffix(".weight.in_sum2").removeprefix("blk.").partition(".")
        if stem not in PAIRS or int(block) >= model.num_hidden_layers:
            continue
        values = imatrix.importance(f"layers.{block}.{PAIRS[stem]}")
        np.testing.assert_allclose(np.array(values), means(tensors, f"blk.{block}.{stem}"), rtol=1e-6)
        compared += 1
    assert compared + model.layer_types.count("linear_attention") == len(list(imatrix))
    assert imatrix.datasets == ("calib_s.txt",)
    assert (imatrix.chunk_count, imatrix.chunk_size) == (8, 256)
    assert imatrix.missing == (("embed_tokens",))


@pytest.mark.parametrize("name", SAMPLES)
def test_the_delta_nets_output_channels_come_back_from_tiled_heads(name: str):
    path = sample(name)
    tensors = gguf_tensors(path)
    model = sample_config(name, tensors)
    stored = means(tensors, "blk.0.ssm_out").reshape(4, -1)  # two key heads: values 0, 2, 1, 3
    values = read_imatrix(path, model).importance("layers.0.linear_attn.out_proj")
    np.testing.assert_allclose(np.array(values).reshape(4, -1), stored[[0, 2, 1, 3]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not QTINY_IMATRIX.exists(), reason="the trained model is not here")
def test_the_tiled_order_is_the_one_that_agrees_with_real_activations(monkeypatch: pytest.MonkeyPatch):
    """llama.cpp measured the whole of this text; its first part, measured here, must look alike."""
    monkeypatch.setenv("QCHAT_COMPILE", "off")
    from qchat.core.engine.loading import load_folder
    from qchat.core.model.network import Model
    from qchat.core.text.tokenizer import Tokenizer

    model_config = ModelConfig.load(QTINY)
    model = load_folder(Model, QTINY, model_config)
    text = (SHARED / "models" / "qtiny-24m.calibration.txt").read_text()
    ids = Tokenizer.load(QTINY).encode(text[:8000])
    squares = []

    def watch(product):
        def call(x: mx.array) -> mx.array:
            squares.append(mx.square(x).mean(axis=(0, 1)))
            return product(x)

        return call

    mixer: Any = model.use_plain_layers()[0].mixer
    mixer.out = watch(mixer.out)
    mx.eval(model.hidden(ids[:1024], model.new_cache()))
    ours = np.log(np.array(squares[0]))
    theirs = read_imatrix(QTINY_IMATRIX, model_config).importance("layers.0.linear_attn.out_proj")
    stored = means(gguf_tensors(QTINY_IMATRIX), "blk.0.ssm_out")
    assert np.corrcoef(ours, np.log(np.array(theirs)))[0, 1] > 0.9
    assert np.corrcoef(ours, np.log(stored))[0, 1] < 0.8


def dat_means(path: Path) -> dict[str, np.ndarray]:
    """An older file by its published layout: names, calls, and means times calls."""
    content, means_of, place = path.read_bytes(), {}, 4
    for _ in range(struct.unpack_from("<i", content)[0]):
        length = struct.unpack_from("<i", content, place)[0]
        name = content[place + 4 : place + 4 + length].decode()
        calls, count = struct.unpack_from("<ii", content, place + 4 + length)
        place += 12 + length
        means_of[name] = np.frombuffer(content, "<f4", count, place) / np.float32(calls)
        place += 4 * count
    return means_of


def test_an_older_dat_is_read_and_agrees_with_a_gguf_of_the_same_text():
    """Of a plain transformer, whose names are those of attention layers; 5 chunks of text and 20 of them."""
    path, twin = sample("sample.imatrix.smollm2.dat"), sample("sample.imatrix.smollm2.gguf")
    stored = dat_means(path)
    layers = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    model = config(hidden_size=576, intermediate_size=1536, **heads, **layers)
    imatrix, other = read_imatrix(path, model), read_imatrix(twin, model)
    stems = {module: stem for stem, module in PAIRS.items()}
    assert set(imatrix) == set(other)
    assert len(list(imatrix)) == 4 * 7
    for name in imatrix:
        _, layer, module = name.split(".", 2)
        values = np.array(imatrix.importance(name))
        np.testing.assert_allclose(values, stored[f"blk.{layer}.{stems[module]}.weight"], rtol=1e-6)
        assert np.corrcoef(np.log(values), np.log(np.array(other.importance(name))))[0, 1] > 0.9
    assert imatrix.datasets == ("calib.txt",)
    assert (imatrix.chunk_count, imatrix.chunk_size, other.chunk_count) == (5, 0, 20)
    assert "blk.4.attn_q.weight" in imatrix.unmatched  # of a deeper model, not of the MTP head


def measured(model: ModelConfig, seed: int = 0) -> dict[str, Statistics]:
    """Random statistics of every matrix but the embedding, MTP head included."""
    draw = np.random.default_rng(seed)
    statistics = {}
    for name, spec in (body_specs(model) | mtp_specs(model)).items():
        if spec.kind != "matrix" or name == "embed_tokens":
            continue
        shape = (*spec.shape[:-2], spec.shape[-1])
        counts = draw.integers(1, 50, shape[:-1] or (1,)).astype(np.float32)
        sums = draw.uniform(0.1, 9.0, shape).astype(np.float32)
        statistics[name] = Statistics(mx.array(sums), mx.array(counts))
    return statistics


def save(path: Path, model: ModelConfig, statistics: dict[str, Statistics]) -> Path:
    write_imatrix(path, statistics, model, datasets=["a.txt", "ü.txt"], chunk_count=3, chunk_size=512)
    return path


@pytest.mark.parametrize("moe", [False, True])
def test_what_is_written_is_read_back_by_us_and_by_the_gguf_package(tmp_path: Path, moe: bool):
    model = config(moe=moe, tied=False, hv_ratio=3)
    statistics = measured(model)
    path = save(tmp_path / "own.gguf", model, statistics)
    imatrix = read_imatrix(path, model)
    assert set(imatrix) == set(statistics)
    for name, wanted in statistics.items():
        mean = wanted.sums / wanted.counts.reshape(-1, *[1] * (wanted.sums.ndim - 1))
        np.testing.assert_allclose(np.array(imatrix.importance(name)), np.array(mean), rtol=1e-6)
    assert imatrix.missing == imatrix.unmatched == ()
    assert imatrix.datasets == ("a.txt", "ü.txt")
    assert (imatrix.chunk_count, imatrix.chunk_size) == (3, 512)
    reader, tensors = gguf.GGUFReader(path), gguf_tensors(path)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["a.txt", "ü.txt"]
    assert len(tensors) == 2 * len(statistics)
    for stem, module in PAIRS.items():
        own = statistics.get(f"layers.0.{module}") or statistics.get(f"layers.3.{module}")
        found = tensors.get(f"blk.0.{stem}.weight.in_sum2", tensors.get(f"blk.3.{stem}.weight.in_sum2"))
        if own is not None and found is not None:
            np.testing.assert_array_equal(found, np.array(own.sums))
    np.testing.assert_array_equal(tensors["output.weight.in_sum2"], np.array(statistics["lm_head"].sums))
    np.testing.assert_array_equal(
        tensors["blk.4.nextn.eh_proj.weight.counts"], np.array(statistics["mtp.fc"].counts)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["own.gguf"]


def test_a_file_read_and_written_again_is_the_same_file(tmp_path: Path):
    model = config(moe=True, tied=False)
    path = save(tmp_path / "a.gguf", model, measured(model))
    imatrix = read_imatrix(path, model)
    again = {name: found for name in imatrix if (found := imatrix.statistics(name)) is not None}
    assert save(tmp_path / "b.gguf", model, again).read_bytes() == path.read_bytes()


def test_a_written_file_is_shaped_like_llama_cpps(tmp_path: Path):
    path = sample("sample.imatrix.qwen35moe-tiny-random.gguf")
    theirs = gguf_tensors(path)
    model = sample_config(path.name, theirs)
    ours = gguf_tensors(save(tmp_path / "own.gguf", model, measured(model)))
    for name, tensor in ours.items():
        if name.startswith("blk.") and not name.startswith("blk.4."):
            assert tensor.shape == theirs[name].shape, name


def test_the_output_of_a_tied_model_is_its_embedding(tmp_path: Path):
    model = config(tied=True)
    ones = Statistics(mx.full((64,), 6.0), mx.array([2.0]))
    imatrix = read_imatrix(save(tmp_path / "own.gguf", model, {"embed_tokens": ones}), model)
    assert "token_embd.weight.in_sum2" in gguf_tensors(tmp_path / "own.gguf")
    values = imatrix.importance("embed_tokens")
    assert values is not None and mx.all(values == 3)
    assert imatrix.importance("lm_head") is None
    assert "lm_head" not in imatrix


def test_an_expert_that_no_token_reached_gets_the_mean_of_all(tmp_path: Path):
    model = config(moe=True)
    name = "layers.0.mlp.switch_mlp.gate_proj"
    sums = mx.array([[8.0] * 64, [0.0] * 64, [4.0] * 64, [0.0] * 64])
    path = save(tmp_path / "a.gguf", model, {name: Statistics(sums, mx.array([2.0, 0.0, 4.0, 0.0]))})
    values = read_imatrix(path, model).importance(name)
    assert values is not None and values[:, 0].tolist() == [4.0, 2.0, 1.0, 2.0]
    nothing = save(tmp_path / "b.gguf", model, {name: Statistics(mx.zeros((4, 64)), mx.zeros((4,)))})
    values = read_imatrix(nothing, model).importance(name)
    assert values is not None and mx.all(values == 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_every_ratio_of_heads_survives_writing_and_reading(keys: int, ratio: int, width: int):
    from tempfile import TemporaryDirectory

    heads = {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * ratio,
        "linear_value_head_dim": width,
    }
    model = config(**heads)
    name = "layers.0.linear_attn.out_proj"
    values = mx.arange(1, 1 + keys * ratio * width, dtype=mx.float32)
    with TemporaryDirectory() as folder:
        path = save(Path(folder) / "own.gguf", model, {name: Statistics(values, mx.array([1.0]))})
        tiled = gguf_tensors(path)["blk.0.ssm_out.weight.in_sum2"].reshape(-1, width)
        found = read_imatrix(path, model).importance(name)
    assert found is not None and mx.all(found == values)
    for head in range(keys * ratio):
        key, member = divmod(head, ratio)
        assert tiled[member * keys + key][0] == 1 + head * width


# --- files that cannot be trusted ---


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def container(entries: list[bytes], tensors: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(entries)) + b"".join(entries) + rest


KIND = text(b"general.type") + struct.pack("<I", 8) + text(b"imatrix")


def info(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def listed(inner: int, count: int) -> bytes:
    return text(b"k") + struct.pack("<IIQ", 9, inner, count)


Q_SUMS, Q_COUNTS = b"blk.3.attn_q.weight.in_sum2", b"blk.3.attn_q.weight.counts"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "truncated"),
        (b"GG", "truncated"),
        (b"GGUF", "truncated"),
        (b"#!/bin/sh\necho hello", "neither a GGUF file nor an imatrix.dat"),
        (container([KIND], version=2), "it is GGUF version 2, only version 3 is supported"),
        (container([]), "it has no general.type, wanted imatrix"),
        (container([KIND.replace(b"imatrix", b"adapter")]), "its general.type is adapter, wanted imatrix"),
        (container([KIND, KIND]), "the key general.type twice"),
        (container([KIND], tensors=1 << 60), "claims 1,152,921,504,606,846,976 tensors"),
        (container([listed(9, 1 << 60)]), "a list of the unknown type 9"),
        (container([listed(8, 1 << 60)]), "texts in a list"),
        (container([listed(4, 1 << 60)]), "truncated"),
        (container([text(b"k") + struct.pack("<I", 77)]), "the unknown type 77"),
        (container([struct.pack("<Q", 1 << 60)]), "bytes in one text"),
        (container([text(b"\xff\xfe") + struct.pack("<I", 4)]), "is not UTF-8"),
        (container([KIND], 1, info(Q_SUMS, (64,))), "truncated: the tensor blk.3.attn_q.weight.in_sum2 ends"),
        (container([KIND], 1, info(Q_SUMS, (1 << 62,))), "values along an axis"),
        (container([KIND], 1, info(Q_SUMS, (1,) * 9)), "axes of blk.3"),
        (container([KIND], 1, info(Q_SUMS, (4,), 0, 1 << 63)), "truncated"),
        (container([KIND], 2, info(Q_SUMS, (0,)) * 2 + bytes(64)), "twice"),
        (container([KIND], 1, info(Q_SUMS, (0,)) + bytes(64)), "without its .counts"),
        (container([KIND], 2, info(Q_SUMS, (0,)) + info(Q_COUNTS, (1,)) + bytes(64)), "another model"),
        (container([KIND], 1, info(b"blk.0.what", (1,)) + bytes(64)), "names no module of this model"),
        (container([KIND], 1, info(b"blk.0.what", (1,), kind=12) + bytes(64)), "names no module"),
        (container([KIND, text(b"general.alignment") + struct.pack("<II", 4, 0)]), "general.alignment is 0"),
        (struct.pack("<ii", 1, -5), "bytes in one text"),
        (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 1 << 30), "values"),
        (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", -1, 0), "calls"),
    ],
)
def test_a_damaged_or_hostile_file_ends_in_one_sentence(tmp_path: Path, data: bytes, sentence: str):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_imatrix(path, config())
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["gguf", "dat"])
@settings(deadline=None)
@given(data=st.data())
def test_a_file_cut_or_changed_anywhere_never_ends_in_a_traceback(suffix: str, data: st.DataObject):
    from tempfile import TemporaryDirectory

    model = config()
    values = Statistics(mx.full((64,), 6.0), mx.array([2.0]))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "own"
        if suffix == "gguf":
            save(path, model, {"layers.3.self_attn.q_proj": values})
        else:
            name = b"blk.3.attn_q.weight"
            head = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 2, 64)
            path.write_bytes(head + struct.pack("<64f", *[3.0] * 64) + struct.pack("<ii", 2, 1) + b"x")
        content = bytearray(path.read_bytes())
        read_imatrix(path, model)
        cut = data.draw(st.integers(0, len(content)))
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content[:cut])
        try:
            read_imatrix(path, model)
        except ModelError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_values_that_are_no_sums_of_squares_are_refused(tmp_path: Path, value: float):
    model = config()
    bad = Statistics(mx.full((64,), value), mx.array([2.0]))
    path = save(tmp_path / "own.gguf", model, {"layers.3.self_attn.q_proj": bad})
    with pytest.raises(ModelError, match=r"blk\.3\.attn_q\.weight holds values that are no sums of squares"):
        read_imatrix(path, model)


def test_a_file_of_another_model_is_refused_with_both_sizes(tmp_path: Path):
    model = config()
    path = save(tmp_path / "own.gguf", model, measured(model))
    with pytest.raises(ModelError, match=r"64 values for .*wants 128: it was made from another model"):
        read_imatrix(path, config(hidden_size=128))


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "pipe"):
        with pytest.raises(ModelError, match="there is no imatrix file at"):
            read_imatrix(path, config())


def test_a_place_that_cannot_be_written_is_named_and_left_as_it_was(tmp_path: Path):
    model = config()
    with pytest.raises(UsageError, match=r"cannot write .*absent"):
        save(tmp_path / "absent" / "own.gguf", model, measured(model))
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match=r"cannot write .*taken"):
        save(tmp_path / "taken", model, measured(model))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
