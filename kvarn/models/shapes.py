"""Named shapes of well-known models, for random weights: `load="random"` needs no files."""

from typing import Any

from kvarn.core.errors import ModelError, nearest
from kvarn.core.model import ModelSpec
from kvarn.models.hf_config import spec_from_config


def _config(
    kind: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    max_len: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_len,
        **more,
    }


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_LLAMA3: dict[str, Any] = {
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [128001, 128009],
}
_LLAMA31 = _LLAMA3 | {"rope_scaling": _llama3(8.0)}
_LLAMA32 = _LLAMA3 | {"rope_scaling": _llama3(32.0), "head_dim": 64, "tie_word_embeddings": True}
_QWEN2: dict[str, Any] = {"rope_theta": 1e6, "eos_token_id": [151645, 151643]}
_QWEN3 = _QWEN2 | {"head_dim": 128}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_SMOLLM2 = _TIED | {"rope_theta": 1e5, "rms_norm_eps": 1e-5, "eos_token_id": 2, "bos_token_id": 1}
_MISTRAL: dict[str, Any] = {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "eos_token_id": 2}
_GEMMA3_LONG: dict[str, Any] = {
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}

#: name -> config.json
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _config(
        "llama", 32, 4096, 11008, 32, 32, 32000, 4096, rms_norm_eps=1e-5, eos_token_id=2
    ),
    "llama-3-8b": _config("llama", 32, 4096, 14336, 32, 8, 128256, 8192, **_LLAMA3),
    "llama-3.1-8b": _config("llama", 32, 4096, 14336, 32, 8, 128256, 131072, **_LLAMA31),
    "llama-3.1-70b": _config("llama", 80, 8192, 28672, 64, 8, 128256, 131072, **_LLAMA31),
    "llama-3.2-1b": _config("llama", 16, 2048, 8192, 32, 8, 128256, 131072, **_LLAMA32),
    "llama-3.2-3b": _config(
        "llama", 28, 3072, 8192, 24, 8, 128256, 131072, **_LLAMA32 | {"head_dim": 128}
    ),
    "smollm2-135m": _config("llama", 30, 576, 1536, 9, 3, 49152, 8192, **_SMOLLM2),
    "smollm2-360m": _config("llama", 32, 960, 2560, 15, 5, 49152, 8192, **_SMOLLM2),
    "smollm2-1.7b": _config(
        "llama", 24, 2048, 8192, 32, 32, 49152, 8192, **_SMOLLM2 | {"rope_theta": 1.3e5}
    ),
    "mistral-7b": _config(
        "mistral", 32, 4096, 14336, 32, 8, 32000, 32768, sliding_window=4096, **_MISTRAL
    ),
    "qwen2.5-0.5b": _config("qwen2", 24, 896, 4864, 14, 2, 151936, 32768, **_QWEN2, **_TIED),
    "qwen2.5-1.5b": _config("qwen2", 28, 1536, 8960, 12, 2, 151936, 32768, **_QWEN2, **_TIED),
    "qwen2.5-7b": _config("qwen2", 28, 3584, 18944, 28, 4, 152064, 32768, **_QWEN2),
    "qwen3-0.6b": _config("qwen3", 28, 1024, 3072, 16, 8, 151936, 40960, **_QWEN3, **_TIED),
    "qwen3-1.7b": _config("qwen3", 28, 2048, 6144, 16, 8, 151936, 40960, **_QWEN3, **_TIED),
    "qwen3-8b": _config("qwen3", 36, 4096, 12288, 32, 8, 151936, 40960, **_QWEN3),
    "qwen3-32b": _config("qwen3", 64, 5120, 25600, 64, 8, 151936, 40960, **_QWEN3),
    "gemma-2-2b": _config("gemma2", 26, 2304, 9216, 8, 4, 256000, 8192),
    "gemma-2-9b": _config("gemma2", 42, 3584, 14336, 16, 8, 256000, 8192),
    "gemma-3-1b": _config("gemma3_text", 26, 1152, 6912, 4, 1, 262144, 32768, sliding_window=512),
    "gemma-3-4b": _config("gemma3_text", 34, 2560, 10240, 8, 4, 262208, 131072, **_GEMMA3_LONG),
}


def named_shape(name: str) -> ModelSpec:
    """The shape called `name`, in any case; `ModelError` names the nearest one."""
    if name.lower() not in SHAPES:
        raise ModelError(f"no shape is called {name!r}{nearest(name.lower(), SHAPES)}")
    return spec_from_config(SHAPES[name.lower()], name)
