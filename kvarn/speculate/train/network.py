"""The layers of a drafter in torch's own modules, so that they can be trained.

Named and computed as checkpoints of Llama are: what is saved is what `kvarn.models` loads. The
embedding, which is the output matrix too, is the target's, frozen and never saved. A drafter may
have a vocabulary of its own to draft from (FR-Spec, arXiv 2502.14856): the rows of the output
matrix that it multiplies by, which for a small target are most of what a draft reads.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention, silu

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.kernels.rope import frequencies
from kvarn.models.weights import Weights

DRAFTS = "drafts"  #: the tensor beside the weights that names the tokens it drafts


def autocast(device: torch.device) -> torch.autocast:
    """Products in bf16 where the device has instructions for them."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast or device.type != "cpu")


class Attention(nn.Module):
    """Causal attention with rotary positions; x [B, T, hidden], turns (cos, sin) [T, d] each."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.dim = spec.head_dim
        n_q, n_kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden, n_q, bias=False)
        self.k_proj = nn.Linear(spec.hidden, n_kv, bias=False)
        self.v_proj = nn.Linear(spec.hidden, n_kv, bias=False)
        self.o_proj = nn.Linear(n_q, spec.hidden, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """What the layer adds to the residual stream."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _turned(q, turns), _turned(k, turns)
        z = scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(z.transpose(1, 2).flatten(-2))
        return out


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden, spec.ffn, bias=False)
        self.up_proj = nn.Linear(spec.hidden, spec.ffn, bias=False)
        self.down_proj = nn.Linear(spec.ffn, spec.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer adds to the residual stream."""
        out: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One layer of the drafter."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden, spec.norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden, spec.norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """The residual stream after the layer."""
        x = x + self.self_attn(self.input_layernorm(x), turns)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Network(nn.Module):
    """A drafter: tokens [B, T] -> hidden states [B, T, hidden] after the final norm."""

    def __init__(self, spec: ModelSpec, embed: Tensor) -> None:
        """`embed` [vocab, hidden] is the target's."""
        super().__init__()
        self.spec = spec
        self.embed: Tensor
        self.register_buffer("embed", embed, persistent=False)
        #: [n] ascending: the tokens that it drafts; None: all. Training sees all of them
        self.drafts: Tensor | None = None
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.n_layers))
        self.norm = nn.RMSNorm(spec.hidden, spec.norm_eps)
        self.rates: Tensor
        rates = frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, tokens: Tensor, pause: Callable[[], object] | None = None) -> Tensor:
        """Hidden states; what follows a row's end is of no consequence to what comes before.

        `pause` is called between layers, forward and back: it may wait.
        """
        places = torch.arange(tokens.shape[1], dtype=torch.float32, device=tokens.device)
        angles = torch.outer(places, self.rates).repeat(1, 2)
        turns = angles.cos(), angles.sin()
        x = embedding(tokens, self.embed).float()
        for layer in self.layers:
            x = layer(x, turns)
            if pause is not None:
                pause()
                if x.requires_grad:
                    x.register_hook(_hook(pause))
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """What it drafts by: fp32 [n, vocab] of states [n, hidden]."""
        hidden = hidden.to(self.embed.dtype)
        if self.drafts is None:
            return (hidden @ self.embed.T).float()
        found = hidden.new_full((len(hidden), len(self.embed)), -torch.inf, dtype=torch.float32)
        drafts = self.drafts.to(hidden.device)
        return found.index_copy_(1, drafts, (hidden @ self.embed[drafts].T).float())


def _hook(pause: Callable[[], object]) -> Callable[[Tensor], None]:
    """What it returns would take the gradient's place: nothing."""

    def hook(_: Tensor) -> None:
        pause()

    return hook


def _turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate-half rotary embedding of x [B, heads, T, d]."""
    a, b = x.chunk(2, -1)
    return (x * turns[0] + torch.cat((-b, a), -1) * turns[1]).to(x.dtype)


def from_target(spec: ModelSpec, weights: Weights, layers: list[int], ffn: int) -> Network:
    """A drafter that begins as `layers` of the target, with the `ffn` strongest neurons of each.

    Raises `ConfigError` where the target is no plain Llama with a tied embedding.
    """
    if spec.family != "llama" or not spec.tie_embeddings or spec.qkv_bias or spec.mlp_bias:
        raise ConfigError(
            f"{spec.name} ({spec.family}) is no Llama with a tied embedding and without biases; "
            f"drafters are made for those only"
        )
    if not layers or not all(0 <= i < spec.n_layers for i in layers) or not 0 < ffn <= spec.ffn:
        raise ConfigError(
            f"layers must be among 0 to {spec.n_layers - 1} and ffn in 1 to {spec.ffn} for "
            f"{spec.name}, not {layers} and {ffn}"
        )
    own = replace(spec, name=f"{spec.name}-drafter", n_layers=len(layers), ffn=ffn, windows=())
    embed = weights.read("embed_tokens.weight", (spec.vocab, spec.hidden)).float()
    network = Network(own, embed)
    whole = Network(replace(own, n_layers=1, ffn=spec.ffn), embed)
    for to, at in enumerate(layers):
        read = {
            name: weights.read(name.replace("layers.0.", f"layers.{at}."), tuple(x.shape)).float()
            for name, x in whole.state_dict().items()
        }
        mlp = {name: f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        strength = read[mlp["gate"]].norm(dim=1) * read[mlp["up"]].norm(dim=1)
        best = (strength * read[mlp["down"]].norm(dim=0)).topk(ffn).indices.sort().values
        for name, path in mlp.items():
            read[path] = read[path].index_select(1 if name == "down" else 0, best)
        here = {k.replace("layers.0.", f"layers.{to}."): v for k, v in read.items()}
        network.load_state_dict(here, strict=False)
    return network


def save(network: Network, folder: Path, about: dict[str, Any]) -> None:
    """Write the drafter for `kvarn.speculate.train.load`; `about` says how it was trained."""
    spec = network.spec
    config = {
        "model_type": "llama",
        "embedding": "target",
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.max_len,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": True,
        "trained": about,
    }
    if spec.rope_scaling is not None:
        raise ConfigError(f"{spec.name}: drafters with rope scaling cannot be saved")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {name: x.detach().bfloat16().contiguous() for name, x in network.state_dict().items()}
    if network.drafts is not None:
        state[DRAFTS] = network.drafts.int()
    save_file({name: x.cpu() for name, x in state.items()}, folder / "model.safetensors")
