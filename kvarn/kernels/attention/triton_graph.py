"""Attention plans of fixed launches, for CUDA graphs: one grid for any lengths.

A bucket of n rows launches n + programs / KV heads items, which any step of at most n spans fits
into (`tiles.split_length` says why); those that a step does not need are idle. What the launches of
a step are beside that is its key: the rows of a span, whether a span is split, and whether a prefix
is shared. Without the last two no room is made for splits, and nothing is merged.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvarn.core.errors import ConfigError
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.layout import Heads, is_split, lay_out_small, paying
from kvarn.kernels.attention.tiles import PART, Cut, Work
from kvarn.kernels.attention.triton_plan import OnDevice, Round, TritonPlan

Key = tuple[int, bool, bool]
Arrays = Mapping[str, NDArray[np.int32]]


def key_of(rows: PagedRows, heads: Heads) -> Key:
    """Rows of a span, whether spans are split, whether prefixes are shared."""
    longest = int((rows.indptr[1:] - rows.indptr[:-1]).max(initial=1))
    shared = len(paying(rows, heads)) > 0
    return longest, shared or is_split(rows, heads), shared


class GraphTritonPlan(TritonPlan):
    """The launches of steps like `rows`, for at most `n_rows` spans; see `GraphPlan`."""

    def __init__(self, rows: PagedRows, n_rows: int, heads: Heads) -> None:
        super().__init__(rows, False, heads.multiprocessors)
        self.heads = heads
        length, self.split, self.shared = key_of(rows, heads)
        self.tiling, cut = heads.decode()
        self.wide, whole = heads.shared()
        if length > cut.height:
            raise ConfigError(
                f"a captured step takes spans of at most {cut.height} rows with {heads.group} "
                f"query heads a KV head, not {length}; longer ones are chunks, which run eagerly"
            )
        more = _more(cut, heads) if self.split else 0
        # m >= 2 spans of one row are in at most m / 2 tiles of three rows or more
        tiles = n_rows // 2 if length == 1 and whole.height > 2 else n_rows
        wide_items = tiles + _more(whole, heads) if self.shared else 0
        total = n_rows * length
        self.n_slots = 0
        merges = 0
        if self.shared:
            self.n_slots = 2 * total + more * length + _more(whole, heads) * whole.height
            merges = total
        elif self.split:
            self.n_slots = 2 * more * length
            merges = min(n_rows, more) * length
        self.counts = {"shared": wide_items, "items": n_rows + more}
        self.sizes = {
            "slots": total, "shared": 8 * wide_items, "items": 8 * (n_rows + more),
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
        work = lay_out_small(rows, self.heads).work
        self._check(work)
        for name, items in zip(("shared", "items"), work.items):
            there = arrays[name].reshape(-1, 8)
            there[: len(items)] = items
            there[len(items) :] = 0
            there[len(items) :, PART] = -1
        for name, values in (("merges", work.merges), ("entries", work.entries)):
            arrays[name][: values.size] = values.reshape(-1)
            arrays[name][values.size :] = 0

    def _check(self, work: Work) -> None:
        """A step of another key would not fit."""
        needed = {name: len(items) for name, items in zip(("shared", "items"), work.items)}
        if any(needed[name] > self.counts[name] for name in needed) or (
            work.n_slots > self.n_slots or work.merges.size > self.sizes["merges"]
        ):
            raise ConfigError(
                f"the step has {needed} items and {work.n_slots} partial results, the captured "
                f"plan room for {self.counts} and {self.n_slots}: capture one for its own key"
            )


def _more(cut: Cut, heads: Heads) -> int:
    """Items that splitting adds at most."""
    return -(-cut.programs // heads.kv_heads)
