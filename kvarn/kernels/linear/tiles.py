"""Which tile multiplies how many rows by which matrix on a GPU: a pure function of the shapes."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

from kvarn.kernels.linear.tuned import H100

MOST_ROWS = 256  #: beyond it the vendor's library is chosen without asking


@dataclass(slots=True, frozen=True)
class Tile:
    """How a product is cut into programs; `gemv` takes one row, the others any number."""

    kernel: Literal["gemv", "dot", "tma"]
    block_m: int  #: rows of x; the last block is masked
    block_n: int  #: rows of W (gated: of the gate, and as many of up)
    block_k: int  #: columns of an iteration
    warps: int
    stages: int  #: depth of the software pipeline
    splits: int = 1  #: programs that share the columns of a tile
    ahead: int = 0  #: 512 byte pieces of each row prefetched before the kernel before is done
    segments: int = 1  #: partial sums of a program; splits * segments fixes the order of additions


@cache
def tile_for(n: int, k: int, gated: bool, rows: int) -> Tile | None:
    """The measured tile for `rows` rows times [n, k]; None: the vendor's library is as fast.

    A shape that was not measured takes what the nearest one of its kind takes; rows that are not
    aligned to 16 bytes, or shorter than a prefetch, take none.
    """
    if rows > MOST_ROWS or k % 8 or k < 512:
        return None
    alike = [shape for shape in H100 if shape[2] == gated]
    if not alike:
        return None
    nearest = min(alike, key=lambda shape: _distance(shape[:2], (n, k)))
    bucket = min((most for most in H100[nearest] if most >= rows), default=None)
    entry = None if bucket is None else H100[nearest][bucket]
    return None if entry is None else Tile(*entry)  # type: ignore[arg-type]


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    """How differently two matrices fill a device: by their rows first, then by their bytes."""
    return abs(math.log(a[0] / b[0])) + abs(math.log(a[0] * a[1] / (b[0] * b[1])))
