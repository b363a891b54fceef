"""One step's launches: shared prefixes, decode-like spans and chunks, each with its tiling."""

from dataclasses import dataclass

import numpy as np

from kvarn.kernels.attention import Ints, PagedRows
from kvarn.kernels.attention.tiles import (
    HIGH,
    LOW,
    SLACK,
    Cut,
    Work,
    joined,
    shared_tiles,
    split,
    split_length,
    tiles,
)
from kvarn.kernels.attention.tilings import Tiling, chunk_tiling, decode_tiling, shared_tiling

DECODE_WAVES, CHUNK_WAVES, SHARED_WAVES = 2, 1, 1  #: programs a multiprocessor to aim at
DECODE_LEAST, CHUNK_LEAST, SHARED_LEAST = 128, 1024, 128  #: KV positions not split further
#: KV not read again that pays for one more launch and the merges. A prefix that many rows read
#: comes from the L2 cache after the first: on an H100, 8 sharers of 1024 positions (29 MB) lose a
#: quarter, 32 of them (130 MB) gain a fifth, 32 of 8192 gain threefold and more.
SHARED_BYTES = 64 << 20


@dataclass(slots=True, frozen=True)
class Heads:
    """What attends: heads and their numbers, and the device."""

    heads: int
    kv_heads: int
    dim: int
    wide: int  #: bytes of a number of q
    multiprocessors: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    def cut(self, tiling: Tiling, waves: int, least: int) -> Cut:
        """How tiles of this shape are cut."""
        return Cut(tiling.block_m // self.group, waves * self.multiprocessors, least)

    def shared(self) -> tuple[Tiling, Cut]:
        """The launch of shared prefixes."""
        tiling = shared_tiling(self.dim, self.wide, self.group)
        return tiling, self.cut(tiling, SHARED_WAVES, SHARED_LEAST)

    def decode(self, longest: int = 1) -> tuple[Tiling, Cut]:
        """The launch of spans that fit into a small tile, with room for `longest` rows."""
        tiling = decode_tiling(self.dim, self.wide, self.group * longest)
        return tiling, self.cut(tiling, DECODE_WAVES, DECODE_LEAST)

    def chunk(self) -> tuple[Tiling, Cut]:
        """The launch of all other spans."""
        tiling = chunk_tiling(self.dim, self.wide, self.group)
        return tiling, self.cut(tiling, CHUNK_WAVES, CHUNK_LEAST)


@dataclass(slots=True)
class Layout:
    """Launches of one step: tilings and, in `work`, their items."""

    tilings: list[Tiling]
    work: Work


def lay_out(rows: PagedRows, heads: Heads) -> Layout:
    """Any mixture of spans: only the launches that have items."""
    runs = paying(rows, heads)
    low = own_low(rows, runs)
    lengths = np.diff(rows.indptr)
    (small, few), (large, many) = heads.decode(), heads.chunk()
    kinds: list[tuple[Tiling, Cut, Ints]] = []
    if len(runs):
        tiling, cut = heads.shared()
        kinds.append((tiling, cut, shared_tiles(rows, runs, cut.height)))
    longer = lengths > few.height
    for tiling, cut, mine in ((small, few, (lengths > 0) & ~longer), (large, many, longer)):
        if mine.any():
            kinds.append((tiling, cut, tiles(rows, np.flatnonzero(mine), low, cut.height)))
    items = [split(found, split_length(found, heads.kv_heads, cut)) for _, cut, found in kinds]
    return Layout([tiling for tiling, _, _ in kinds], joined(items, rows))


def lay_out_small(rows: PagedRows, heads: Heads) -> Layout:
    """Spans that all fit into a small tile, and their shared prefixes: always two launches."""
    runs = paying(rows, heads)
    (wide, whole), (small, few) = heads.shared(), heads.decode(longest(rows))
    lengths = rows.indptr[1:] - rows.indptr[:-1]
    own = tiles(rows, np.flatnonzero(lengths), own_low(rows, runs), few.height)
    kinds = [(whole, shared_tiles(rows, runs, whole.height)), (few, own)]
    items = [split(found, split_length(found, heads.kv_heads, cut)) for cut, found in kinds]
    return Layout([wide, small], joined(items, rows))


def longest(rows: PagedRows) -> int:
    """Rows of the longest span."""
    return int((rows.indptr[1:] - rows.indptr[:-1]).max(initial=1))


def is_split(rows: PagedRows, heads: Heads) -> bool:
    """Whether `lay_out_small` splits a span; of steps without shared prefixes."""
    _, few = heads.decode(longest(rows))
    own = tiles(rows, np.flatnonzero(np.diff(rows.indptr)), rows.base, few.height)
    if not len(own):
        return False
    length = split_length(own, heads.kv_heads, few)
    return int((own[:, HIGH] - own[:, LOW]).max()) > length + length // SLACK


def paying(rows: PagedRows, heads: Heads) -> Ints:
    """The runs of `rows.shared` that are worth an extra launch; [n, 3], empty if none is.

    A row that is merged costs partial results instead of one read of a few positions: their
    bytes, written and read twice in fp32, must be below half of what is saved for that run. All
    that is saved together must pay for the launches.
    """
    none = np.empty((0, 3), np.int64)
    if rows.shared is None or rows.window is not None or not len(rows.shared):
        return none
    spans, positions = rows.shared[:, 1], rows.shared[:, 2]
    position = 2 * heads.kv_heads * heads.dim * heads.wide  # bytes of KV
    merging = 2 * 2 * heads.heads * heads.dim * 4 * spans
    saved = (spans - 1) * positions * position
    worth = saved > 2 * merging
    if int(saved[worth].sum()) < SHARED_BYTES:
        return none
    return rows.shared[worth]


def own_low(rows: PagedRows, runs: Ints) -> Ints:
    """[S] the first position that each span does not share."""
    if not len(runs):
        return rows.base
    low = rows.base.copy()
    for first, count, positions in runs.tolist():
        low[first : first + count] += positions
    return low
