"""What jobs of the scripted engine end with, and the progress that they report."""

from typing import Any

OPTIONS = {
    "recipe": "none",
    "bits": 4,
    "group_size": 32,
    "mode": "affine",
    "mxfp": False,
    "float_map": False,
    "keep_bf16": False,
    "mtp": "keep",
    "vision": "keep",
}
PROGRESS = {"event": "progress", "done": 1, "total": 4, "unit": "bytes", "detail": "x", "seconds_left": 3.0}

PERFORMANCE = {
    "seconds_to_first_token": 0.5,
    "prefill_tokens_per_s": 400.0,
    "decode_tokens_per_s": 25.0,
    "seconds": 2.0,
    "seconds_thinking": 0.0,
    "active_nbytes": 5 << 30,
    "peak_nbytes": 6 << 30,
    "cache_nbytes": 1 << 28,
    "drafts_accepted": None,
    "drafts_by_place": [],
    "draft_cost": None,
    "draft_gain": None,
}


def _score(kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "tokens": 756,
        "perplexity": 8.0,
        "reference_perplexity": 7.5,
        "kl_mean": 0.02,
        "kl_p99": 0.5,
        "top1_agreement": 0.9,
        "kl_interval": [0.01, 0.03],
    }


def _answer_row(side: int, model: str, text: str) -> dict[str, Any]:
    return {
        "event": "row",
        "side": side,
        "model": model,
        "path": f"/models/{model}",
        "nbytes": 4 << 30,
        "text": text,
        "thinking": "",
        "finish_reason": "stop",
        "generated_tokens": 12,
        "reasoning_tokens": 0,
        **PERFORMANCE,
    }


RESULTS_OF_JOBS: dict[str, dict[str, Any]] = {
    "convert": {
        "name": "new-4bit",
        "source": "new",
        "command": "qchat convert -i new -o new-4bit -q",
        "options": OPTIONS,
        "nbytes": 295_304,
        "bits_per_weight": 5.8,
        "weights_nbytes": 761_072,
        "seconds": 0.1,
        "total_seconds": 1.2,
        "kept_shards": 0,
        "warnings": [],
        "repairs": ["raw layout"],
        "notes": [],
        "awq": [],
        "check": {
            "weights": {"affine 4-bit group 32": 0.08, "affine 8-bit group 64": 0.007, "dense": 0.002},
            "tokens": 8,
            "logits_error": 0.7,
            "kl_divergence": 0.3,
            "same_top": 0.1,
        },
        "rounding": None,
        "importances": [],
        "allocation": None,
        "folder": "/models/new-4bit",
    },
    "calibrate": {
        "path": "/models/x.gguf",
        "chunks": 2,
        "chunk_size": 64,
        "resumed": 0,
        "modules": 40,
        "experts": 0,
        "unreached": 0,
    },
    "eval": {
        "rows": [
            {
                "model": "/models/new-4bit",
                "reference": "/models/new",
                "context": 64,
                "scores": [_score("prose")],
                "overall": _score("all"),
                "nbytes": 4 << 30,
                "flips": [
                    {"kind": "prose", "before": "to be", "reference": " or", "model": " and", "kl": 0.5}
                ],
            }
        ],
        "behind": [None],
    },
    "bench": {
        "rows": [
            {
                "event": "row",
                "place": 0,
                "model": "new",
                "path": "/models/new",
                "nbytes": 4 << 30,
                "load_seconds": 0.1,
                "capitals_tokens_per_s": 24.0,
                "decode_tokens_per_s": 25.0,
                "prefill_tokens_per_s": 400.0,
                "prefills": {"64": 400.0},
                "first_token_seconds": 0.5,
                "cached_first_token_seconds": 0.1,
                "peak_nbytes": 6 << 30,
                "step_nbytes": 4 << 30,
                "bandwidth": 200e9,
                "speeds": [24.0, 25.0],
                "against": None,
                "bandwidth_share": 0.5,
            }
        ]
    },
    "compare": {
        "rows": [_answer_row(0, "new", "Paris."), _answer_row(1, "new-4bit", "It is Paris.")],
        "kl_mean": 0.3,
        "kl_p99": 0.9,
        "top1_agreement": 0.8,
    },
    "inspect": {
        "model": "/models/new",
        "model_type": "qwen3_5",
        "layers": 4,
        "attention_layers": 1,
        "hidden_size": 64,
        "vocab_size": 288,
        "context": 4096,
        "weights": 380_536,
        "total_bytes": 761_288,
        "bits_per_weight": 16.0,
        "tensor_count": 70,
        "classes": [],
        "repairs": [],
        "notices": [],
    },
    "plan": {
        "source": "/models/new/config.json",
        "options": OPTIONS,
        "total_bytes": 277_728,
        "bits_per_weight": 5.8,
        "bytes_per_token": 194_272,
        "disk_bytes": 50_651_376,
        "classes": [
            {
                "name": "embed",
                "mode": "affine 4-bit group 32",
                "tensors": 1,
                "weights": 18_432,
                "nbytes": 11_520,
                "read_nbytes": 11_520,
                "bits_per_weight": 5.0,
            }
        ],
        "notes": [],
        "bandwidth_gb_s": 400.0,
        "tokens_per_s": 2000.0,
    },
    "memory_plan": {
        "context": 2048,
        "chunk": 2048,
        "weights_nbytes": 139_696_320,
        "state_nbytes": 1_646_592,
        "kv_nbytes": 8_388_608,
        "kv_nbytes_per_token": 4096,
        "picture_tokens": 0,
        "picture_nbytes": 0,
        "transient_nbytes": 126_877_696,
        "snapshot_nbytes": 5 << 30,
        "free_nbytes": 22 << 30,
        "total_nbytes": 6 << 30,
    },
    "fetch": {"path": "/models/new", "nbytes": 4 << 30},
}
