"""GGUF conventions: `ModelSpec` from the metadata, and tensors under their Hugging Face names."""

from typing import Any

import torch
from torch import Tensor

from kvarn.core.errors import ModelError
from kvarn.core.model import ModelSpec, RopeScaling
from kvarn.kernels.linear.quantize import rows_of
from kvarn.kernels.linear.stored import Stored
from kvarn.kernels.rope import frequencies
from kvarn.models.gguf_file import GGUFFile
from kvarn.models.weights import Part

#: architecture as GGUF names it -> family
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
}

#: our names -> GGUF's, inside a layer
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
LARGEST = 1 << 30  #: no number of a model reaches this
TOP_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}

#: control tokens that end a turn of a chat, whatever the metadata's one end token is
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")


def spec_from_gguf(file: GGUFFile, name: str) -> ModelSpec:
    """The shape of the model in `file`; `ModelError` for a family that is not supported."""
    meta = file.metadata
    arch = meta.get("general.architecture", "(none)")
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: architecture {arch!r} is not supported; "
            f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    family = ARCHITECTURES[arch]
    get = _Getter(file, arch)
    n_layers, hidden = get("block_count"), get("embedding_length")
    n_heads = get("attention.head_count")
    head_dim = get("attention.key_length", hidden // n_heads)
    gemma = family.startswith("gemma")
    return ModelSpec(
        family=family,
        name=name,
        n_layers=n_layers,
        hidden=hidden,
        ffn=get("feed_forward_length"),
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        vocab=_shape(file, "token_embd.weight")[0],
        max_len=get("context_length"),
        norm_eps=round(get("attention.layer_norm_rms_epsilon", kind=float), 12),
        rope_theta=get("rope.freq_base", 1e6 if family == "gemma3" else 1e4, float),
        rope_local_theta=get("rope.freq_base_swa", 1e4, float) if family == "gemma3" else None,
        rope_scaling=_rope_scaling(file, get, head_dim),
        windows=_windows(file, get, family),
        activation="gelu_tanh" if gemma else "silu",
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        norm_offset=1.0 if gemma else 0.0,
        sandwich_norms=gemma,
        embed_scale=hidden**0.5 if gemma else 1.0,
        attn_scale=_attn_scale(family, n_layers, hidden, n_heads),
        attn_softcap=get("attn_logit_softcapping", 50.0, float) if family == "gemma2" else None,
        logit_softcap=get("final_logit_softcapping", 30.0, float) if family == "gemma2" else None,
        tie_embeddings="output.weight" not in file.tensors,
        eos_ids=_eos_ids(meta),
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
    )


class _Getter:
    """Metadata of one architecture: `get("block_count")` reads "llama.block_count".

    The value must be a positive number; `kind` float allows more than integers.
    """

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file, self.arch = file, arch

    def __call__(self, key: str, default: Any = None, kind: type = int) -> Any:
        name = f"{self.arch}.{key}"
        value = self.file.metadata.get(name, default)
        if value is None:
            raise ModelError(f"{self.file.path}: metadata has no {name}")
        if isinstance(value, list):
            if len(set(map(str, value))) != 1:
                raise ModelError(
                    f"{self.file.path}: {name} differs from layer to layer, which is not supported"
                )
            value = value[0]
        kinds = (int, float) if kind is float else (int,)
        number = isinstance(value, kinds) and not isinstance(value, bool)
        if value != default and not (number and 0 < value < LARGEST):
            raise ModelError(f"{self.file.path}: {name} cannot be {value!r}")
        return value


def _shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise file.broken(name, "is missing")
    return file.tensors[name].shape


def _windows(file: GGUFFile, get: _Getter, family: str) -> tuple[int | None, ...]:
    """Which layers slide: as the metadata says, or else by the family's fixed period."""
    n_layers: int = get("block_count")
    window: int = get("attention.sliding_window", 0)
    if not window or family.startswith("qwen"):
        return ()
    said = file.metadata.get(f"{get.arch}.attention.sliding_window_pattern")
    if isinstance(said, list) and len(said) == n_layers:
        return tuple(window if slides else None for slides in said)
    # Gemma alternates: every second (2) or every sixth layer (3) sees everything
    period = said if isinstance(said, int) else {"gemma2": 2, "gemma3": 6}.get(family, 0)
    if period < 1:
        return (window,) * n_layers
    return tuple(None if (i + 1) % period == 0 else window for i in range(n_layers))


def _attn_scale(family: str, n_layers: int, hidden: int, n_heads: int) -> float | None:
    """Only the 27B Gemmas depart from head_dim ** -0.5; the metadata does not say so."""
    largest = {"gemma2": 46, "gemma3": 62}.get(family)
    return (hidden / n_heads) ** -0.5 if n_layers == largest else None


def _rope_scaling(file: GGUFFile, get: _Getter, head_dim: int) -> RopeScaling | None:
    kind = file.metadata.get(f"{get.arch}.rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling("linear", get("rope.scaling.factor", kind=float))
    if kind != "none":
        raise ModelError(
            f"{file.path}: rope scaling {kind!r} is not supported; supported: linear, llama3"
        )
    if "rope_freqs.weight" not in file.tensors:
        return None
    return _llama3_scaling(file, get("rope.freq_base", 1e4, float), head_dim)


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> RopeScaling:
    """Llama 3's scaling is stored as divisors of the frequencies; find the parameters again."""
    divisors = file.read("rope_freqs.weight").float()
    scaling = RopeScaling("llama3", factor=round(divisors.max().item(), 4))
    expected = frequencies(head_dim, theta, None) / frequencies(head_dim, theta, scaling)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise file.broken("rope_freqs.weight", "holds a rope scaling other than llama3's")
    return scaling


def _eos_ids(meta: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens that the metadata names, and those that end a turn of its chat template."""
    ids = [meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")]
    template = str(meta.get("tokenizer.chat_template", ""))
    wanted = {token for token in TURN_ENDS if token in template}
    if wanted:
        tokens = meta.get("tokenizer.ggml.tokens", [])
        ids += [i for i, token in enumerate(tokens) if token in wanted]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


class GGUFWeights:
    """`Weights` of a GGUF file, turned back into Hugging Face's conventions."""

    def __init__(self, file: GGUFFile, spec: ModelSpec) -> None:
        self.file, self.spec = file, spec

    def read(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """See `Weights.read`; of `part`, rows are read alone, columns cut out of whole rows."""
        stored = self._checked(name, shape)
        x = self.file.read(stored, None if part is None else part[0])
        if part is not None:
            x = x[(slice(None), *part[1:])].contiguous()
        if self.spec.norm_offset and "norm" in stored:
            x = x.float() - self.spec.norm_offset
        return _rotate_half_order(x, self.spec.head_dim) if self._interleaves(stored) else x

    def stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        """See `Weights.stored`: codes and scales as they lie in the file, if it has such."""
        stored = self._checked(name, shape)
        weight = self.file.read_affine(stored)
        if weight is None:
            return self.read(name, shape)
        if not self._interleaves(stored):
            return weight
        return rows_of(weight, _rotate_half_order(torch.arange(shape[0]), self.spec.head_dim))

    def _checked(self, name: str, shape: tuple[int, ...]) -> str:
        """The name in the file of a tensor that must have `shape`."""
        stored = self._stored_name(name)
        found = _shape(self.file, stored)
        if found != shape:
            raise self.file.broken(stored, f"has shape {list(found)}, expected {list(shape)}")
        return stored

    def _interleaves(self, stored: str) -> bool:
        """Whether the converter interleaved the halves: of q and k, for one architecture only."""
        of_q_or_k = stored.split(".")[-2] in ("attn_q", "attn_k")
        return of_q_or_k and self.file.metadata["general.architecture"] == "llama"

    def _stored_name(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("layers."):
            return f"{TOP_NAMES[stem]}.{kind}"
        _, layer, inner = stem.split(".", 2)
        if inner == "post_attention_layernorm":
            inner = "post_attention_norm" if self.spec.sandwich_norms else "ffn_norm"
        else:
            inner = LAYER_NAMES[inner]
        return f"blk.{layer}.{inner}.{kind}"


def _rotate_half_order(x: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k [heads * d, ...] from interleaved pairs to first and second halves."""
    rest = x.shape[1:]
    pairs = x.reshape(-1, head_dim // 2, 2, *rest)
    return pairs.transpose(1, 2).reshape(-1, *rest)
