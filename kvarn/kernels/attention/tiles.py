"""From CSR rows to work items of equal shape: query tiles, split along the KV where that pays.

An item is one tile of query rows against one range of KV positions; the query heads of a KV head
are folded into the tile. A row that one item does not cover is in several, which leave partial
results in slots, one a row; `merges` lists the slots of each such row in the order of merging
(arXiv 2501.01005, 3.3). Splits, shared prefixes and any mixture of them are such lists.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.kernels.attention import Ints, PagedRows

Bools = NDArray[np.bool_]

#: columns of an item: first flattened row, number of rows, position of the first row, index of the
#: first page, position of that page's first slot, first KV position, end of the KV positions, slot
#: of the first row's partial result or -1 where the result is final
ROW, ROWS, START, PAGE_AT, BASE, LOW, HIGH, PART = range(8)
STEP = 64  #: splits end at multiples of this many positions from where they began
SLACK = 4  #: pieces may be longer than aimed at by one part of so many: merges cost too


@dataclass(slots=True, frozen=True)
class Cut:
    """How the tiles of one launch are cut."""

    height: int  #: rows of a tile at most
    programs: int  #: programs, one an item and KV head, that splitting aims at
    least: int  #: KV positions below which a range is not split further


@dataclass(slots=True)
class Work:
    """The items of some launches, and what is merged after them."""

    items: list[Ints]  #: a launch: [n, 8], most KV first
    merges: Ints  #: [m, 3] flattened row, its first entry, number of its entries
    entries: Ints  #: slots
    n_slots: int


def tiles(rows: PagedRows, spans: Ints, low: Ints, height: int) -> Ints:
    """Items [n, 8] of the given spans, at most `height` rows each, not yet split.

    `low` [S] is the first position that a span's own items see: above `base` where an item of a
    shared prefix sees those before. Such items are partial: their PART is 0, that of others -1.
    """
    first = rows.indptr[spans]
    length = rows.indptr[spans + 1] - first
    start, skip = rows.start[spans], np.int64(0)
    if len(spans) and length.max() > height:
        counts = -(-length // height)
        skip = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * height
        spans, first, length, start = (np.repeat(x, counts) for x in (spans, first, length, start))
        length = np.minimum(height, length - skip)
        start = start + skip
    items = np.empty((len(spans), 8), np.int64)
    items[:, ROW] = first + skip
    items[:, ROWS] = length
    items[:, START] = start
    items[:, PAGE_AT] = rows.page_indptr[spans]
    base = rows.base[spans]
    items[:, BASE] = base
    items[:, LOW] = low[spans]
    items[:, HIGH] = start + length
    items[:, PART] = -(items[:, LOW] == base).astype(np.int64)
    if rows.window is not None:  # from the start of a page on
        seen = np.maximum(start - rows.window + 1 - base, 0)
        items[:, LOW] = base + seen // rows.page_size * rows.page_size
    return items


def shared_tiles(rows: PagedRows, runs: Ints, height: int) -> Ints:
    """Items [n, 8] of runs of spans (first span, spans, positions shared); every row sees all."""
    if not len(runs):
        return np.empty((0, 8), np.int64)
    first = rows.indptr[runs[:, 0]]
    length = rows.indptr[runs[:, 0] + runs[:, 1]] - first
    counts = -(-length // height)
    skip = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * height
    items = np.zeros((len(skip), 8), np.int64)
    items[:, ROW] = np.repeat(first, counts) + skip
    items[:, ROWS] = np.minimum(height, np.repeat(length, counts) - skip)
    items[:, PAGE_AT] = np.repeat(rows.page_indptr[runs[:, 0]], counts)
    base = np.repeat(rows.base[runs[:, 0]], counts)
    items[:, BASE] = items[:, LOW] = base
    items[:, HIGH] = items[:, START] = base + np.repeat(runs[:, 2], counts)
    return items


def split_length(items: Ints, kv_heads: int, cut: Cut) -> int:
    """KV positions of an item that splitting aims at.

    The ranges are cut so that about `cut.programs` programs share them evenly. As a range of n
    positions gives fewer than n / length + 1 items, and the n add up to at most length * programs /
    kv_heads, there are fewer than len(items) + programs / kv_heads items after splitting. Fewer
    than programs / kv_heads ranges are longer than the length and so are split, into fewer than
    2 * programs / kv_heads items.
    """
    positions = int((items[:, HIGH] - items[:, LOW]).sum())
    even = -(-positions * kv_heads // cut.programs)
    return -(-max(even, cut.least) // STEP) * STEP


def split(items: Ints, length: int) -> Ints:
    """The items, in even pieces of about `length` positions in order; pieces are partial."""
    if not len(items):
        return items
    spans = items[:, HIGH] - items[:, LOW]
    slack = length // SLACK
    if spans.max() <= length + slack:
        return items
    pieces = np.maximum(-(-(spans - slack) // length), 1)
    even = -(-spans // (pieces * STEP)) * STEP
    return in_pieces(items, -(-spans // even), even)


def in_pieces(items: Ints, pieces: Ints, length: Ints) -> Ints:
    """The items, each in a number of pieces; all but the last have `length` [n] positions."""
    items[pieces > 1, PART] = 0
    ends = np.cumsum(pieces)
    nth = np.arange(ends[-1]) - np.repeat(ends - pieces, pieces)
    items = np.repeat(items, pieces, axis=0)
    length = np.repeat(length, pieces)
    items[:, LOW] += nth * length
    np.minimum(items[:, HIGH], items[:, LOW] + length, out=items[:, HIGH])
    return items


def joined(launches: Sequence[Ints], rows: PagedRows) -> Work:
    """Number the slots of the partial items, list the slots of every row, order the items.

    Slots are merged in the order of the launches given, and of their items.
    """
    window = None if rows.sinks else rows.window  # a row may see sinks alone of an item
    n_slots = 0
    rows_of: list[Ints] = []
    unseen: list[Bools] = []
    for items in launches:
        at = np.flatnonzero(items[:, PART] >= 0)
        if not len(at):
            continue
        partial = items[at]
        count = partial[:, ROWS]
        ends = np.cumsum(count)
        items[at, PART] = n_slots + ends - count
        row, left = partial[:, ROW], partial[:, HIGH] - partial[:, START]
        if ends[-1] > len(at):  # of several rows
            nth = np.arange(ends[-1]) - np.repeat(ends - count, count)
            row, left = np.repeat(row, count) + nth, np.repeat(left, count) - nth
        rows_of.append(row)
        if window is not None:
            unseen.append(left <= 1 - window)
        n_slots += int(ends[-1])
    merges, entries = _lists(rows_of, unseen)
    ordered = [items[np.argsort(items[:, LOW] - items[:, HIGH], kind="stable")]
               for items in launches]  # fmt: skip
    return Work(ordered, merges, entries, n_slots)


def _lists(rows_of: list[Ints], unseen: list[Bools]) -> tuple[Ints, Ints]:
    """`merges` and `entries` of slots whose flattened rows are given, but for unseen ones."""
    if not rows_of:
        return np.empty((0, 3), np.int64), np.empty(0, np.int64)
    row_of = np.concatenate(rows_of)
    entries = np.argsort(row_of, kind="stable")
    if unseen:
        entries = entries[~np.concatenate(unseen)[entries]]
    row_of = row_of[entries]
    first = np.flatnonzero(row_of[1:] != row_of[:-1]) + 1
    merges = np.zeros((len(first) + 1, 3), np.int64)
    merges[1:, 1] = first
    merges[:, 0] = row_of[merges[:, 1]]
    merges[:-1, 2] = first
    merges[-1, 2] = len(row_of)
    merges[:, 2] -= merges[:, 1]
    return merges, entries
