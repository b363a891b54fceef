"""How many pages each group's pool gets from a number of bytes."""

from collections.abc import Sequence
from math import ceil

from kvarn.core.model import GroupSpec


def window_pages(group: GroupSpec, page_size: int, budget: int, max_seqs: int) -> int:
    """Most pages that a window group can ever use: sinks and a window each, and one step's new
    positions."""
    assert group.window is not None
    each = group.sink_pages(page_size) + -(-group.window // page_size) + 2
    return max_seqs * each + -(-budget // page_size)


def pages_by_group(
    groups: Sequence[GroupSpec], full: int, page_size: int, budget: int, max_seqs: int
) -> list[int]:
    """Pages of every group when a full-attention group has `full`."""
    return [
        ceil(full * group.share)
        if group.window is None
        else min(full, window_pages(group, page_size, budget, max_seqs))
        for group in groups
    ]


def bytes_of(
    groups: Sequence[GroupSpec], pages: Sequence[int], page_size: int, dtype_bytes: float
) -> int:
    """Memory of the pools [bytes]."""
    return sum(
        int(count * (page_size + group.sketched) * group.bytes_per_token(dtype_bytes))
        for group, count in zip(groups, pages)
    )


def pages_for_bytes(
    groups: Sequence[GroupSpec],
    memory: float,
    page_size: int,
    dtype_bytes: float,
    budget: int,
    max_seqs: int,
    most: int,
) -> int:
    """Most pages (at most `most`) that a full-attention group can have within `memory` bytes."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        pages = pages_by_group(groups, middle, page_size, budget, max_seqs)
        if bytes_of(groups, pages, page_size, dtype_bytes) <= memory:
            low = middle
        else:
            high = middle - 1
    return low
