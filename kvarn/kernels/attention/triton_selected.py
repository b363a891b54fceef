"""Rows that choose pages, on a GPU: three small launches, then ordinary attention.

The chosen pages of a row and KV head, in their order, are an ordinary paged sequence: all whole but
the last. So attention runs over them as it is, with a list of pages for each KV head. How long the
lists are is known before anything runs; the host lays the step out once, for all layers.

Scores are the bounds, by a kernel; parts that choose by something else write theirs over them, for
all of their rows together. Rows that see what an earlier row chose take no part in scores and pick.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.kernels.attention import Rotary
from kvarn.kernels.attention.layout import Heads
from kvarn.kernels.attention.selected import Book, Choose, SelectedRows
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
        self.wide = int(rows.pages.max(initial=1))
        self.chosen: TritonPlan | None = None  #: over the lists

    def run(
        self, cache: Tensor, book: Book, q: Tensor, k: Tensor, v: Tensor, choose: Choose
    ) -> Tensor:
        """See `SelectedPlan`."""
        from kvarn.kernels.triton.kv_write import kv_write

        self.bring(book)
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        heads, dim = k.shape[1:]
        kv_write[(len(k),)](
            k, v, self.slots, cache, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            heads, dim, self.rows.step.page_size, power_of_two(heads * dim),
        )  # fmt: skip
        return self._written(cache, book, q, choose)

    def fused(
        self, cache: Tensor, book: Book, qkv: Tensor, rotary: Rotary, choose: Choose
    ) -> Tensor:
        """See `FusedSelectedPlan`."""
        from kvarn.kernels.triton.rope_write import rope_write

        self.bring(book)
        q = rope_write(
            qkv, rotary.positions, self.slots, rotary.cos, rotary.sin, cache, rotary.n_heads,
            rotary.n_kv_heads, rotary.q_norm, rotary.k_norm, rotary.eps,
        )  # fmt: skip
        return self._written(cache, book, q, choose)

    def bring(self, book: Book) -> None:
        """The step on the device; once."""
        if self.chosen is not None:
            return
        rows, kv_heads, device = self.rows, book.sketch.shape[1], book.sketch.device
        lists = rows.lists()
        anew, entry = lists.anew, rows.entries
        odd = np.flatnonzero(np.isin(anew, rows.odd))  # of those that choose
        self.which, self.reach = anew[odd], int(rows.pages[anew[odd]].max(initial=1)) - 1
        arrays = [
            rows.step.slots, rows.rows, rows.others, rows.whole, rows.rows[anew], entry[anew],
            rows.pages[anew], rows.keep[anew], np.arange(len(anew)), lists.fetched, lists.kept,
            lists.places, odd,
        ]  # fmt: skip
        found = upload(arrays, torch.int32, device)
        self.slots, self.at, self.rest, self.whole, self.asks, self.entry, *found = found
        self.counts, self.keeps, self.places, self.fetched, self.kept, self.memory, self.odd = found
        self.scores = torch.empty((len(anew), kv_heads, self.wide), device=device)
        shape = (lists.count, kv_heads, rows.most)
        self.pages = torch.empty(shape, dtype=torch.int32, device=device)
        self.table = rows.step.table
        listed = rows.listed(kv_heads, lists.sees, self.pages)
        self.chosen = TritonPlan(listed, False, self.multiprocessors)

    def _written(self, cache: Tensor, book: Book, q: Tensor, choose: Choose) -> Tensor:
        """K and V of q [T, Hq, d] are in the cache: bounds of new pages, then attention."""
        from kvarn.kernels.triton.select import sketch_pages

        kv_heads, dim = book.sketch.shape[1], book.sketch.shape[3]
        if len(self.whole):
            sketch_pages[(len(self.whole), kv_heads)](
                cache, book.sketch, self.whole, kv_heads, dim, self.rows.step.page_size,
                power_of_two(dim),
            )  # fmt: skip
        if self.others is None:
            return self.attend(cache, book, q, choose)
        there = self.others.ready(q.shape[1], kv_heads, dim, q)
        if not len(self.at):
            return attend_all(self.others.rows, there, cache, q, False)[0]
        o = torch.empty_like(q)
        o[self.rest] = attend_all(self.others.rows, there, cache, q[self.rest], False)[0]
        o[self.at] = self.attend(cache, book, q, choose)
        return o

    def attend(self, cache: Tensor, book: Book, q: Tensor, choose: Choose) -> Tensor:
        """The rows that choose, of q [T, Hq, d]: o [R, Hq, d]."""
        lists = self.listed(book, q, choose)
        plan = self.chosen
        assert plan is not None
        mine = q if self.others is None else q[self.at]
        there = plan.ready(q.shape[1], book.sketch.shape[1], q.shape[2], q)
        there = replace(there, pages=lists.view(-1))
        return attend_all(plan.rows, there, cache, mine, False)[0]

    def listed(self, book: Book, q: Tensor, choose: Choose) -> Tensor:
        """The lists of pages [n, Hkv, most] of this layer: those of the memory, and new ones."""
        pages, memory = self.pages, book.memory
        if memory is not None and len(self.fetched):
            pages[len(self.asks) :] = memory[self.fetched]
        if len(self.asks):
            self.score(book.sketch, q)
            if len(self.odd):
                self._score_odd(book.sketch, q, choose)
            self.pick(pages)
        if memory is not None and len(self.kept):
            memory[self.memory] = pages[self.kept]
        return pages

    def score(self, sketch: Tensor, q: Tensor) -> None:
        """The bounds of every page: `scores` [A, Hkv, pages]."""
        from kvarn.kernels.triton.select import bound_pages

        count, (_, kv_heads, _, dim) = len(self.asks), sketch.shape
        group = q.shape[1] // kv_heads
        bound_pages[(count * kv_heads, -(-(self.wide - 1) // BLOCK_P))](
            q, sketch, self.asks, self.table, self.entry, self.counts, self.scores,
            q.stride(0), q.stride(1), self.wide, kv_heads, group, dim, BLOCK_P,
            max(16, power_of_two(group)), max(16, power_of_two(dim)),
            "ieee" if q.dtype == torch.float32 else "tf32",
        )  # fmt: skip

    def _score_odd(self, sketch: Tensor, q: Tensor, choose: Choose) -> None:
        """What other parts say of the pages of their rows, over the bounds."""
        assert self.table is not None
        odd, kv_heads = self.odd.long(), sketch.shape[1]
        columns = torch.arange(self.reach, device=q.device)
        inside = columns < (self.counts[odd] - 1).unsqueeze(1)
        at = (self.entry[odd].unsqueeze(1) + columns).where(inside, 0)
        mine = q[self.asks[odd]].view(len(odd), kv_heads, -1, q.shape[2])
        found = choose(self.which, mine, sketch, self.table[at].long())
        self.scores[odd, :, : self.reach] = found

    def pick(self, lists: Tensor) -> None:
        """The pages by the scores, into `lists` [n, Hkv, most]."""
        from kvarn.kernels.triton.select import pick_pages

        kv_heads, block = self.scores.shape[1], max(256, power_of_two(self.wide))
        pick_pages[(len(self.asks) * kv_heads,)](
            self.scores, self.table, self.entry, self.counts, self.keeps, self.places, lists,
            self.wide, lists.shape[2], kv_heads, block,
            num_warps=8 if block > 1024 else 4,
        )  # fmt: skip


LISTED = "listed_"  #: before the names of the arrays of the attention over the lists


class GraphSelectedPlan(TritonSelectedPlan):
    """Steps of at most `n_rows` single rows that all choose by the bounds, or have chosen; see
    `GraphPlan`.

    A row that has no more pages than it may see chooses all of them. At most one page a row becomes
    whole in a step. Where lists are remembered, they are chosen in place and read there.
    """

    def __init__(self, rows: SelectedRows, n_rows: int, heads: Heads) -> None:
        super().__init__(replace(rows, others=rows.others[:0]), heads.multiprocessors)
        self.n_rows, self.heads, self.wide = n_rows, heads, room(rows)
        self.chooses = bool(rows.anew.any())
        self.over = GraphTritonPlan(rows.listed(heads.kv_heads, rows.places, None), n_rows, heads)
        names = ("slots", "entry", "counts", "keeps", "places", "whole")
        each = dict.fromkeys(names, n_rows)
        self.sizes = each | {LISTED + name: size for name, size in self.over.sizes.items()}

    def bind(self, arrays: dict[str, Tensor], table: Tensor) -> None:
        """See `GraphPlan`."""
        self.slots, self.entry = arrays["slots"], arrays["entry"]
        self.counts, self.keeps, self.whole = arrays["counts"], arrays["keeps"], arrays["whole"]
        self.places = arrays["places"]
        shape, device = (self.n_rows, self.heads.kv_heads), table.device
        self.asks = torch.arange(self.n_rows, dtype=torch.int32, device=device)
        self.scores = torch.empty((*shape, self.wide), device=device)
        self.table, self.chosen = table, self.over
        if not self.rows.remembers:
            pages = (*shape, self.rows.most)
            self.pages = torch.empty(pages, dtype=torch.int32, device=device)
        mine = {name: arrays[LISTED + name] for name in self.over.sizes}
        self.over.bind(mine, table)

    def bring(self, book: Book) -> None:
        """Everything is there."""

    def listed(self, book: Book, q: Tensor, choose: Choose) -> Tensor:
        """See `TritonSelectedPlan`."""
        lists = self.pages if book.memory is None else book.memory
        if self.chooses:
            self.score(book.sketch, q)
            self.pick(lists)
        return lists

    def fill(self, rows: SelectedRows, arrays: dict[str, NDArray[np.int32]]) -> None:
        """See `GraphPlan`."""
        idle = {"slots": -1, "whole": -1}
        for name, values in (
            ("slots", rows.step.slots), ("entry", rows.entries),
            ("counts", np.where(rows.anew, rows.pages, 0)), ("keeps", rows.keep),
            ("places", rows.places), ("whole", rows.whole),
        ):  # fmt: skip
            arrays[name][: len(values)] = values
            arrays[name][len(values) :] = idle.get(name, 0)
        listed = rows.listed(self.heads.kv_heads, rows.places, None)
        self.over.fill(listed, {name: arrays[LISTED + name] for name in self.over.sizes})


def room(rows: SelectedRows) -> int:
    """Pages that a captured step has room for: a power of two, so that few are captured."""
    return max(256, power_of_two(int(rows.pages.max(initial=1))))
