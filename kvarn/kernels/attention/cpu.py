"""Attention on the CPU with torch's own kernels, over any mixture of spans."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvarn.core.part import Part
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.reference import attend, visible


@dataclass(slots=True)
class Piece:
    """One span: its rows, the slots it sees and its mask."""

    lo: int
    hi: int
    slots: Tensor
    mask: Tensor


@dataclass(slots=True)
class CPUPlan:
    """The spans of one step, laid out."""

    rows: PagedRows
    lse: bool
    slots: Tensor
    pieces: list[Piece]

    def run(self, cache: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        flat = cache.flatten(0, 1)
        flat[self.slots] = torch.stack((k, v), 1)
        o = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32) if self.lse else None
        for piece in self.pieces:
            seen = flat.index_select(0, piece.slots)
            o_s, lse_s = attend(
                q[piece.lo : piece.hi],
                seen[:, 0],
                seen[:, 1],
                piece.mask,
                self.rows.scale,
                self.rows.softcap,
            )
            o[piece.lo : piece.hi] = o_s
            if lse is not None:
                lse[piece.lo : piece.hi] = lse_s
        return o, lse


class CPUAttention(Part):
    """torch's kernels over gathered pages; cache [pages, page, 2, Hkv, d], one tensor a layer."""

    name: ClassVar[str] = "cpu"
    kind: ClassVar[str] = "attention"
    regime: ClassVar[str] = "any CPU, any batch; the native part is faster where a compiler exists"

    def allocate(
        self,
        n_layers: int,
        n_pages: int,
        page_size: int,
        n_kv_heads: int,
        head_dim: int,
        kind: torch.dtype,
        where: torch.device,
    ) -> list[Tensor]:
        """See `AttentionBackend`."""
        shape = (n_pages, page_size, 2, n_kv_heads, head_dim)
        return [torch.zeros(shape, dtype=kind, device=where) for _ in range(n_layers)]

    def plan(self, rows: PagedRows, lse: bool = False) -> CPUPlan:
        """See `AttentionBackend`."""
        pieces = []
        for s in range(len(rows.start)):
            lo, hi = int(rows.indptr[s]), int(rows.indptr[s + 1])
            if lo == hi:
                continue
            slots, positions = visible(rows, s)
            at = torch.arange(int(rows.start[s]), int(rows.start[s]) + hi - lo).unsqueeze(1)
            mask = positions <= at
            if rows.window is not None:
                mask &= positions > at - rows.window
            pieces.append(Piece(lo, hi, slots, mask))
        return CPUPlan(rows, lse, torch.from_numpy(rows.slots), pieces)

    def copy(self, cache: Tensor, sources: list[int], targets: list[int]) -> None:
        """See `AttentionBackend`."""
        cache[targets] = cache[sources]
