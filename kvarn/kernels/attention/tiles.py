"""From CSR rows to work items of equal shape: query tiles, split along the KV where that pays.

An item is one tile of query rows against one range of KV positions; the query heads of a KV head
are folded into the tile. Decode-like spans fit into one small tile, the others are cut into large
ones. Items that share a tile leave partial results, which `merges` name (arXiv 2501.01005, 3.3).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.kernels.attention import Ints, PagedRows

#: columns of an item
ROW, ROWS, START, PAGE_AT, BASE, LOW, HIGH, PART = range(8)
STEP = 256  #: splits end at multiples of this many positions from where they began


@dataclass(slots=True)
class Work:
    """Items of one launch.

    `items` [n, 8]: first flattened row, number of rows, position of the first row, index of the
    span's first page, position of that page's first slot, first KV position, end of the KV
    positions, number of the partial result or -1.
    `merges` [m, 4]: first flattened row, number of rows, first partial result, number of them.
    """

    items: NDArray[np.int64]
    merges: NDArray[np.int64]
    n_parts: int


def work(
    rows: PagedRows, spans: Ints, height: int, kv_heads: int, programs: int, least: int
) -> Work:
    """Tiles of at most `height` rows of the given spans, most KV first.

    Ranges of KV are cut so that about `programs` programs (one an item and KV head) are there to
    fill the device, but none below `least` positions.
    """
    lengths = rows.indptr[spans + 1] - rows.indptr[spans]
    counts = -(-lengths // height)
    span = np.repeat(spans, counts)
    skip = (np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)) * height
    n = np.minimum(height, np.repeat(lengths, counts) - skip)
    start = rows.start[span] + skip
    high = start + n
    base = rows.base[span]
    low = base
    if rows.window is not None:  # from the start of a page on
        seen = np.maximum(start - rows.window + 1 - base, 0)
        low = base + seen // rows.page_size * rows.page_size
    limit = split_length(high - low, kv_heads, programs, least)
    pieces = -(-(high - low) // limit)
    tile = np.repeat(np.arange(len(span)), pieces)
    nth = np.arange(len(tile)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    split = pieces > 1
    first_part = np.cumsum(np.where(split, pieces, 0)) - np.where(split, pieces, 0)
    items = np.empty((len(tile), 8), np.int64)
    items[:, ROW] = (rows.indptr[span] + skip)[tile]
    items[:, ROWS] = n[tile]
    items[:, START] = start[tile]
    items[:, PAGE_AT] = rows.page_indptr[span][tile]
    items[:, BASE] = base[tile]
    items[:, LOW] = low[tile] + nth * limit
    items[:, HIGH] = np.minimum(high[tile], items[:, LOW] + limit)
    items[:, PART] = np.where(split[tile], first_part[tile] + nth, -1)
    order = np.argsort(items[:, LOW] - items[:, HIGH], kind="stable")
    merges = np.stack(
        ((rows.indptr[span] + skip)[split], n[split], first_part[split], pieces[split]), 1
    )
    return Work(items[order], merges, int(pieces[split].sum()))


def split_length(lengths: Ints, kv_heads: int, programs: int, least: int) -> int:
    """KV positions of the longest item, a multiple of `STEP`; `lengths` are those of the tiles."""
    even = -(-int(lengths.sum()) * kv_heads // programs) if len(lengths) else 1
    return -(-max(even, least) // STEP) * STEP
