"""Rows that choose pages by the bounds, on a GPU: three small launches, then ordinary attention.

The chosen pages of a row and KV head, in their order, are an ordinary paged sequence: all whole but
the last. So attention runs over them as it is, with a list of pages for each KV head. How long the
lists are is known before anything runs; the host lays the step out once, for all layers.
"""

import numpy as np
import torch
from torch import Tensor

from kvarn.kernels.attention import Ints, PagedRows, Rotary
from kvarn.kernels.attention.selected import Choose, SelectedRows
from kvarn.kernels.attention.tilings import power_of_two
from kvarn.kernels.attention.triton_plan import TritonPlan, attend_all
from kvarn.kernels.upload import upload

BLOCK_P = 64  #: pages of a program that scores them


class TritonSelectedPlan:
    """One step on one group; laid out on the device by its first layer."""

    def __init__(self, rows: SelectedRows, entries: Ints, multiprocessors: int) -> None:
        self.rows, self.entries = rows, entries
        self.multiprocessors = multiprocessors
        self.others = TritonPlan(rows.plain(), False, multiprocessors) if len(rows.others) else None
        self.most = int(rows.keep.max(initial=0))
        self.wide = int(rows.pages.max(initial=1))
        self.chosen: TritonPlan | None = None  #: over `lists`

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
            rows.step.slots, rows.rows, rows.others, self.entries, rows.pages, rows.keep, rows.whole
        ]  # fmt: skip
        found = upload(lists, torch.int32, device)
        self.slots, self.at, self.rest, self.entry, self.counts, self.keeps, self.whole = found
        count = len(rows.rows)
        self.scores = torch.empty((count, kv_heads, self.wide), device=device)
        lists_of = torch.empty((count, kv_heads, self.most), dtype=torch.int32, device=device)
        alone = PagedRows(
            indptr=np.arange(count + 1),
            start=(rows.keep - 1) * rows.step.page_size + rows.rest - 1,
            page_indptr=np.arange(count) * kv_heads * self.most, pages=rows.rows[:0],
            base=np.zeros(count, np.int64), slots=rows.rows[:0], page_size=rows.step.page_size,
            scale=rows.step.scale, softcap=rows.step.softcap, table=lists_of.view(-1),
            head_pages=self.most,
        )  # fmt: skip
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
            q, sketch, self.at, self.rows.step.table, self.entry, self.counts, self.scores,
            q.stride(0), q.stride(1), self.wide, kv_heads, group, dim, BLOCK_P,
            max(16, power_of_two(group)), max(16, power_of_two(dim)),
            "ieee" if q.dtype == torch.float32 else "tf32",
        )  # fmt: skip

    def pick(self) -> None:
        """The lists of pages, by the scores."""
        from kvarn.kernels.triton.select import pick_pages

        assert self.chosen is not None
        kv_heads, block = self.scores.shape[1], max(256, power_of_two(self.wide))
        pick_pages[(len(self.at) * kv_heads,)](
            self.scores, self.rows.step.table, self.entry, self.counts, self.keeps,
            self.chosen.rows.table, self.wide, self.most, kv_heads, block,
            num_warps=8 if block > 1024 else 4,
        )  # fmt: skip
