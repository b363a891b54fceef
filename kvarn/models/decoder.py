"""The dense decoder: Llama, SmolLM2, Mistral, Qwen 2 and 3, Gemma 2 and 3 in one file.

A step's rows come flattened, [T], whatever sequences they belong to; which rows see which is the
business of `attend`. Families differ only by what `ModelSpec` says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from kvarn.core.model import ModelSpec
from kvarn.kernels import rope
from kvarn.kernels.attention import Rotary
from kvarn.kernels.attention.paged import PagedAttend
from kvarn.kernels.collective import ALONE, Collective
from kvarn.kernels.linear import Mode
from kvarn.kernels.linear.base import Linear
from kvarn.kernels.norm import add_rms_norm, rms_norm
from kvarn.models.native_forward import NativeForward, obstacle
from kvarn.models.points import WHOLE_MODEL, Tap
from kvarn.models.reader import Layer, Reader, tensors_of
from kvarn.models.shard import local_spec
from kvarn.models.weights import Weights

#: attend(layer, q [T, Hq, d], k [T, Hkv, d], v [T, Hkv, d]) -> z [T, Hq, d]; also keeps k and v
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(slots=True)
class Stage:
    """Consecutive layers of a step, through which the same rows go."""

    end: int  #: the layer after its last
    attend: Attend
    rows: Tensor | None = None  #: [T'] rows of the stage before that go on; None: all


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
        group: Collective = ALONE,
        share: "Decoder | None" = None,
        drafts: Tensor | None = None,
    ) -> None:
        """Read every tensor from `weights`; `max_len` bounds the positions [tokens].

        The embedding and the output matrix are those of `share` where it is given, not copies; of
        the output matrix only the rows of the tokens `drafts` [n], a copy, where these are given.

        In a group of ranks, this rank's part of them: `self.spec` is then the shape of that part.
        """
        self.group = group
        self.dtype = dtype
        self.device = torch.device(device)
        reader = Reader(spec, weights, dtype, self.device, mode, group)
        self.spec = local_spec(spec, reader.mine)
        if share is None:
            self.embed = reader.tensor("embed_tokens.weight", spec.vocab, spec.hidden)
        else:
            self.embed = share.embed
        # in the embedding's own dtype, as the families that scale were trained
        self.embed_scale = torch.tensor(spec.embed_scale, dtype=dtype).item()
        self.layers = [reader.layer(i) for i in range(spec.n_layers)]
        self.norm = reader.norm("norm.weight", spec.hidden)
        self.head: Linear = reader.head(self.embed) if share is None else share.head
        if drafts is not None:
            self.head = reader.some_rows(self.embed, drafts)
        self.ropes = self._ropes(max_len or spec.max_len)
        self.weight_bytes = reader.n_bytes
        self.forms = reader.forms  #: matrices by the form that multiplies by them
        #: why the layers do not run in one compiled call; None where they do
        self.obstacle = obstacle(self.spec, self.layers, self.norm)
        self.native: NativeForward | None = None
        if self.obstacle is None:
            tables = [self.ropes[self._is_local(i)] for i in range(spec.n_layers)]
            self.native = NativeForward(self.spec, self.layers, self.norm, tables)

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

    @torch.inference_mode()
    def become(self, other: "Decoder") -> None:
        """Take over the layers of another of the same shape and forms, in place: what is captured
        reads them where they are. Embedding and output matrix stay.

        Raises `ValueError`, with nothing changed, where the two are not alike.
        """
        mine, theirs = ([*tensors_of([one.layers, one.norm])] for one in (self, other))
        if [(x.shape, x.dtype) for x in mine] != [(x.shape, x.dtype) for x in theirs]:
            raise ValueError(f"{other.spec.name} is not of the shape of {self.spec.name}")
        for x, new in zip(mine, theirs):
            x.copy_(new)

    def rotary(self, layer: int) -> rope.Rope:
        """The rotary table that a layer turns by."""
        return self.ropes[self._is_local(layer)]

    def _is_local(self, layer: int) -> bool:
        """Which rotary table the layer turns by."""
        return True in self.ropes and self.spec.window(layer) is not None

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, tap: Tap | None = None
    ) -> Tensor:
        """Hidden states [T, hidden] after the final norm; tokens, positions [T] int64."""
        return self.through([Stage(self.spec.n_layers, attend)], tokens, positions, tap)

    def through(
        self, stages: Sequence[Stage], tokens: Tensor, positions: Tensor, tap: Tap | None = None
    ) -> Tensor:
        """The same with rows that leave after the layers of some stage.

        Hidden states of the last stage's rows: nobody's final ones, if that ends too early.
        """
        spec = self.spec
        x = embedding(tokens, self.embed)
        if spec.embed_scale != 1.0:
            x = x * self.embed_scale
        if tap is not None:
            x = tap("embed", WHOLE_MODEL, x)
        delta: Tensor | None = None
        first = 0
        for stage in stages:
            attend, end = stage.attend, stage.end
            if stage.rows is not None:
                x, positions = x[stage.rows], positions[stage.rows]
                delta = None if delta is None else delta[stage.rows]
            paged = attend if tap is None and isinstance(attend, PagedAttend) else None
            if paged and self.native is not None and self.native.takes(paged, first, end):
                x = x if delta is None else x + delta
                hidden, delta = self.native.run(x, positions, paged, first, end), None
                if end == spec.n_layers:
                    return hidden
            else:
                delta, x = self._layers(first, end, delta, x, positions, attend, tap)
            first = end
        x, _ = _norm_of_sum(delta, x, self.norm, spec.norm_eps, tap, "", spec.n_layers)
        return x if tap is None else tap("final_norm", WHOLE_MODEL, x)

    def _layers(
        self,
        first: int,
        end: int,
        delta: Tensor | None,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        tap: Tap | None,
    ) -> tuple[Tensor | None, Tensor]:
        """Layers `first` to `end`: what the last adds to the residual stream, and the stream."""
        eps = self.spec.norm_eps
        fused = None
        if tap is None and isinstance(attend, PagedAttend) and attend.takes_projection:
            fused = attend
        angles = {} if fused else {key: table.at(positions) for key, table in self.ropes.items()}
        for i in range(first, end):
            layer = self.layers[i]
            h, x = _norm_of_sum(delta, x, layer.attn_norm, eps, tap, "resid_pre", i)
            if fused is not None:
                delta = self._fused_attention(i, layer, h, positions, fused)
            else:
                delta = self._attention(i, layer, h, angles[self._is_local(i)], attend, tap)
            h, x = _norm_of_sum(delta, x, layer.mlp_norm, eps, tap, "resid_mid", i)
            delta = self._mlp(i, layer, h, tap)
        return delta, x

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

    def _fused_attention(
        self, i: int, layer: Layer, h: Tensor, positions: Tensor, attend: PagedAttend
    ) -> Tensor:
        """`_attention` without points: the projection goes to the attention backend as it is."""
        spec = self.spec
        turns = self.ropes[self._is_local(i)]
        rotary = Rotary(
            positions, turns.cos, turns.sin, spec.n_heads, spec.n_kv_heads, spec.head_dim,
            layer.q_norm, layer.k_norm, spec.norm_eps,
        )  # fmt: skip
        z = attend.fused(i, layer.qkv(h), rotary)
        out = layer.out(z.view(-1, spec.n_heads * spec.head_dim))
        if layer.attn_post_norm is not None:
            out = rms_norm(out, layer.attn_post_norm, spec.norm_eps)
        return out

    def _mlp(self, i: int, layer: Layer, h: Tensor, tap: Tap | None) -> Tensor:
        if tap is not None:
            h = tap("mlp_norm", i, h)
        act = layer.gate_up.gated(h, self.spec.activation)
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
