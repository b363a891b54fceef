"""Which sequences of a step start with the same pages, so that these are read once for all."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def neighbours(table: NDArray[np.int32], rows: Ints) -> Ints:
    """An order of `rows` in which those with the same first page stand together; stable."""
    first = table[rows, 0]
    order = np.argsort(first, kind="stable")
    sorted_ = first[order]
    if len(rows) < 2 or not (sorted_[1:] == sorted_[:-1]).any():
        return np.arange(len(rows))
    return order


def runs(table: NDArray[np.int32], rows: Ints, start: Ints, page_size: int) -> Ints | None:
    """Runs of adjacent `rows` with common leading pages, as in `PagedRows.shared`; None: none.

    A row at position `start` shares whole pages before the one it writes to. One run for each
    first page: the longest prefix that all of its rows have in common.
    """
    if len(rows) < 2:
        return None
    first = table[rows, 0]
    cuts = np.flatnonzero(first[1:] != first[:-1]) + 1
    edges = np.concatenate(([0], cuts, [len(rows)]))
    found = []
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist()):
        if end - begin < 2:
            continue
        pages = int(start[begin:end].min()) // page_size
        mine = table[rows[begin:end], :pages]
        differs = (mine != mine[0]).any(0)
        common = int(differs.argmax()) if differs.any() else pages
        if common:
            found.append((begin, end - begin, common * page_size))
    return np.array(found, np.int64) if found else None
