"""`ModelSpec` from a Hugging Face `config.json`, of transformers 4 or 5."""

from collections.abc import Mapping
from typing import Any

from kvarn.core.errors import ModelError
from kvarn.core.model import Activation, ModelSpec, RopeScaling

Config = Mapping[str, Any]

#: model_type -> family; what configs leave out is filled in from `DEFAULTS`
FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
}

_GEMMA: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}

#: the values that a family's configs may leave out
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "max_window_layers": 28, "head_dim": 128},
    "gemma2": _GEMMA
    | {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "sliding_window_pattern": 2,
    },
    "gemma3": _GEMMA
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
    },
}

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def spec_from_config(config: Config, name: str, generation: Config | None = None) -> ModelSpec:
    """The shape of the model that `config` describes.

    `generation` is its `generation_config.json`, which often names more end tokens. Raises
    `ModelError` for an unsupported family, rope scaling or activation.
    """
    kind = config.get("model_type", "(none)")
    if kind not in FAMILIES:
        raise ModelError(
            f"{name}: model_type {kind!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))} (SmolLM2 is llama)"
        )
    family = FAMILIES[kind]
    inner = dict(config) | dict(config.get("text_config") or {})
    get = _Fields(inner, DEFAULTS[family], name)
    gemma = family.startswith("gemma")
    hidden, n_heads = get("hidden_size"), get("num_attention_heads")
    full, local = _ropes(get, name)
    bias, bos = bool(get("attention_bias", False)), get("bos_token_id", -1)
    return ModelSpec(
        family=family,
        name=name,
        n_layers=get("num_hidden_layers"),
        hidden=hidden,
        ffn=get("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=get("num_key_value_heads", n_heads),
        head_dim=get("head_dim", hidden // n_heads),
        vocab=get("vocab_size"),
        max_len=get("max_position_embeddings"),
        norm_eps=get("rms_norm_eps", 1e-6),
        rope_theta=full[0],
        rope_local_theta=None if local == full[0] else local,
        rope_scaling=full[1],
        windows=_windows(get, family, name),
        activation=_activation(get, name),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "gemma3"),
        norm_offset=1.0 if gemma else 0.0,
        sandwich_norms=gemma,
        embed_scale=hidden**0.5 if gemma else 1.0,
        attn_scale=get("query_pre_attn_scalar") ** -0.5 if gemma else None,
        attn_softcap=get("attn_logit_softcapping", 0) or None,
        logit_softcap=get("final_logit_softcapping", 0) or None,
        tie_embeddings=bool(get("tie_word_embeddings", False)),
        eos_ids=_eos_ids(generation or {}, inner, DEFAULTS[family]),
        bos_id=None if bos < 0 else bos,
    )


class _Fields:
    """`get(key, default)`: the config's value, else the family's; `default` where that is null."""

    def __init__(self, config: Config, family: Config, name: str) -> None:
        self.config, self.family, self.name = config, family, name

    def __call__(self, key: str, default: Any = None) -> Any:
        value = self.config[key] if key in self.config else self.family.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.name}: config.json has no {key!r}")
        return value


def _activation(get: _Fields, name: str) -> Activation:
    word = get("hidden_activation", "") or get("hidden_act", "silu")
    if word not in ACTIVATIONS:
        raise ModelError(
            f"{name}: activation {word!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[word]


def _ropes(get: _Fields, name: str) -> tuple[tuple[float, RopeScaling | None], float | None]:
    """((theta, scaling) of full-attention layers, theta of sliding-window layers or None)."""
    new = get("rope_parameters", {})
    if "full_attention" in new or "sliding_attention" in new:
        full, local = new.get("full_attention") or {}, new.get("sliding_attention") or {}
        theta = full.get("rope_theta", get("rope_theta", 1e4))
        local_theta = local.get("rope_theta", get("rope_local_base_freq", theta))
        if _scaling(local, get, name) is not None:
            raise ModelError(f"{name}: rope scaling of sliding-window layers is not supported")
        return (theta, _scaling(full, get, name)), local_theta
    theta = new.get("rope_theta", get("rope_theta", 1e4))
    scaling = _scaling(new or get("rope_scaling", {}), get, name)
    return (theta, scaling), get("rope_local_base_freq", 0) or None


def _scaling(rope: Config, get: _Fields, name: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"{name}: partial rotary embedding is not supported")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise ModelError(
        f"{name}: rope scaling {kind!r} is not supported; supported: default, linear, llama3"
    )


def _windows(get: _Fields, family: str, name: str) -> tuple[int | None, ...]:
    """One window a layer, () where no layer slides."""
    n_layers, window = get("num_hidden_layers"), get("sliding_window", 0)
    if family == "llama" or not window:
        return ()
    if family.startswith("qwen") and not get("use_sliding_window", False):
        return ()
    types = get("layer_types", [])
    if not types and family.startswith("qwen"):
        slides = [i >= get("max_window_layers") for i in range(n_layers)]
    elif not types and family.startswith("gemma"):
        slides = [(i + 1) % get("sliding_window_pattern") != 0 for i in range(n_layers)]
    elif not types:
        slides = [True] * n_layers
    else:
        slides = [kind == "sliding_attention" for kind in types]
        if len(types) != n_layers or set(types) - {"sliding_attention", "full_attention"}:
            raise ModelError(
                f"{name}: layer_types must name sliding_attention or full_attention for each of "
                f"the {n_layers} layers"
            )
    return tuple(window if s else None for s in slides) if any(slides) else ()


def _eos_ids(generation: Config, config: Config, family: Config) -> tuple[int, ...]:
    """The end tokens that the generation config and the config name, or else the family's."""
    said = [source["eos_token_id"] for source in (generation, config) if "eos_token_id" in source]
    ids: list[int] = []
    for value in said or [family.get("eos_token_id")]:
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))
