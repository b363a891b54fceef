"""Attention span by span in fp32 with dense masks: the oracle that backends are compared with."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvarn.core.part import Cap, Part
from kvarn.kernels.attention import Ints, PagedRows


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Dense attention in fp32: q [T, Hq, d], k and v [L, Hkv, d], mask [T, L] (True: visible).

    Returns o [T, Hq, d] and lse [T, Hq]; a row that sees nothing has o = 0 and lse = -inf.
    """
    group = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(group, 1)
    values = v.float().repeat_interleave(group, 1)
    scores = torch.einsum("thd,lhd->htl", q.float(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return torch.einsum("htl,lhd->thd", weights, values), lse.T.contiguous()


@dataclass(slots=True)
class ReferencePlan:
    """Slots and mask of every span; `run` walks over the spans."""

    rows: PagedRows
    lse: bool
    masks: list[Tensor] | None = None  #: [rows, visible slots] a span, in place of causal ones

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
            mask = self._mask(s, positions)
            o_s, lse_s = attend(
                q[lo:hi], keys[where], values[where], mask, rows.scale, rows.softcap
            )
            o[lo:hi], lse[lo:hi] = o_s.to(q.dtype), lse_s
        return o, lse if self.lse else None

    def _mask(self, s: int, positions: Tensor) -> Tensor:
        if self.masks is not None:
            return self.masks[s]
        rows = self.rows
        start = int(rows.start[s])
        at = torch.arange(start, start + int(rows.indptr[s + 1] - rows.indptr[s])).unsqueeze(1)
        mask = positions <= at
        return mask if rows.window is None else mask & inside(rows, positions, at)


def inside(rows: PagedRows, positions: Tensor, at: Tensor) -> Tensor:
    """Which `positions` [L] the window and the sinks leave to rows `at` [T, 1]: [T, L]."""
    assert rows.window is not None
    return (positions > at - rows.window) | (positions < rows.sinks)


def visible(rows: PagedRows, s: int) -> tuple[Tensor, Tensor]:
    """Slots and positions [L] from the base of span `s` up to its last row."""
    pages = torch.from_numpy(rows.pages[rows.page_indptr[s] : rows.page_indptr[s + 1]])
    base = int(rows.base[s])
    end = int(rows.start[s] + rows.indptr[s + 1] - rows.indptr[s])
    offsets = torch.arange(end - base)
    slots = pages[offsets // rows.page_size] * rows.page_size + offsets % rows.page_size
    return slots, offsets + base


class Reference(Part):
    """Dense fp32 attention, span by span; cache (keys, values), each [pages, page, Hkv, d]."""

    name: ClassVar[str] = "reference"
    kind: ClassVar[str] = "attention"
    regime: ClassVar[str] = "the oracle of the tests; slow everywhere"
    needs: ClassVar[frozenset[Cap]] = frozenset({Cap.CPU_DEVICE})

    def allocate(
        self,
        n_layers: int,
        n_pages: int,
        page_size: int,
        n_kv_heads: int,
        head_dim: int,
        kind: torch.dtype,
        where: torch.device,
    ) -> list[tuple[Tensor, Tensor]]:
        """See `AttentionBackend`."""

        def zeros() -> Tensor:
            return torch.zeros(n_pages, page_size, n_kv_heads, head_dim, dtype=kind, device=where)

        return [(zeros(), zeros()) for _ in range(n_layers)]

    def plan(
        self, rows: PagedRows, lse: bool = False, masks: list[Tensor] | None = None
    ) -> ReferencePlan:
        """See `AttentionBackend`; `masks` [rows, slots from base] replace causality, window."""
        return ReferencePlan(rows, lse, masks)

    def copy(self, cache: tuple[Tensor, Tensor], sources: list[int], targets: list[int]) -> None:
        """See `AttentionBackend`."""
        for part in cache:
            part[targets] = part[sources]

    def move(self, cache: tuple[Tensor, Tensor], sources: Ints, targets: Ints) -> None:
        """See `AttentionBackend`."""
        for part in cache:
            flat = part.flatten(0, 1)
            flat[targets] = flat[sources]

    def keys(self, cache: tuple[Tensor, Tensor], slots: Tensor) -> Tensor:
        """See `AttentionBackend`."""
        return cache[0].flatten(0, 1)[slots]

    def read(self, cache: tuple[Tensor, Tensor], slots: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend`."""
        heads = torch.arange(cache[0].shape[2])
        k, v = (part.flatten(0, 1)[slots, heads] for part in cache)
        return k, v

    def write(self, cache: tuple[Tensor, Tensor], slots: Tensor, k: Tensor, v: Tensor) -> None:
        """See `AttentionBackend`."""
        for part, new in zip(cache, (k, v), strict=True):
            part.flatten(0, 1)[slots] = new.to(part.dtype)
