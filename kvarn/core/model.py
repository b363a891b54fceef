"""`ModelSpec`: the shape of a model as plain data, and the KV groups that follow from it.

Read by the decoder (what to compute), the KV manager (which layers share a page table), the memory
ledger and the cost model. No torch here: the simulator needs shapes, not weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(slots=True, frozen=True)
class RopeScaling:
    """Rotary frequency scaling: `linear` (divide) or `llama3` (smooth by wavelength)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0  #: llama3 only
    high_freq_factor: float = 4.0  #: llama3 only
    original_max_len: int = 8192  #: llama3 only [tokens]


@dataclass(slots=True, frozen=True)
class GroupSpec:
    """Layers x KV heads that share one page table; `window` frees what they no longer see."""

    layers: tuple[int, ...]
    n_kv_heads: int  #: of a layer, in the group or not
    head_dim: int
    window: int | None = None  #: a query at position p sees (p - window, p]; None: all [tokens]
    sketched: bool = False  #: bounds of the keys of every page beside it: as large as a position
    share: float = 1.0  #: pages of its pool, over those of a full-attention group
    sinks: int = 0  #: first positions that are seen, and stay, beside the window [tokens]
    heads: tuple[tuple[int, ...], ...] = ()  #: KV heads that it has of each layer; (): all

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """The KV heads of one of its layers that are in the group."""
        if not self.heads:
            return tuple(range(self.n_kv_heads))
        return self.heads[self.layers.index(layer)]

    @property
    def n_heads(self) -> int:
        """KV heads in the group, of all its layers together."""
        if not self.heads:
            return len(self.layers) * self.n_kv_heads
        return sum(len(heads) for heads in self.heads)

    def bytes_per_token(self, dtype_bytes: float) -> float:
        """K and V of one position in all layers of the group."""
        return 2 * self.n_heads * self.head_dim * dtype_bytes

    def sink_pages(self, page_size: int) -> int:
        """Leading pages of a table that stay behind the window."""
        return -(-self.sinks // page_size)

    def seen(self, context: int) -> int:
        """Positions that a row with so many before it reads beside its own."""
        return context if self.window is None else min(context, self.sinks + self.window - 1)


def shares_of(groups: Sequence[GroupSpec]) -> dict[int, list[int]]:
    """The groups that have heads of each layer, by layer; one, but where heads lie apart."""
    found: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        for layer in group.layers:
            found.setdefault(layer, []).append(index)
    return dict(sorted(found.items()))


@dataclass(slots=True, frozen=True)
class ModelSpec:
    """Shape and arithmetic of one dense decoder-only transformer."""

    family: str  #: "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", ...
    name: str  #: what the user calls it
    n_layers: int
    hidden: int  #: width of the residual stream
    ffn: int  #: width of the gated MLP
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    max_len: int  #: longest context the model was made for [tokens]
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_local_theta: float | None = None  #: of sliding-window layers that differ (Gemma 3)
    rope_scaling: RopeScaling | None = None
    windows: tuple[int | None, ...] = ()  #: one entry a layer; () means full attention everywhere
    activation: Activation = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0  #: weight of RMSNorm is (offset + w): 1 for Gemma
    sandwich_norms: bool = False  #: norms after attention and MLP as well as before (Gemma 2, 3)
    embed_scale: float = 1.0  #: the embedding is multiplied by this (Gemma: sqrt(hidden))
    attn_scale: float | None = None  #: None: head_dim ** -0.5
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def window(self, layer: int) -> int | None:
        """Sliding window of `layer`, or None for full attention."""
        return self.windows[layer] if self.windows else None

    @property
    def scale(self) -> float:
        """Factor on q.k before the softmax."""
        return self.attn_scale if self.attn_scale is not None else self.head_dim**-0.5

    def groups(self) -> list[GroupSpec]:
        """KV groups: layers with the same window share a page table; full attention comes first."""
        by_window: dict[int | None, list[int]] = {}
        for layer in range(self.n_layers):
            by_window.setdefault(self.window(layer), []).append(layer)
        order = sorted(by_window, key=lambda w: (w is not None, w or 0))
        return [GroupSpec(tuple(by_window[w]), self.n_kv_heads, self.head_dim, w) for w in order]

    def n_params(self) -> int:
        """Weights in the matrices and embeddings (norms and biases are left out: under 0.1 %)."""
        attn = self.hidden * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        mlp = 3 * self.hidden * self.ffn
        embeddings = self.vocab * self.hidden * (1 if self.tie_embeddings else 2)
        return self.n_layers * (attn + mlp) + embeddings
