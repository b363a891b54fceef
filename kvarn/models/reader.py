"""From named tensors to the layers of a decoder: read, fuse, convert, count."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import cast

import torch
from torch import Tensor

from kvarn.core.model import ModelSpec
from kvarn.kernels.collective import ALONE, Collective, Joined, Summed
from kvarn.kernels.linear import SHARES_MEMORY, Mode, make_linear
from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.quantize import joined, moved
from kvarn.kernels.linear.some_rows import SomeRows
from kvarn.kernels.linear.stored import Stored
from kvarn.models.shard import Divisible, ShardedWeights, holding, widths
from kvarn.models.weights import Weights


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


def tensors_of(held: object) -> Iterator[Tensor]:
    """Every tensor in layers, a matrix or whatever these hold, in the same order for equal kinds.

    Raises `ValueError` for a form that keeps its weights in something else.
    """
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, list):
        for one in held:
            yield from tensors_of(one)
    elif isinstance(held, Linear):
        found = [x for one in vars(held).values() for x in tensors_of(one)]
        if not found:
            raise ValueError(f"the weights of a matrix of form {held.mode!r} are no tensors")
        yield from found
    elif is_dataclass(held):
        for field in fields(held):
            yield from tensors_of(getattr(held, field.name))


class Reader:
    """Reads, fuses, converts and counts the tensors of a decoder."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        mode: Mode,
        group: Collective = ALONE,
    ) -> None:
        self.spec, self.dtype, self.device, self.group = spec, dtype, device, group
        self.mine = holding(spec, group.rank, group.ranks)
        self.weights = weights
        if group.ranks > 1:
            self.weights = ShardedWeights(cast(Divisible, weights), spec, self.mine)
        self.mode: Mode = mode
        self.n_bytes = 0
        self.forms: Counter[str] = Counter()  #: matrices by the form that multiplies by them

    def tensor(self, name: str, *shape: int) -> Tensor:
        """One tensor as it is, on the device, in the compute dtype."""
        return self._count(self._move(self.weights.read(name, shape)))

    def norm(self, name: str, size: int) -> Tensor:
        """The factor of an RMSNorm, with the family's offset added."""
        weight = self.weights.read(name, (size,)).float() + self.spec.norm_offset
        return self._count(self._move(weight))

    def linear(self, prefix: str, outs: dict[str, int], n_in: int, bias: bool) -> Linear:
        """The projections `outs` (name -> rows) of one input, fused into one matrix."""
        parts = [self._matrix(f"{prefix}.{name}.weight", (n, n_in)) for name, n in outs.items()]
        biases = [
            self._move(self.weights.read(f"{prefix}.{name}.bias", (n,)))
            for name, n in outs.items()
            if bias
        ]
        return self._linear(joined(parts), torch.cat(biases) if biases else None)

    def head(self, embed: Tensor) -> Linear:
        """The output projection; tied models multiply by the embedding."""
        rows = self.mine.vocab
        head = self._head(embed[rows.start : rows.stop])
        if self.group.ranks == 1:
            return head
        return Joined(head, self.group, widths(self.spec.vocab, self.group.ranks))

    def _head(self, embed: Tensor) -> Linear:
        tied, shape = self.spec.tie_embeddings, (self.spec.vocab, self.spec.hidden)
        # where no layer is quantised the output matrix is not: the embedding is not read again
        if not tied or set(self.forms) != {self.mode}:
            weight = self._matrix("embed_tokens.weight" if tied else "lm_head.weight", shape)
            if not tied or not isinstance(weight, Tensor):
                return self._linear(weight, None)
        shared = self.n_bytes
        head = self._linear(embed, None)
        if self.mode in SHARES_MEMORY:
            self.n_bytes = shared
        return head

    def some_rows(self, embed: Tensor, tokens: Tensor) -> SomeRows:
        """A tied output projection that gives the logits of `tokens` [n] alone."""
        tokens = tokens.to(self.device)
        return SomeRows(self._linear(embed[tokens], None), tokens, self.spec.vocab)

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
            out=self._summed(
                self.linear(f"{at}.self_attn", {"o_proj": spec.hidden}, n_q, spec.out_bias)
            ),
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
            down=self._summed(
                self.linear(f"{at}.mlp", {"down_proj": spec.hidden}, spec.ffn, spec.mlp_bias)
            ),
            mlp_post_norm=self._optional(
                gemma, f"{at}.post_feedforward_layernorm.weight", spec.hidden
            ),
        )

    def _summed(self, linear: Linear) -> Linear:
        """A matrix that every rank holds some inputs of."""
        return linear if self.group.ranks == 1 else Summed(linear, self.group)

    def _optional(self, present: bool, name: str, size: int) -> Tensor | None:
        return self.norm(name, size) if present else None

    def _matrix(self, name: str, shape: tuple[int, int]) -> Stored:
        """One matrix as the weights hold it, on the device."""
        weight = self.weights.stored(name, shape)
        return self._move(weight) if isinstance(weight, Tensor) else moved(weight, self.device)

    def _linear(self, weight: Stored, bias: Tensor | None) -> Linear:
        # parts that were held in different ways come joined in fp32
        weight = self._move(weight) if isinstance(weight, Tensor) else weight
        linear = make_linear(weight, bias, self.mode)
        self.n_bytes += linear.weight_bytes
        self.forms[linear.mode] += 1
        return linear

    def _move(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)

    def _count(self, x: Tensor) -> Tensor:
        self.n_bytes += x.numel() * x.element_size()
        return x
