"""The dense decoder: Llama, SmolLM2, Mistral, Qwen 2 and 3, Gemma 2 and 3 in one file.

A step's rows come flattened, [T], whatever sequences they belong to; which rows see which is the
business of `attend`. Families differ only by what `ModelSpec` says.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from kvarn.core.model import ModelSpec
from kvarn.kernels import rope
from kvarn.kernels.activation import gated
from kvarn.kernels.linear import Linear, Mode, make_linear
from kvarn.kernels.norm import add_rms_norm, rms_norm
from kvarn.models.points import WHOLE_MODEL, Tap
from kvarn.models.weights import Weights

#: attend(layer, q [T, Hq, d], k [T, Hkv, d], v [T, Hkv, d]) -> z [T, Hq, d]; also keeps k and v
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

#: forms of the linear layers that keep the weight as it is: a tied output matrix is no copy
SHARES_MEMORY: tuple[Mode, ...] = ("plain", "invariant")


@dataclass(slots=True)
class Layer:
    """The weights of one layer; norms that a family lacks are None."""

    attn_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    attn_post_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    mlp_post_norm: Tensor | None


class Decoder:
    """A dense transformer: `forward` to the final norm, `logits` for the rows that want them."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mode: Mode = "plain",
        max_len: int | None = None,
    ) -> None:
        """Read every tensor from `weights`; `max_len` bounds the positions [tokens]."""
        self.spec = spec
        self.dtype = dtype
        self.device = torch.device(device)
        reader = _Reader(spec, weights, dtype, self.device, mode)
        self.embed = reader.tensor("embed_tokens.weight", spec.vocab, spec.hidden)
        # in the embedding's own dtype, as the families that scale were trained
        self.embed_scale = torch.tensor(spec.embed_scale, dtype=dtype).item()
        self.layers = [reader.layer(i) for i in range(spec.n_layers)]
        self.norm = reader.norm("norm.weight", spec.hidden)
        self.head = reader.head(self.embed)
        self.ropes = self._ropes(max_len or spec.max_len)
        self.weight_bytes = reader.n_bytes

    def _ropes(self, max_len: int) -> dict[bool, rope.Rope]:
        """Rotary tables by "is a sliding-window layer": one, or two where the theta differs."""
        spec = self.spec
        full = rope.Rope(
            spec.head_dim, spec.rope_theta, spec.rope_scaling, max_len, self.dtype, self.device
        )
        if spec.rope_local_theta is None:
            return {False: full}
        local = rope.Rope(
            spec.head_dim, spec.rope_local_theta, None, max_len, self.dtype, self.device
        )
        return {False: full, True: local}

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, tap: Tap | None = None
    ) -> Tensor:
        """Hidden states [T, hidden] after the final norm; tokens, positions [T] int64."""
        spec, eps = self.spec, self.spec.norm_eps
        x = embedding(tokens, self.embed)
        if spec.embed_scale != 1.0:
            x = x * self.embed_scale
        if tap is not None:
            x = tap("embed", WHOLE_MODEL, x)
        full = self.ropes[False].at(positions)
        local = self.ropes[True].at(positions) if True in self.ropes else full
        delta: Tensor | None = None
        for i, layer in enumerate(self.layers):
            angles = full if spec.window(i) is None else local
            h, x = _norm_of_sum(delta, x, layer.attn_norm, eps, tap, "resid_pre", i)
            delta = self._attention(i, layer, h, angles, attend, tap)
            h, x = _norm_of_sum(delta, x, layer.mlp_norm, eps, tap, "resid_mid", i)
            delta = self._mlp(i, layer, h, tap)
        x, _ = _norm_of_sum(delta, x, self.norm, eps, tap, "", spec.n_layers)
        return x if tap is None else tap("final_norm", WHOLE_MODEL, x)

    def _attention(
        self, i: int, layer: Layer, h: Tensor, angles: rope.Angles, attend: Attend, tap: Tap | None
    ) -> Tensor:
        spec = self.spec
        if tap is not None:
            h = tap("attn_norm", i, h)
        heads = layer.qkv(h).view(-1, spec.n_heads + 2 * spec.n_kv_heads, spec.head_dim)
        q, k, v = heads.split_with_sizes((spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), 1)
        if tap is not None:
            q, k, v = tap("q", i, q), tap("k", i, k), tap("v", i, v)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, spec.norm_eps)
            k = rms_norm(k, layer.k_norm, spec.norm_eps)
        q, k = rope.apply(q, k, angles)
        if tap is not None:
            q, k = tap("q_rot", i, q), tap("k_rot", i, k)
        z = attend(i, q, k, v)
        if tap is not None:
            z = tap("z", i, z)
        out = layer.out(z.reshape(-1, spec.n_heads * spec.head_dim))
        if layer.attn_post_norm is not None:
            out = rms_norm(out, layer.attn_post_norm, spec.norm_eps)
        return out if tap is None else tap("attn_out", i, out)

    def _mlp(self, i: int, layer: Layer, h: Tensor, tap: Tap | None) -> Tensor:
        if tap is not None:
            h = tap("mlp_norm", i, h)
        act = gated(layer.gate_up(h), self.spec.activation)
        if tap is not None:
            act = tap("mlp_act", i, act)
        out = layer.down(act)
        if layer.mlp_post_norm is not None:
            out = rms_norm(out, layer.mlp_post_norm, self.spec.norm_eps)
        return out if tap is None else tap("mlp_out", i, out)

    def logits(self, hidden: Tensor, tap: Tap | None = None) -> Tensor:
        """Logits [R, vocab] in fp32 of hidden states [R, hidden] from `forward`, capped."""
        x = self.head.wide(hidden)
        cap = self.spec.logit_softcap
        if cap is not None:
            x = torch.tanh(x / cap) * cap
        return x if tap is None else tap("logits", WHOLE_MODEL, x)


