"""The shapes of the Triton attention kernels, by head dim, size of a number and GQA group."""

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Tiling:
    """The shape of a kernel: rows of a query tile, KV positions a step, warps, stages in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def decode_tiling(dim: int, wide: int, rows: int) -> Tiling:
    """For spans that fit into one small tile of query heads times rows, of which the longest has
    `rows`; `wide` is the size of a number. [bytes]"""
    block_m = max(16, power_of_two(rows))
    if wide == 4:
        return Tiling(block_m, 32, 4, 2)
    if dim > 128:
        return Tiling(block_m, 32, 4, 3)
    return Tiling(block_m, 64, 2 if block_m == 16 else 4, 4)


def chunk_tiling(dim: int, wide: int, group: int) -> Tiling:
    """For spans of many rows."""
    least = power_of_two(group)
    if wide == 4:
        return Tiling(max(32, least), 32, 4, 2)
    if dim > 128:
        return Tiling(max(64, least), 32, 4, 2)
    return Tiling(max(128, least), 64, 4, 5 if dim <= 64 else 3)


def shared_tiling(dim: int, wide: int, group: int) -> Tiling:
    """For prefixes that many spans share: their rows, of one position each, in one tile."""
    least = power_of_two(group)
    if wide == 4:
        return Tiling(max(32, least), 32, 4, 2)
    if dim > 128:
        return Tiling(max(64, least), 32, 4, 2)
    return Tiling(max(128, least), 64, 8, 3)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()
