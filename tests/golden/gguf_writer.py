"""Write a tiny transformers model as a GGUF file, in that format's own conventions."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from kvarn.models.gguf import LAYER_NAMES, TOP_NAMES

ARCHITECTURE = {"gemma3_text": "gemma3", "mistral": "llama"}


def write_gguf(path: Path, model: Any, kind: Kind = Kind.F32) -> dict[str, torch.Tensor]:
    """Write `model`; matrices in `kind`. Returns the weights as a reader will see them."""
    config = model.config
    arch = ARCHITECTURE.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    _metadata(writer, config, arch)
    seen = {}
    for name, weight in model.state_dict().items():
        name = name.removeprefix("model.")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        x = weight.float()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            x = _interleave(x, config.head_dim)
        if arch.startswith("gemma") and "norm" in name:
            x = x + 1
        used = kind if x.dim() == 2 else Kind.F32
        raw = gguf.quants.quantize(x.numpy(), used)
        writer.add_tensor(_stored_name(name, arch), raw, raw_dtype=used)
        y = torch.from_numpy(np.array(gguf.quants.dequantize(raw, used), dtype=np.float32))
        seen[name] = y
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return seen


def _metadata(writer: Any, config: Any, arch: str) -> None:
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_eos_token_id(config.eos_token_id)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        writer.add_key_length(head_dim)
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if full["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(config, full))


def _llama3_divisors(config: Any, rope: dict[str, Any]) -> np.ndarray:
    """As llama.cpp's converter writes them: 1 for short waves, the factor for long ones."""
    divisors = []
    for i in range(0, config.head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (i / config.head_dim)
        turns = rope["original_max_position_embeddings"] / wave
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def _interleave(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k from halves to interleaved pairs, as llama.cpp's converter does."""
    halves = x.reshape(-1, 2, head_dim // 2, *x.shape[1:])
    return halves.transpose(1, 2).reshape(x.shape).contiguous()


def _stored_name(name: str, arch: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("layers."):
        return f"{TOP_NAMES[stem]}.{kind}"
    _, layer, inner = stem.split(".", 2)
    names = dict(LAYER_NAMES)
    gemma = arch.startswith("gemma")
    names["post_attention_layernorm"] = "post_attention_norm" if gemma else "ffn_norm"
    return f"blk.{layer}.{names[inner]}.{kind}"
