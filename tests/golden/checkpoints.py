"""Tiny random checkpoints of every family, saved by transformers."""

import json
from pathlib import Path
from typing import Any

import torch

from kvarn.core.model import ModelSpec
from kvarn.models.decoder import Decoder
from kvarn.models.hf_config import spec_from_config
from kvarn.models.safetensors_file import SafetensorsWeights

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "hidden_size": 96, "num_attention_heads": 6},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "mistral-full": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "head_dim": 32, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 1
            + ["sliding_attention"],
            "sliding_window": 8,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}
PROMPT = [int(i) for i in torch.randint(3, 128, (21,), generator=torch.Generator().manual_seed(1))]


def checkpoint(case: str, folder: Path, **more: Any) -> Any:
    """A random model of the case, saved as safetensors; norms and biases are random too.

    `more` changes the config further (rope parameters are merged with the case's own).
    """
    config_class, changes = CASES[case]
    rope = changes.get("rope_parameters", {}) | more.pop("rope_parameters", {})
    changes = changes | more | ({"rope_parameters": rope} if rope else {})
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(TINY | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    return model.eval()


def loaded(folder: Path) -> tuple[Decoder, ModelSpec]:
    """The checkpoint through kvarn's own reader."""
    spec = spec_from_config(json.loads((folder / "config.json").read_text()), folder.name)
    return Decoder(spec, SafetensorsWeights(folder)), spec