def _norm_of_sum(
    delta: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    tap: Tap | None,
    point: str,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """Add `delta` to the residual stream x and normalise: (normed, new x).

    Without a tap the two are one operation. With one, the sum is a point of its own: `point` of
    this layer and, where a layer begins, "resid_post" of the layer before.
    """
    if tap is None:
        if delta is None:
            return rms_norm(x, weight, eps), x
        return add_rms_norm(delta, x, weight, eps)
    if delta is not None:
        x = delta + x
        if point != "resid_mid":
            x = tap("resid_post", layer - 1, x)
    if point:
        x = tap(point, layer, x)
    return rms_norm(x, weight, eps), x


class _Reader:
    """Reads, fuses, converts and counts the tensors of a decoder."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        mode: Mode,
    ) -> None:
        self.spec, self.weights, self.dtype, self.device = spec, weights, dtype, device
        self.mode: Mode = mode
        self.n_bytes = 0

    def tensor(self, name: str, *shape: int) -> Tensor:
        """One tensor as it is, on the device, in the compute dtype."""
        return self._count(self._move(self.weights.read(name, shape)))

    def norm(self, name: str, size: int) -> Tensor:
        """The factor of an RMSNorm, with the family's offset added."""
        weight = self.weights.read(name, (size,)).float() + self.spec.norm_offset
        return self._count(self._move(weight))

    def linear(self, prefix: str, outs: dict[str, int], n_in: int, bias: bool) -> Linear:
        """The projections `outs` (name -> rows) of one input, fused into one matrix."""
        parts = [
            self._move(self.weights.read(f"{prefix}.{name}.weight", (n, n_in)))
            for name, n in outs.items()
        ]
        biases = [
            self._move(self.weights.read(f"{prefix}.{name}.bias", (n,)))
            for name, n in outs.items()
            if bias
        ]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self._linear(weight, torch.cat(biases) if biases else None)

    def head(self, embed: Tensor) -> Linear:
        """The output projection; tied models multiply by the embedding."""
        if not self.spec.tie_embeddings:
            weight = self.weights.read("lm_head.weight", (self.spec.vocab, self.spec.hidden))
            return self._linear(self._move(weight), None)
        head = make_linear(embed, None, self.mode)
        self.n_bytes += 0 if self.mode in SHARES_MEMORY else head.weight_bytes
        return head

    def layer(self, i: int) -> Layer:
        """Every weight of layer `i`."""
        spec, at = self.spec, f"layers.{i}"
        n_q, n_kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        gemma = spec.sandwich_norms
        return Layer(
            attn_norm=self.norm(f"{at}.input_layernorm.weight", spec.hidden),
            qkv=self.linear(
                f"{at}.self_attn",
                {"q_proj": n_q, "k_proj": n_kv, "v_proj": n_kv},
                spec.hidden,
                spec.qkv_bias,
            ),
            q_norm=self._optional(spec.qk_norm, f"{at}.self_attn.q_norm.weight", spec.head_dim),
            k_norm=self._optional(spec.qk_norm, f"{at}.self_attn.k_norm.weight", spec.head_dim),
            out=self.linear(f"{at}.self_attn", {"o_proj": spec.hidden}, n_q, spec.out_bias),
            attn_post_norm=self._optional(
                gemma, f"{at}.post_attention_layernorm.weight", spec.hidden
            ),
            # elsewhere the norm before the MLP is called "post_attention"
            mlp_norm=self.norm(
                f"{at}.{'pre_feedforward' if gemma else 'post_attention'}_layernorm.weight",
                spec.hidden,
            ),
            gate_up=self.linear(
                f"{at}.mlp",
                {"gate_proj": spec.ffn, "up_proj": spec.ffn},
                spec.hidden,
                spec.mlp_bias,
            ),
            down=self.linear(f"{at}.mlp", {"down_proj": spec.hidden}, spec.ffn, spec.mlp_bias),
            mlp_post_norm=self._optional(
                gemma, f"{at}.post_feedforward_layernorm.weight", spec.hidden
            ),
        )

    def _optional(self, present: bool, name: str, size: int) -> Tensor | None:
        return self.norm(name, size) if present else None

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        linear = make_linear(weight, bias, self.mode)
        self.n_bytes += linear.weight_bytes
        return linear

    def _move(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)

    def _count(self, x: Tensor) -> Tensor:
        self.n_bytes += x.numel() * x.element_size()
        return x
