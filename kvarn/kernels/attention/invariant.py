"""Batch-invariant attention: a row's result depends on its position and its KV alone, to the bit.

Every (row, tile of KV) is one multiplication of a fixed shape; tiles start at multiples of `TILE`
positions from 0, whatever the chunk, and are folded into the row's state in order of position.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvarn.core.part import Cap
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.reference import Reference, visible

TILE = 64  #: positions of KV folded at a time


@dataclass(slots=True)
class InvariantPlan:
    """Slots of every row's tiles."""

    rows: PagedRows
    lse: bool

    def run(
        self, cache: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        rows = self.rows
        keys, values = (part.flatten(0, 1) for part in cache)
        slots = torch.from_numpy(rows.slots)
        keys[slots] = k
        values[slots] = v
        o = torch.zeros_like(q)
        lse = torch.zeros(q.shape[:2])
        for s in range(len(rows.start)):
            lo, hi = int(rows.indptr[s]), int(rows.indptr[s + 1])
            if lo == hi:
                continue
            where, positions = visible(rows, s)
            for r in range(lo, hi):
                at = int(rows.start[s]) + r - lo
                o[r], lse[r] = self._row(q[r], keys, values, where, positions, at)
        return o, lse if self.lse else None

    def _row(
        self, q: Tensor, keys: Tensor, values: Tensor, where: Tensor, positions: Tensor, at: int
    ) -> tuple[Tensor, Tensor]:
        """One row at position `at`: q [Hq, d] -> o [Hq, d], lse [Hq]."""
        rows = self.rows
        heads, dim = keys.shape[1:]
        base = int(positions[0])
        folded = q.float().view(heads, -1, dim)
        low = 0 if rows.window is None else max(0, at - rows.window + 1)
        ranges = [(first, low, at + 1) for first in range(low // TILE * TILE, at + 1, TILE)]
        sinks = min(rows.sinks, low)
        ranges += [(first, 0, sinks) for first in range(0, sinks, TILE)]
        peak = torch.full(folded.shape[:2], -torch.inf)
        total = torch.zeros(folded.shape[:2])
        o = torch.zeros(folded.shape)
        for first, begin, end in ranges:
            lo, hi = max(first, begin), min(first + TILE, end)
            tile = torch.zeros(2, heads, TILE, dim)
            picked = where[lo - base : hi - base]
            tile[0, :, lo - first : hi - first] = keys[picked].transpose(0, 1)
            tile[1, :, lo - first : hi - first] = values[picked].transpose(0, 1)
            scores = torch.bmm(folded, tile[0].transpose(1, 2)) * rows.scale
            if rows.softcap is not None:
                scores = rows.softcap * torch.tanh(scores / rows.softcap)
            scores[..., : lo - first] = -torch.inf
            scores[..., hi - first :] = -torch.inf
            top = torch.maximum(peak, scores.amax(-1))
            weights = (scores - top.unsqueeze(-1)).exp()
            shrink = (peak - top).exp()
            total = total * shrink + weights.sum(-1)
            o = o * shrink.unsqueeze(-1) + torch.bmm(weights, tile[1])
            peak = top
        return (o / total.unsqueeze(-1)).view_as(q), (peak + total.log()).view(-1)


class Invariant(Reference):
    """Fixed-shape tiles; cache as in `Reference`."""

    name: ClassVar[str] = "invariant"
    regime: ClassVar[str] = "when the same tokens in any batch matter more than speed"
    gives: ClassVar[frozenset[Cap]] = frozenset({Cap.BATCH_INVARIANT})

    def plan(self, rows: PagedRows, lse: bool = False) -> InvariantPlan:  # type: ignore[override]
        """See `AttentionBackend`."""
        return InvariantPlan(rows, lse)
