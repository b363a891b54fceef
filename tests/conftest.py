"""Fixtures that every kind of test may use."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

#: one tiny shape a family that differs in what the engine must handle: groups, windows, caps
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 12},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 10,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from family to a folder with a tiny config.json (for `load="random"`)."""
    root = tmp_path_factory.mktemp("tiny")

    def make(family: str) -> str:
        folder: Path = root / family
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(COMMON | TINY[family]))
        return str(folder)

    return make
