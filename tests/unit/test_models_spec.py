"""Shapes from configs: both forms of rope parameters, windows, end tokens, what is refused."""

from typing import Any

import pytest

from kvarn.core.errors import ModelError
from kvarn.core.model import RopeScaling
from kvarn.models.hf_config import spec_from_config
from kvarn.models.shapes import SHAPES, named_shape

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec(kind: str, **changes: Any) -> Any:
    return spec_from_config(BASE | {"model_type": kind} | changes, "tiny")


def test_old_and_new_rope_forms_agree() -> None:
    old = spec("llama", rope_theta=5e5, rope_scaling=LLAMA3)
    new = spec("llama", rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    assert old == new
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert old.rope_theta == 5e5


def test_old_rope_type_key() -> None:
    found = spec("llama", rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling
    assert found == RopeScaling("linear", 2.0)


def test_gemma3_rope_in_both_forms() -> None:
    old = spec(
        "gemma3_text",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = spec(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert old == new
    assert (old.rope_theta, old.rope_local_theta) == (1e6, 1e4)


def test_sparse_multimodal_gemma3_config_is_filled_in() -> None:
    found = spec_from_config(
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
        "gemma-3-4b-it",
    )
    expected = named_shape("gemma-3-4b")
    assert found.eos_ids == (1, 106)
    for name in (
        "head_dim",
        "n_heads",
        "n_kv_heads",
        "vocab",
        "windows",
        "rope_scaling",
        "max_len",
    ):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize(
    ("kind", "changes", "windows"),
    [
        ("mistral", {"sliding_window": 8}, (8, 8, 8, 8)),
        ("mistral", {"sliding_window": None}, ()),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, ()),
        (
            "qwen2",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 8, 8),
        ),
        ("gemma2", {"sliding_window": 8}, (8, None, 8, None)),
        ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 7}, (8,) * 5 + (None, 8)),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}, (8, None, 8, None)),
    ],
)
def test_windows(kind: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert spec(kind, **changes).windows == windows


def test_end_tokens_of_both_configs() -> None:
    config = BASE | {"model_type": "llama", "eos_token_id": 7}
    found = spec_from_config(config, "tiny", {"eos_token_id": [9, 7]})
    assert found.eos_ids == (9, 7)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "mamba"}, "supported: gemma2, gemma3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_size": None}, "hidden_size"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
    ],
)
def test_what_is_not_supported_is_said(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ModelError, match=word):
        spec_from_config(BASE | {"model_type": "llama"} | changes, "tiny")


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_the_size_in_their_name(name: str) -> None:
    size = name.rsplit("-", 1)[1]
    said = float(size[:-1]) * (1e6 if size.endswith("m") else 1e9)
    assert 0.7 < named_shape(name).n_params() / said < 1.35


def test_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean 'llama-3-8b'"):
        named_shape("lama-3-8b")
