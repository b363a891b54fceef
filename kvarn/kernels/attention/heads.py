"""Layers whose KV heads lie in several table groups: each group's heads attend by themselves.

What the heads of a group are to attend to is laid out once a step, as ever; a layer then hands each
plan its heads alone and puts the outputs together. Caches hold no more than their group's heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvarn.kernels.attention import AttentionPlan, Rotary


@dataclass(slots=True, frozen=True)
class Heads:
    """Some KV heads of a layer and what goes with them, as indices on the device."""

    kv: Tensor  #: [h]
    q: Tensor  #: [h * Hq / Hkv] query heads
    fused: Tensor  #: [h * (Hq / Hkv + 2)] heads of a fused row of q, k and v

    @classmethod
    def of(cls, heads: Sequence[int], n_heads: int, n_kv_heads: int, device: Any) -> "Heads":
        """The KV heads `heads` of a layer of that shape."""
        group = n_heads // n_kv_heads
        q = [head * group + i for head in heads for i in range(group)]
        keys = [n_heads + head for head in heads]
        fused = [*q, *keys, *(key + n_kv_heads for key in keys)]
        kinds = (torch.tensor(found, device=device) for found in (list(heads), q, fused))
        return cls(*kinds)


@dataclass(slots=True)
class HeadsPlan:
    """An `AttentionPlan`, and a `FusedPlan` where its parts are, of one layer. No log-sum-exp.

    Its cache is a tuple, one of each part.
    """

    parts: list[tuple[Heads, AttentionPlan]]

    def run(
        self, cache: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for mine, (heads, plan) in zip(cache, self.parts, strict=True):
            some = (q.index_select(1, heads.q), *(x.index_select(1, heads.kv) for x in (k, v)))
            o.index_copy_(1, heads.q, plan.run(mine, *some)[0])
        return o, None

    def fused(
        self, cache: tuple[Any, ...], qkv: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor | None]:
        """See `FusedPlan`."""
        rows, dim = len(qkv), rotary.head_dim
        o = torch.empty((rows, rotary.n_heads, dim), dtype=qkv.dtype, device=qkv.device)
        for mine, (heads, plan) in zip(cache, self.parts, strict=True):
            some = qkv.view(rows, -1, dim).index_select(1, heads.fused).view(rows, -1)
            turns = replace(rotary, n_heads=len(heads.q), n_kv_heads=len(heads.kv))
            found: Tensor = plan.fused(mine, some, turns)[0]  # type: ignore[attr-defined]
            o.index_copy_(1, heads.q, found)
        return o, None
