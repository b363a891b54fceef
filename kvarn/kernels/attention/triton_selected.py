"""Rows that choose pages by the bounds, on a GPU: three small launches, then ordinary attention.

The chosen pages of a row and KV head, in their order, are an ordinary paged sequence: all whole but
the last. So attention runs over them as it is, with a list of pages for each KV head. How long the
lists are is known before anything runs; the host lays the step out once, for all layers.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.kernels.attention import Rotary
from kvarn.kernels.attention.layout import Heads
from kvarn.kernels.attention.selected import Choose, SelectedRows
from kvarn.kernels.attention.tilings import power_of_two
from kvarn.kernels.attention.triton_graph import GraphTritonPlan
from kvarn.kernels.attention.triton_plan import TritonPlan, attend_all
from kvarn.kernels.upload import upload

BLOCK_P = 64  #: pages of a program that scores them


class TritonSelectedPlan:
    """One step on one group; laid out on the device by its first layer."""

    def __init__(self, rows: SelectedRows, multiprocessors: int) -> None:
        self.rows = rows
        self.multiprocessors = multiprocessors
        self.others = TritonPlan(rows.plain(), False, multiprocessors) if len(rows.others) else None
        self.most = int(rows.keep.max(initial=0))
        self.wide = int(rows.pages.max(initial=1))
        self.chosen: TritonPlan | None = None  #: over the lists

    def run(
        self, cache: Tensor, sketch: Tensor, q: Tensor, k: Tensor, v: Tensor, choose: Choose
    ) -> Tensor:
        """See `SelectedPlan`; the bounds choose."""
        from kvarn.kernels.triton.kv_write import kv_write

        self.bring(sketch)
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        heads, dim = k.shape[1:]
        kv_write[(len(k),)](
            k, v, self.slots, cache, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            heads, dim, self.rows.step.page_size, power_of_two(heads * dim),
        )  # fmt: skip
        return self._written(cache, sketch, q)

    def fused(self, cache: Tensor, sketch: Tensor, qkv: Tensor, rotary: Rotary) -> Tensor:
        """See `FusedSelectedPlan`."""
        from kvarn.kernels.triton.rope_write import rope_write

        self.bring(sketch)
        q = rope_write(
            qkv, rotary.positions, self.slots, rotary.cos, rotary.sin, cache, rotary.n_heads,
            rotary.n_kv_heads, rotary.q_norm, rotary.k_norm, rotary.eps,
        )  # fmt: skip
        return self._written(cache, sketch, q)

    def bring(self, sketch: Tensor) -> None:
        """The step on the device; once."""
        if self.chosen is not None:
            return
        rows, kv_heads, device = self.rows, sketch.shape[1], sketch.device
        lists = [
            rows.step.slots, rows.rows, rows.others, rows.entries, rows.pages, rows.keep, rows.whole
        ]  # fmt: skip
        found = upload(lists, torch.int32, device)
        self.slots, self.at, self.rest, self.entry, self.counts, self.keeps, self.whole = found
        count = len(rows.rows)
        self.scores = torch.empty((count, kv_heads, self.wide), device=device)
        pages = torch.empty((count, kv_heads, self.most), dtype=torch.int32, device=device)
        alone = rows.listed(kv_heads, self.most, pages)
        self.table, self.lists = rows.step.table, pages
        self.chosen = TritonPlan(alone, False, self.multiprocessors)

    def _written(self, cache: Tensor, sketch: Tensor, q: Tensor) -> Tensor:
        """K and V of q [T, Hq, d] are in the cache: bounds of new pages, then attention."""
        from kvarn.kernels.triton.select import sketch_pages

        kv_heads, dim = sketch.shape[1], sketch.shape[3]
        if len(self.whole):
            sketch_pages[(len(self.whole), kv_heads)](
                cache, sketch, self.whole, kv_heads, dim, self.rows.step.page_size,
                power_of_two(dim),
            )  # fmt: skip
        if self.others is None:
            return self.attend(cache, sketch, q)
        there = self.others.ready(q.shape[1], kv_heads, dim, q)
        if not len(self.at):
            return attend_all(self.others.rows, there, cache, q, False)[0]
        o = torch.empty_like(q)
        o[self.rest] = attend_all(self.others.rows, there, cache, q[self.rest], False)[0]
        o[self.at] = self.attend(cache, sketch, q)
        return o

    def attend(self, cache: Tensor, sketch: Tensor, q: Tensor) -> Tensor:
        """The rows that choose, of q [T, Hq, d]: o [R, Hq, d]."""
        self.score(sketch, q)
        self.pick()
        plan = self.chosen
        assert plan is not None
        mine = q if self.others is None else q[self.at]
        there = plan.ready(q.shape[1], sketch.shape[1], q.shape[2], q)
        return attend_all(plan.rows, there, cache, mine, False)[0]

    def score(self, sketch: Tensor, q: Tensor) -> None:
        """The bounds of every page: `scores` [R, Hkv, pages]."""
        from kvarn.kernels.triton.select import bound_pages

        count, (_, kv_heads, _, dim) = len(self.at), sketch.shape
        group = q.shape[1] // kv_heads
        bound_pages[(count * kv_heads, -(-(self.wide - 1) // BLOCK_P))](
            q, sketch, self.at, self.table, self.entry, self.counts, self.scores,
            q.stride(0), q.stride(1), self.wide, kv_heads, group, dim, BLOCK_P,
            max(16, power_of_two(group)), max(16, power_of_two(dim)),
            "ieee" if q.dtype == torch.float32 else "tf32",
        )  # fmt: skip

    def pick(self) -> None:
        """The lists of pages, by the scores."""
        from kvarn.kernels.triton.select import pick_pages

        kv_heads, block = self.scores.shape[1], max(256, power_of_two(self.wide))
        pick_pages[(len(self.at) * kv_heads,)](
            self.scores, self.table, self.entry, self.counts, self.keeps, self.lists, self.wide,
            self.most, kv_heads, block,
            num_warps=8 if block > 1024 else 4,
        )  # fmt: skip


LISTED = "listed_"  #: before the names of the arrays of the attention over the lists


class GraphSelectedPlan(TritonSelectedPlan):
    """Steps of at most `n_rows` single rows that all choose; see `GraphPlan`.

    A row that has no more pages than it may see chooses all of them. At most one page a row becomes
    whole in a step.
    """

    def __init__(self, rows: SelectedRows, n_rows: int, heads: Heads, most: int) -> None:
        super().__init__(replace(rows, others=rows.others[:0]), heads.multiprocessors)
        self.n_rows, self.heads, self.most, self.wide = n_rows, heads, most, room(rows)
        self.listed = GraphTritonPlan(rows.listed(heads.kv_heads, most, None), n_rows, heads)
        each = dict.fromkeys(("slots", "entry", "counts", "keeps", "whole"), n_rows)
        self.sizes = each | {LISTED + name: size for name, size in self.listed.sizes.items()}

    def bind(self, arrays: dict[str, Tensor], table: Tensor) -> None:
        """See `GraphPlan`."""
        self.slots, self.entry = arrays["slots"], arrays["entry"]
        self.counts, self.keeps, self.whole = arrays["counts"], arrays["keeps"], arrays["whole"]
        shape, device = (self.n_rows, self.heads.kv_heads), table.device
        self.at = torch.arange(self.n_rows, dtype=torch.int32, device=device)
        self.scores = torch.empty((*shape, self.wide), device=device)
        self.lists = torch.empty((*shape, self.most), dtype=torch.int32, device=device)
        self.table, self.chosen = table, self.listed
        mine = {name: arrays[LISTED + name] for name in self.listed.sizes}
        self.listed.bind(mine, self.lists.view(-1))

    def bring(self, sketch: Tensor) -> None:
        """Everything is there."""

    def fill(self, rows: SelectedRows, arrays: dict[str, NDArray[np.int32]]) -> None:
        """See `GraphPlan`."""
        idle = {"slots": -1, "whole": -1}
        for name, values in (
            ("slots", rows.step.slots), ("entry", rows.entries), ("counts", rows.pages),
            ("keeps", rows.keep), ("whole", rows.whole),
        ):  # fmt: skip
            arrays[name][: len(values)] = values
            arrays[name][len(values) :] = idle.get(name, 0)
        listed = rows.listed(self.heads.kv_heads, self.most, None)
        self.listed.fill(listed, {name: arrays[LISTED + name] for name in self.listed.sizes})


def room(rows: SelectedRows) -> int:
    """Pages that a captured step has room for: a power of two, so that few are captured."""
    return max(256, power_of_two(int(rows.pages.max(initial=1))))
