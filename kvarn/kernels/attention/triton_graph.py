"""Attention plans of fixed launches, for CUDA graphs: one grid for any lengths.

A bucket of n rows launches n + programs / KV heads items, which any step of at most n rows fits
into (`tiles.split_length` says why); those that a step does not need are idle. What the launches of
a step are beside that is its key: the rows that a tile has room for, whether a span is split, and
whether a prefix is shared. Without the last two no room is made for splits, and nothing is merged.
Spans may differ in length as long as the tile holds each of them, so drafts of any lengths go
through one plan.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvarn.core.errors import ConfigError
from kvarn.kernels.attention import PagedRows, small_layout
from kvarn.kernels.attention.layout import Heads, lay_out_small, longest, paying
from kvarn.kernels.attention.tiles import PART, Cut
from kvarn.kernels.attention.triton_plan import OnDevice, Round, TritonPlan

TALLEST = 64  #: rows of the largest tile, query heads included

Key = tuple[int, bool, bool]
Arrays = Mapping[str, NDArray[np.int32]]


def key_of(rows: PagedRows, heads: Heads) -> Key:
    """Rows of a span at most, whether spans are split, whether prefixes are shared."""
    most, split = small_layout.key(rows, heads)
    room = 1 if most == 1 else heads.decode(most)[1].height
    shared = len(paying(rows, heads)) > 0
    return room, shared or split, shared


class GraphTritonPlan(TritonPlan):
    """The launches of steps like `rows`, of at most `n_rows` rows; see `GraphPlan`."""

    def __init__(self, rows: PagedRows, n_rows: int, heads: Heads) -> None:
        super().__init__(rows, False, heads.multiprocessors)
        self.heads = heads
        length, self.split, self.shared = key_of(rows, heads)
        self.tiling, cut = heads.decode(longest(rows))
        self.wide, whole = heads.shared()
        if not fits(rows, heads):
            raise ConfigError(
                f"a captured step takes spans of at most {TALLEST // heads.group} rows with "
                f"{heads.group} query heads a KV head, not {longest(rows)}; longer ones are "
                f"chunks, which run eagerly"
            )
        more = _more(cut, heads) if self.split else 0
        # m >= 2 spans of one row are in at most m / 2 tiles of three rows or more
        tiles = n_rows // 2 if length == 1 and whole.height > 2 else n_rows
        wide_items = tiles + _more(whole, heads) if self.shared else 0
        self.n_slots = merges = 0
        if self.shared:
            self.n_slots = 2 * n_rows + more * length + _more(whole, heads) * whole.height
            merges = n_rows
        elif self.split:
            self.n_slots = 2 * more * length
            merges = min(n_rows, more * length)
        #: shared items, items, rows merged, partial results
        self.room = [wide_items, n_rows + more, merges, self.n_slots]
        self.how = small_layout.how(rows, heads)
        self.sizes = {
            "slots": n_rows, "shared": 8 * wide_items, "items": 8 * (n_rows + more),
            "merges": 3 * merges, "entries": self.n_slots,
        }  # fmt: skip

    def bind(self, arrays: dict[str, Tensor], table: Tensor) -> None:
        """See `GraphPlan`."""
        launches = [(self.tiling, arrays["items"].view(-1, 8))]
        if self.shared:
            launches.insert(0, (self.wide, arrays["shared"].view(-1, 8)))
        merges = arrays["merges"].view(-1, 3)
        once = Round(launches, merges, arrays["entries"], self.n_slots)
        self.there = OnDevice(arrays["slots"], table, [once])

    def fill(self, rows: PagedRows, arrays: Arrays) -> None:
        """See `GraphPlan`."""
        count = len(rows.slots)
        arrays["slots"][:count] = rows.slots
        arrays["slots"][count:] = -1
        room = self.room
        if small_layout.available():
            takes = small_layout.fill(rows, self.how, paying(rows, self.heads), room, arrays)
        else:
            takes = _fill(rows, self.heads, room, arrays)
        if any(need > there for need, there in zip(takes, room)):
            raise ConfigError(
                f"the step takes {takes} shared items, items, rows merged and partial results, the "
                f"captured plan has room for {room}: capture one for its own key"
            )


def _fill(rows: PagedRows, heads: Heads, room: list[int], arrays: Arrays) -> list[int]:
    """As `small_layout.fill`, without it."""
    work = lay_out_small(rows, heads).work
    takes = [len(work.items[0]), len(work.items[1]), len(work.merges), work.n_slots]
    if any(need > there for need, there in zip(takes, room)):
        return takes
    for name, items in zip(("shared", "items"), work.items):
        there = arrays[name].reshape(-1, 8)
        there[: len(items)] = items
        there[len(items) :] = 0
        there[len(items) :, PART] = -1
    for name, values in (("merges", work.merges), ("entries", work.entries)):
        arrays[name][: values.size] = values.reshape(-1)
        arrays[name][values.size :] = 0
    return takes


def fits(rows: PagedRows, heads: Heads) -> bool:
    """Whether every span of a step fits into one tile of a captured plan."""
    return longest(rows) == 1 or heads.decode(longest(rows))[0].block_m <= TALLEST


def _more(cut: Cut, heads: Heads) -> int:
    """Items that splitting adds at most."""
    return -(-cut.programs // heads.kv_heads)
