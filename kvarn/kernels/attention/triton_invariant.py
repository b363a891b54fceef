"""Batch-invariant attention on the GPU: a row's bits depend on its position and its KV alone.

Every row is computed in tiles of one shape, whatever the length of its span; the KV is folded in
steps that start at multiples of the tiling's `block_n` and is cut at multiples of `CUT` positions
from 0, whatever else is in the batch; partial results are merged in order of position. A row of the
tile does not feel the other rows, and ranges that a row does not see leave its state as it is.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from kvarn.core.part import Cap
from kvarn.kernels.attention import Ints, PagedRows
from kvarn.kernels.attention.layout import Heads, Layout
from kvarn.kernels.attention.tiles import BASE, HIGH, LOW, PART, ROW, ROWS, START, joined, tiles
from kvarn.kernels.attention.tilings import Tiling, power_of_two
from kvarn.kernels.attention.triton import TritonAttention
from kvarn.kernels.attention.triton_plan import TritonPlan

CUT = 4096  #: KV positions; a multiple of every `block_n`
MOST_SLOTS = 8192  #: partial results of rows that are held at once


class InvariantTritonPlan(TritonPlan):
    """One tiling, fixed cuts, as many rounds of launches as the partial results need."""

    def rounds(self, heads: Heads) -> Iterator[Layout]:
        """See `TritonPlan`."""
        tiling = tiling_of(heads)
        items = cut_at(self.rows, tiling, heads.group)
        ends = np.cumsum(np.where(items[:, PART] >= 0, items[:, ROWS], 0))
        first = np.diff(items[:, ROW], prepend=-1) != 0  # of a tile, which is not torn apart
        number = np.maximum.accumulate(np.where(first, ends // MOST_SLOTS, 0))
        for mine in np.split(items, np.flatnonzero(np.diff(number)) + 1):
            yield Layout([tiling], joined([mine], self.rows))


def tiling_of(heads: Heads) -> Tiling:
    """One shape for decodes and chunks: higher tiles read less KV again, lower ones waste less."""
    least = power_of_two(heads.group)
    if heads.wide == 4:
        return Tiling(max(32, least), 32, 4, 2)
    return Tiling(max(64, least), 32 if heads.dim > 128 else 64, 4, 2 if heads.dim > 128 else 3)


def cut_at(rows: PagedRows, tiling: Tiling, group: int) -> Ints:
    """Items [n, 8] of all spans, tile by tile, in the pieces that absolute positions give."""
    items = tiles(rows, np.flatnonzero(np.diff(rows.indptr)), rows.base, tiling.block_m // group)
    low = items[:, BASE].copy()
    if rows.window is not None:
        low = np.maximum(low, items[:, START] - rows.window + 1)
    low = low // tiling.block_n * tiling.block_n  # maybe below the first page, which is masked
    first, last = low // CUT, (items[:, HIGH] - 1) // CUT
    counts = last - first + 1
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    items[:, PART] = np.where(counts > 1, 0, -1)
    pieces = np.repeat(items, counts, axis=0)
    begin = (np.repeat(first, counts) + nth) * CUT
    pieces[:, LOW] = np.maximum(np.repeat(low, counts), begin)
    pieces[:, HIGH] = np.minimum(pieces[:, HIGH], begin + CUT)
    return pieces


class TritonInvariant(TritonAttention):
    """Tiles of one shape and cuts at fixed positions; cache as in `TritonAttention`."""

    name: ClassVar[str] = "triton-invariant"
    paper: ClassVar[str] = ""
    regime: ClassVar[str] = "when the same tokens in any batch matter more than speed, on a GPU"
    gives: ClassVar[frozenset[Cap]] = frozenset({Cap.BATCH_INVARIANT})

    def plan(self, rows: PagedRows, lse: bool = False) -> InvariantTritonPlan:
        """See `AttentionBackend`."""
        return InvariantTritonPlan(rows, lse, self.multiprocessors)
