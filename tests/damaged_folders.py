"""The table of damaged folders: what is done to a good one, and a pattern of what the refusal must say.

Grouped by the good folder that each damage starts from.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from qchat.core.machine.backend import mx
from tests.checkpoints import VOCAB_SIZE, Tensors, convert_tensors, load_tensors, save_shards
from tests.damages import (
    INDEX,
    LAYER,
    WHOLE,
    Damage,
    claim,
    config,
    cut,
    edit,
    field,
    header,
    header_length,
    index,
    only,
    outside,
    placed,
    put,
    raw_header,
    remove,
    replace,
    shift_length,
    sparse,
    template,
    tensors,
    text,
    together,
    without,
)

FIRST = "model-00001-of-00002.safetensors"
PACKED = "language_model.model.layers.0.mlp.up_proj"
UP = LAYER + "mlp.up_proj.weight"
A_LOG = LAYER + "linear_attn.A_log"
CONV = LAYER + "linear_attn.conv1d.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
NORM = LAYER + "input_layernorm.weight"
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
TEMPLATE = r"tokenizer_config\.json"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
)
ATTRIBUTES = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
BRACKETS = b'{"a":[' + b"[]," * 4_000_000 + b"[]]}"


def swapped_norms(folder: Path) -> None:
    """The shapes of a raw model with the norm values of a converted one."""
    stored = load_tensors(folder)
    shifted = convert_tensors(stored, "model.language_model.")
    save_shards(folder, {n: shifted[n] if n.endswith("layernorm.weight") else t for n, t in stored.items()})


def not_numbers(stored: Tensors) -> None:
    stored |= {n: t * float("nan") for n, t in stored.items() if n.endswith("layernorm.weight")}


def overlap(fields: dict[str, Any]) -> None:
    ours, other = fields[LAYER + "mlp.up_proj.weight"], fields[LAYER + "mlp.gate_proj.weight"]
    ours["data_offsets"] = [offset + 2 for offset in other["data_offsets"]]


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


RAW_DAMAGES: dict[str, tuple[Damage, str]] = {
    # the shard's frame
    "empty shard": (cut(0), f"{WHOLE} is truncated: 0 bytes"),
    "shard of four bytes": (cut(4), f"{WHOLE} is truncated: 4 bytes"),
    "shard cut inside its header": (cut(600), f"{WHOLE} is truncated"),
    "shard cut inside its data": (
        cut(200_000),
        rf"{WHOLE} is truncated: it has \d+ bytes of data, and model",
    ),
    "shard without its last byte": (cut(-1), f"{WHOLE} is truncated"),
    "header length of 2**63": (header_length(1 << 63), f"{WHOLE}.*header length is {1 << 63}"),
    "header length of 2**64 - 1": (header_length((1 << 64) - 1), f"{WHOLE}.*header length"),
    "header length past the end": (header_length(10_000_000), f"{WHOLE} is truncated"),
    "header length of zero": (header_length(0), f"{WHOLE}.*header length is 0"),
    "header length one short": (shift_length(-1), f"header of .*{WHOLE} is not valid JSON"),
    "header length one long": (shift_length(1), f"header of .*{WHOLE} is not valid JSON"),
    # the header's JSON
    "header that is no JSON": (raw_header(b"not json at all"), f"{WHOLE} is not valid JSON"),
    "header that is a list": (raw_header(b"[1, 2, 3]"), f"{WHOLE} is a JSON list"),
    "header that is a number": (raw_header(b"12"), f"{WHOLE} is a JSON int"),
    "header in UTF-16": (raw_header('{"a":1}'.encode("utf-16")), f"{WHOLE} is not valid JSON"),
    "header with NaN": (raw_header(b'{"a":NaN}'), f"{WHOLE} is not valid JSON: NaN"),
    "header nested 100000 deep": (raw_header(nested(100_000).encode()), f"{WHOLE} (is nested|is not valid)"),
    "header of millions of brackets": (raw_header(BRACKETS), f"{WHOLE} holds more than"),
    "header with a number of 10000 digits": (
        raw_header(b'{"a":' + b"9" * 10_000 + b"}"),
        f"{WHOLE} is not valid",
    ),
    "header with no tensors": (raw_header(b"{}"), "embed_tokens is missing"),
    "the same tensor twice in a header": (
        raw_header(b'{"a":1,"a":2}'),
        f"{WHOLE}.*the key a occurs twice",
    ),
    "metadata that is no object": (header(lambda h: h.update(__metadata__=3)), f"__metadata__ of .*{WHOLE}"),
    "metadata of numbers": (header(lambda h: h.update(__metadata__={"a": 3})), f"__metadata__ of .*{WHOLE}"),
    # one tensor's entry
    "entry that is no object": (header(lambda h: h.update({UP: 3})), UP),
    "entry without offsets": (header(lambda h: h[UP].pop("data_offsets")), UP),
    "unknown dtype": (field(UP, "dtype", "Q4_K"), f"{UP} has the dtype Q4_K"),
    "dtype that is a list": (field(UP, "dtype", ["BF16"]), f"{UP} has the dtype"),
    "dtype of another size": (field(UP, "dtype", "F32"), rf"{UP} has \d+ bytes"),
    "dtype of the same size": (field(UP, "dtype", "I16"), f"{UP} has the dtype I16, wanted BF16"),
    "negative shape": (field(UP, "shape", [-192, -64]), f"{UP} has the shape"),
    "huge shape": (field(UP, "shape", [1 << 40, 1 << 40]), rf"{UP} has \d+ bytes"),
    "shape of a thousand axes": (field(UP, "shape", [1] * 1000), f"{UP} has the shape"),
    "shape that is a number": (field(UP, "shape", 12288), f"{UP} has the shape 12288"),
    "shape of floats": (field(UP, "shape", [192.0, 64.0]), f"{UP} has the shape"),
    "shape of booleans": (field(UP, "shape", [True, True]), f"{UP} has the shape"),
    "shape of the wrong rank": (
        field(UP, "shape", [192 * 64]),
        rf"{UP} has the shape \[12288\], wanted \[192, 64\]",
    ),
    "transposed shape": (
        field(UP, "shape", [64, 192]),
        rf"{UP} has the shape \[64, 192\], wanted \[192, 64\]",
    ),
    "conv1d of another rank": (field(CONV, "shape", [256, 4]), rf"{CONV} has the shape .* or \[256, 4, 1\]"),
    "offsets reversed": (field(UP, "data_offsets", [24576, 0]), f"{UP} has the data_offsets"),
    "offsets out of the file": (field(UP, "data_offsets", [1 << 40, (1 << 40) + 24576]), f"truncated.*{UP}"),
    "offsets below zero": (field(UP, "data_offsets", [-24576, 0]), f"{UP} has the data_offsets"),
    "three offsets": (field(UP, "data_offsets", [0, 24576, 24576]), f"{UP} has the data_offsets"),
    "offsets of text": (field(UP, "data_offsets", ["0", "24576"]), f"{UP} has the data_offsets"),
    "overlapping tensors": (header(overlap), f"{re.escape(LAYER)}.*overlap"),
    "name with control characters": (
        header(lambda h: h.update({"x\n\x1b[31m\u202ey": EMPTY})),
        r"the tensor 'x\\n\\x1b\[31m\\u202ey' is not part",
    ),
    "name of a million letters": (header(lambda h: h.update({"x" * 1_000_000: EMPTY})), "xxx.*xxx"),
    # the set of tensors
    "missing embedding": (without("model.language_model.embed_tokens.weight"), "embed_tokens is missing"),
    "missing A_log": (without(A_LOG), r"layers\.0\.linear_attn\.A_log is missing"),
    "missing final norm": (without("model.language_model.norm.weight"), "tensor norm is missing"),
    "part of an MTP head": (without("mtp.fc.weight"), r"mtp\.fc is missing"),
    "extra tensor": (
        put("model.language_model.layers.4.foo.weight", mx.zeros(3)),
        r"layers\.4\.foo\.weight is not",
    ),
    "bias beside a weight": (put(LAYER + "mlp.up_proj.bias", mx.zeros(192)), r"up_proj\.bias is not part"),
    "wrong embedding": (
        put("model.language_model.embed_tokens.weight", mx.zeros((9, 64))),
        "embed_tokens.*wanted",
    ),
    "embedding of 4 million rows": (
        claim(**{EMBEDDING: (1 << 22, 384)}),
        rf"{EMBEDDING} has the shape \[4194304, 384\], wanted \[{VOCAB_SIZE}, 64\]",
    ),
    "embedding and head of 4 million rows": (
        claim(**{EMBEDDING: (1 << 22, 384), "lm_head.weight": (1 << 22, 384)}),
        rf"{EMBEDDING} has the shape \[4194304, 384\], wanted",
    ),
    "embedding of 4 million rows in header and config": (
        together(claim(**{EMBEDDING: (1 << 22, 64)}), config(vocab_size=1 << 22)),
        r"tokenizer\.json has 265 entries, and the model's vocabulary has 4,194,304",
    ),
    "embedding of 4 million rows with an id for the last": (
        together(
            claim(**{EMBEDDING: (1 << 22, 64)}),
            config(vocab_size=1 << 22),
            edit("tokenizer.json", lambda t: t["model"]["vocab"].update(zz=(1 << 22) - 1)),
        ),
        r"tokenizer\.json has 266 entries, and the model's vocabulary has 4,194,304",
    ),
    "norm of a billion weights": (
        claim(**{NORM: (1 << 30,)}),
        rf"{NORM} has the shape \[1073741824\], wanted \[64\]",
    ),
    "conv1d of a billion taps": (
        claim(**{CONV: (1 << 20, 1, 1 << 10)}),
        rf"{CONV} has the shape \[1048576, 1, 1024\], wanted",
    ),
    "wrong norm": (put(NORM, mx.zeros(63)), rf"{NORM} has the shape \[63\], wanted \[64\]"),
    "whole numbers for a matrix": (put(UP, mx.zeros((192, 64), mx.int32)), f"{UP} has the dtype I32"),
    "the same tensor under two prefixes": (
        put("model.norm.weight", mx.zeros(64)),
        "norm.weight is stored twice",
    ),
    "norms that contradict the conv1d": (swapped_norms, r"conv1d\.weight is in the raw layout, but the norm"),
    "norms that are not numbers": (
        tensors(not_numbers),
        "norm weights .* are not finite",
    ),
    "one conv1d in another layout": (
        tensors(lambda t: t.update({CONV: t[CONV].transpose(0, 2, 1)})),
        "conv1d.weight is in the raw layout, and the first conv1d is converted",
    ),
    "only half an FP8 pair": (
        put(UP.removesuffix("weight") + "weight_scale_inv", mx.ones((2, 1))),
        f"{UP} has the",
    ),
    # what stands where the shard should be
    "no shard at all": (remove(WHOLE), "no weights"),
    "a folder as the shard": (replace(WHOLE, Path.mkdir), f"{WHOLE} is not a regular file"),
    "a pipe as the shard": (replace(WHOLE, os.mkfifo), f"{WHOLE} is not a regular file"),
    "a broken link as the shard": (replace(WHOLE, lambda p: p.symlink_to("nowhere")), f"{WHOLE} is missing"),
    "a link to itself as the shard": (replace(WHOLE, lambda p: p.symlink_to(p.name)), f"{WHOLE} is missing"),
    "a device as the shard": (
        replace(WHOLE, lambda p: p.symlink_to("/dev/zero")),
        f"{WHOLE} is a link to /dev/zero",
    ),
    "a link out of the folder": (outside(WHOLE), f"{WHOLE} is a link to .*elsewhere"),
    "pickled weights only": (only("pytorch_model.bin"), "pickled"),
    "GGUF only": (only("model-Q4_K_M.gguf"), "GGUF"),
    "a garbled MTP file": (text("mtp.safetensors", b"\0" * 100), r"mtp\.safetensors.*header length"),
    # config.json
    "no config": (remove("config.json"), "config.json"),
    "a pipe as the config": (replace("config.json", os.mkfifo), "config.json is not a regular file"),
    "a folder as the config": (replace("config.json", Path.mkdir), "config.json"),
    "config that is no JSON": (
        text("config.json", "{'model_type': 'qwen3_5'}"),
        "config.json is not valid JSON",
    ),
    "config that is a list": (text("config.json", "[]"), "config.json"),
    "config in Latin-1": (text("config.json", b'{"a": "\xe9"}'), "config.json is not UTF-8"),
    "config nested 100000 deep": (text("config.json", nested(100_000)), "config.json"),
    "config of 200 MB": (sparse("config.json", 200_000_000), "config.json is larger"),
    "config with NaN": (text("config.json", '{"rope_theta": NaN}'), "config.json is not valid JSON"),
    "unknown model_type": (edit("config.json", lambda c: c.update(model_type="llama")), "model_type"),
    "model_type that is a list": (edit("config.json", lambda c: c.update(model_type=[])), "model_type"),
    "text_config that is text": (edit("config.json", lambda c: c.update(text_config="x")), "text_config"),
    "hidden_size of 10**12": (config(hidden_size=10**12), "hidden_size"),
    "hidden_size of text": (config(hidden_size="64"), "hidden_size"),
    "hidden_size that the shard has not": (config(hidden_size=128), "embed_tokens"),
    "10**9 layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "one layer too many": (
        config(num_hidden_layers=5, layer_types=["linear_attention"] * 5),
        r"layers\.3\.linear_attn\.in_proj_qkv is missing",
    ),
    "one layer too few": (
        config(num_hidden_layers=3, layer_types=["linear_attention"] * 3),
        r"layers\.3\..* is not part of the model",
    ),
    "layer_types of another length": (config(layer_types=["full_attention"]), "layer_types"),
    "layer_types unknown": (config(layer_types=["mamba"] * 4), "layer_types"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads"),
    "negative heads": (config(num_attention_heads=-4), "num_attention_heads"),
    "heads that key heads do not divide": (config(num_key_value_heads=3), "num_attention_heads"),
    "value heads that key heads do not divide": (config(linear_num_value_heads=3), "linear_num_value_heads"),
    "head_dim without a rotated part": (config(head_dim=2), "head_dim"),
    "rope_theta of zero": (
        edit("config.json", lambda c: c["text_config"]["rope_parameters"].update(rope_theta=0)),
        "rope",
    ),
    "rms_norm_eps of text": (config(rms_norm_eps="1e-6"), "rms_norm_eps"),
    "a kernel of a million taps": (config(linear_conv_kernel_dim=10**6), "linear_conv_kernel_dim"),
    "vocab_size of 10**10": (config(vocab_size=10**10), "vocab_size"),
    "quantization that is a list": (
        edit("config.json", lambda c: c.update(quantization=[4, 64])),
        "quantization",
    ),
    "quantized by another program": (
        edit("config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4})),
        r"config\.json: .* quantized by gptq",
    ),
    "tie flag of text": (config(tie_word_embeddings="yes"), "tie_word_embeddings"),
    "untied without lm_head": (
        edit(
            "config.json",
            lambda c: (
                c.update(tie_word_embeddings=False),
                c["text_config"].update(tie_word_embeddings=False),
            ),
        ),
        "lm_head is missing",
    ),
    "untied at the top level without lm_head": (
        edit("config.json", lambda c: c.update(tie_word_embeddings=False)),
        "lm_head is missing",
    ),
    # generation_config.json
    "generation_config that is no JSON": (text("generation_config.json", "!"), "generation_config.json"),
    "generation_config with a bad end token": (
        text("generation_config.json", '{"eos_token_id": "x"}'),
        "eos_token_id",
    ),
    "a pipe as the generation_config": (
        replace("generation_config.json", os.mkfifo),
        "generation_config.json",
    ),
    # the tokenizer
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json"),
    "tokenizer that is garbage": (text("tokenizer.json", b"\xff\x00garbage"), "tokenizer.json"),
    "tokenizer cut in the middle": (
        lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:2000]),
        "tokenizer.json",
    ),
    "tokenizer that is an empty object": (text("tokenizer.json", "{}"), "tokenizer.json"),
    "tokenizer of 300 MB": (sparse("tokenizer.json", 300_000_000), "tokenizer.json"),
    "tokenizer with merges of unknown tokens": (
        edit("tokenizer.json", lambda t: t["model"].update(merges=[["no", "where"]])),
        "tokenizer.json",
    ),
    "tokenizer with ids beyond 32 bits": (
        edit("tokenizer.json", lambda t: t["model"]["vocab"].update(a=1 << 40)),
        "tokenizer.json",
    ),
    "tokenizer with a ruinous pattern": (
        edit(
            "tokenizer.json", lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}})
        ),
        "tokenizer.json",
    ),
    "tokenizer with more tokens than the model": (
        edit("tokenizer.json", lambda t: t["model"]["vocab"].update({f"x{i}": i for i in range(265, 300)})),
        r"tokenizer\.json has 300 entries",
    ),
    "a pipe as the tokenizer": (replace("tokenizer.json", os.mkfifo), "tokenizer.json"),
    "tokenizer_config that is no JSON": (text("tokenizer_config.json", "{"), "tokenizer_config.json"),
    "tokenizer_config nested 100000 deep": (
        text("tokenizer_config.json", nested(100_000)),
        "tokenizer_config.json",
    ),
    "tokenizer_config with odd added tokens": (
        edit("tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"x": 1})),
        "tokenizer_config.json",
    ),
    # the chat template
    "template that is a number": (
        edit("tokenizer_config.json", lambda c: c.update(chat_template=3)),
        TEMPLATE,
    ),
    "template with a syntax error": (template("{% for x in %}"), TEMPLATE),
    "template that never ends": (template(ENDLESS), TEMPLATE),
    "template with a huge range": (template("{% for x in range(10**12) %}x{% endfor %}"), TEMPLATE),
    "template that doubles a string": (
        template(DOUBLING),
        TEMPLATE,
    ),
    "template that repeats a string": (template("{{ 'x' * 10**10 }}"), TEMPLATE),
    "template with a huge power": (template("{{ 10 ** 99999 }}"), TEMPLATE),
    "template with a wide format": (template("{{ '%999999999d' % 1 }}"), TEMPLATE),
    "template macro that calls itself": (
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        TEMPLATE,
    ),
    "template that climbs to object": (template(ATTRIBUTES), TEMPLATE),
    "template that reaches globals": (template("{{ cycler.__init__.__globals__ }}"), TEMPLATE),
    "template that includes a file": (template("{% include '/etc/passwd' %}"), TEMPLATE),
    "template nested 10000 deep": (template("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}"), TEMPLATE),
    "template that raises": (template("{{ raise_exception('no\nuser\nmessages') }}"), TEMPLATE),
    "template that divides by zero": (template("{{ 1 // 0 }}"), TEMPLATE),
}

SHARDED_DAMAGES: dict[str, tuple[Damage, str]] = {
    "index that names an absent shard": (
        placed("model-00009-of-00009.safetensors"),
        "00009.safetensors is missing",
    ),
    "index that climbs out": (placed("../other/model.safetensors"), rf"{INDEX}.*\.\./other"),
    "index with an absolute path": (placed("/etc/passwd"), f"{INDEX}.*/etc/passwd"),
    "index with a drive": (placed("C:\\model.safetensors"), f"{INDEX}.*C:"),
    "index with an empty name": (placed(""), INDEX),
    "index with a control character": (placed("a\nb.safetensors"), INDEX),
    "index that names the config": (placed("config.json"), f"{INDEX}.*config.json"),
    "index that places a tensor wrongly": (
        placed("model-00002-of-00002.safetensors"),
        f"{INDEX} places .*A_log in",
    ),
    "index with a number for a shard": (index(lambda i: i["weight_map"].update(a=3)), INDEX),
    "index that is no JSON": (text(INDEX, "weight_map"), f"{INDEX} is not valid JSON"),
    "index that is a list": (text(INDEX, "[]"), f"{INDEX} is a JSON list"),
    "index without weight_map": (text(INDEX, "{}"), f"{INDEX}: weight_map"),
    "index with a list as weight_map": (text(INDEX, '{"weight_map": []}'), f"{INDEX}: weight_map"),
    "index with a tensor twice": (text(INDEX, '{"weight_map": {"a": "b", "a": "c"}}'), f"{INDEX}.*twice"),
    "index nested 100000 deep": (text(INDEX, nested(100_000)), INDEX),
    "index of 200 MB": (sparse(INDEX, 200_000_000), INDEX),
    "a pipe as the index": (replace(INDEX, os.mkfifo), f"{INDEX} is not a regular file"),
    "index that links out": (outside(INDEX), f"{INDEX} is a link to"),
    "a shard that is gone": (remove(FIRST), f"{FIRST} is missing"),
    "a shard that is gone, and no index": (lambda f: (remove(FIRST)(f), remove(INDEX)(f)), "is missing from"),
    "a tensor in two shards": (
        lambda f: (shutil.copy(f / FIRST, f / "copy.safetensors"), placed("copy.safetensors")(f)),
        "is stored twice, also as .* in .*safetensors",
    ),
}

PACKED_DAMAGES: dict[str, tuple[Damage, str]] = {
    "bits that fit no mode": (
        put(f"{PACKED}.weight", mx.zeros((192, 14), mx.uint32)),
        rf"{re.escape(PACKED)}\.weight cannot be unpacked: MLX has no affine quantization of 7 bits",
    ),
    "columns that do not divide": (
        put(f"{PACKED}.weight", mx.zeros((192, 9), mx.uint32)),
        f"{PACKED}.weight cannot be unpacked: 9 packed columns",
    ),
    "no packed columns": (put(f"{PACKED}.weight", mx.zeros((192, 0), mx.uint32)), f"{PACKED}.weight"),
    "a packed vector": (put(f"{PACKED}.weight", mx.zeros(192, mx.uint32)), f"{PACKED}.weight has the shape"),
    "groups that fit no mode": (
        tensors(lambda t: t.update({f"{PACKED}.{part}": mx.ones((192, 4)) for part in ("scales", "biases")})),
        f"{PACKED}.weight cannot be unpacked: MLX has no affine quantization of 4 bits in groups of 16",
    ),
    "no scales": (without(f"{PACKED}.scales"), f"{PACKED}.biases belongs to a packed weight"),
    "neither scales nor biases": (
        without(f"{PACKED}.scales", f"{PACKED}.biases"),
        f"{PACKED}.weight is packed",
    ),
    "no biases": (without(f"{PACKED}.biases"), f"{PACKED}.scales has the dtype BF16, wanted U8"),
    "no packed weight": (without(f"{PACKED}.weight"), f"{PACKED}.* comes without its weight"),
    "scales of whole numbers": (
        put(f"{PACKED}.scales", mx.ones((192, 2), mx.int32)),
        f"{PACKED}.scales has the dtype",
    ),
    "scales of another shape": (put(f"{PACKED}.scales", mx.ones((191, 2))), f"{PACKED}.scales has the shape"),
    "biases of another shape": (
        put(f"{PACKED}.biases", mx.ones((192, 1), mx.bfloat16)),
        f"{PACKED}.biases has the shape",
    ),
    "biases of another dtype": (
        put(f"{PACKED}.biases", mx.ones((192, 2))),
        f"{PACKED}.biases has the dtype F32",
    ),
    "words of another dtype": (
        put(f"{PACKED}.weight", mx.zeros((192, 8), mx.int32)),
        f"{PACKED}.weight has the dtype",
    ),
    "a packed norm": (
        put("language_model.model.norm.scales", mx.ones((1, 1))),
        "norm.scales belongs to a packed weight, and the weight is not packed",
    ),
    "FP8 scales on packed words": (
        put(f"{PACKED}.weight_scale_inv", mx.ones((2, 1))),
        "weight_scale_inv cannot be combined with",
    ),
}

EXPERT_DAMAGES: dict[str, tuple[Damage, str]] = {
    "a missing expert": (
        without(LAYER + "mlp.experts.2.up_proj.weight"),
        r"layers\.0\.mlp\.experts\.2\.up_proj is missing",
    ),
    "an expert too many": (
        put(LAYER + "mlp.experts.4.up_proj.weight", mx.zeros((64, 64), mx.bfloat16)),
        r"experts\.4\.up_proj\.weight is not part",
    ),
    "an expert of another dtype": (
        put(LAYER + "mlp.experts.2.up_proj.weight", mx.zeros((64, 64), mx.float32)),
        r"experts\.2\.up_proj\.weight is .*float32, and the first expert is .*bfloat16",
    ),
    "an expert of another shape": (
        put(LAYER + "mlp.experts.2.up_proj.weight", mx.zeros((64, 63), mx.bfloat16)),
        r"experts\.2\.up_proj\.weight has the shape",
    ),
    "an expert stored twice": (
        put(LAYER + "mlp.experts.gate_up_proj", mx.zeros((4, 128, 64), mx.bfloat16)),
        "gate_up_proj is not part",
    ),
    "more experts chosen than there are": (config(num_experts_per_tok=5), "num_experts_per_tok"),
    "10**9 experts": (config(num_experts=10**9), "num_experts"),
    "no experts": (config(num_experts=0), "num_experts"),
}

DAMAGES = {
    "raw": RAW_DAMAGES,
    "sharded": SHARDED_DAMAGES,
    "packed": PACKED_DAMAGES,
    "experts": EXPERT_DAMAGES,
}
