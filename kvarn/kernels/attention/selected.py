"""Rows that attend to some of their pages: what they could see, and a plan for any backend.

Beside each page of a layer lie its bounds: the least and the largest of each number of its keys,
sketches [pages, Hkv, 2, d] in the cache's dtype. A page gets them when it is whole. The page that a
row is in is always seen, so it needs none; nor does anything that a rejected draft has written.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.kernels.attention import AttentionBackend, Ints, PagedRows, Rotary
from kvarn.kernels.attention.reference import attend
from kvarn.kernels.upload import upload

#: choose(i, q [Hkv, G, d], low [P, Hkv, d], high [P, Hkv, d]) -> scores [Hkv, P] of row i's pages
Choose = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def never(i: int, q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """For plans that choose by the bounds themselves."""
    raise NotImplementedError


@dataclass(slots=True)
class SelectedRows:
    """The R rows of a step that see some of their pages, in one group, on the host.

    Row i has `pages[i]` pages, the last of them with `rest[i]` positions up to its own, and sees
    `keep[i]` of these: the first, the last, and `keep - 2` others of each KV head.
    """

    step: PagedRows  #: all T rows
    rows: Ints  #: [R] flattened
    others: Ints  #: [T - R] flattened: these see all
    pages: Ints  #: [R]
    rest: Ints  #: [R]
    keep: Ints  #: [R]
    table: NDArray[np.int32]  #: page tables of all sequences
    table_rows: Ints  #: [R] the row of the table that each is of
    whole: Ints  #: [m] pages that this step has made whole, or that have no bounds yet

    @property
    def spans(self) -> Ints:
        """[R] the span of each row."""
        found: Ints = np.searchsorted(self.step.indptr, self.rows, side="right") - 1
        return found

    @property
    def entries(self) -> Ints:
        """[R] where the pages of each row begin, in the tables on the device."""
        return self.step.page_indptr[self.spans]

    def idle(self) -> "SelectedRows":
        """No rows, and nothing to bound."""
        none = self.rows[:0]
        step = replace(
            self.step, indptr=np.zeros(1, np.int64), start=none, page_indptr=none, base=none,
            slots=none, shared=None,
        )  # fmt: skip
        return SelectedRows(step, none, none, none, none, none, self.table, none, none)

    def plain(self) -> PagedRows:
        """The step without the R rows, which are the last of their spans."""
        step = self.step
        counts = np.diff(step.indptr) - np.bincount(self.spans, minlength=len(step.start))
        indptr = np.concatenate([[0], np.cumsum(counts)])
        return replace(step, indptr=indptr, slots=step.slots[self.others], shared=None)

    def listed(self, kv_heads: int, most: int, lists: Tensor | None) -> PagedRows:
        """What is chosen, as decode rows of sequences whose page lists differ by KV head.

        `lists` [R, Hkv, most]: the pages of each, in their order; all whole but the last.
        """
        step, count, none = self.step, len(self.rows), self.rows[:0]
        return PagedRows(
            indptr=np.arange(count + 1), start=(self.keep - 1) * step.page_size + self.rest - 1,
            page_indptr=np.arange(count) * kv_heads * most, pages=none,
            base=np.zeros(count, np.int64), slots=np.zeros(count, np.int64),
            page_size=step.page_size, scale=step.scale, softcap=step.softcap,
            table=None if lists is None else lists.view(-1), head_pages=most,
        )  # fmt: skip


class SelectedPlan(Protocol):
    """The work of one step on one group in which rows choose; used by every layer of the group."""

    def run(
        self, cache: Any, sketch: Tensor, q: Tensor, k: Tensor, v: Tensor, choose: Choose
    ) -> Tensor:
        """Write k and v, bring the bounds up to date, attend with q [T, Hq, d]: o [T, Hq, d]."""
        ...


class FusedSelectedPlan(SelectedPlan, Protocol):
    """A plan that takes the projection as it is, and chooses by the bounds."""

    def fused(self, cache: Any, sketch: Tensor, qkv: Tensor, rotary: Rotary) -> Tensor:
        """Normalise and rotate q and k of qkv [T, (Hq + 2 Hkv) * d], then as `run`."""
        ...


class SelectBackend(AttentionBackend, Protocol):
    """A backend with kernels for rows that choose by the bounds."""

    def selected(self, rows: SelectedRows) -> FusedSelectedPlan:
        """Lay out one step."""
        ...

    def selected_graph_plan(
        self, n_rows: int, n_heads: int, kv_heads: int, head_dim: int, rows: SelectedRows, most: int
    ) -> Any:
        """A `GraphPlan` and `FusedSelectedPlan` of at most `n_rows` single rows, all of which
        choose at most `most` pages, for steps with the `selected_key` of `rows`."""
        ...

    def selected_key(
        self, rows: SelectedRows, n_heads: int, kv_heads: int, head_dim: int
    ) -> tuple[Any, ...]:
        """What the launches depend on beside the number of rows, and of pages."""
        ...


class GatheringPlan:
    """Any backend, any choice: row by row, over the gathered keys and values of what is chosen."""

    def __init__(self, backend: AttentionBackend, rows: SelectedRows, device: torch.device) -> None:
        self.backend, self.rows = backend, rows
        self.others = backend.plan(rows.plain()) if len(rows.others) else None
        step, size = rows.step, rows.step.page_size
        inside = (rows.whole[:, None] * size + np.arange(size)).ravel()
        lists = [rows.rows, rows.others, step.slots[rows.rows], rows.whole, inside]
        self.at, self.rest, self.slots, self.whole, self.inside = upload(lists, torch.int64, device)
        tables = [
            rows.table[row, :count].astype(np.int64)
            for row, count in zip(rows.table_rows.tolist(), rows.pages.tolist())
        ]
        self.tables = upload(tables, torch.int64, device) if tables else []

    def run(
        self, cache: Any, sketch: Tensor, q: Tensor, k: Tensor, v: Tensor, choose: Choose
    ) -> Tensor:
        """See `SelectedPlan`."""
        o = torch.empty_like(q)
        if len(self.at):
            self.backend.write(cache, self.slots, k[self.at], v[self.at])
        if self.others is not None:
            at = self.rest
            o[at] = self.others.run(cache, q[at], k[at], v[at])[0]
        if len(self.whole):
            keys = self.backend.keys(cache, self.inside)
            low, high = keys.view(len(self.whole), -1, *keys.shape[1:]).float().aminmax(dim=1)
            sketch[self.whole] = torch.stack((low, high), 2).to(sketch.dtype)
        for i, row in enumerate(self.rows.rows.tolist()):
            o[row] = self._row(i, cache, sketch, q[row], choose)
        return o

    def _row(self, i: int, cache: Any, sketch: Tensor, q: Tensor, choose: Choose) -> Tensor:
        """q [Hq, d] -> o [Hq, d]."""
        rows, table = self.rows, self.tables[i]
        size, kv_heads = rows.step.page_size, sketch.shape[1]
        bounds = sketch[table[:-1]]
        scores = choose(i, q.view(kv_heads, -1, q.shape[1]), bounds[:, :, 0], bounds[:, :, 1])
        scores[:, 0] = torch.inf
        best = scores.topk(int(rows.keep[i]) - 1, dim=1).indices.sort(dim=1).values
        last = best.new_full((kv_heads, 1), int(rows.pages[i]) - 1)
        chosen = table[torch.cat([best, last], 1)]  # [Hkv, keep]
        slots = (chosen.unsqueeze(2) * size + torch.arange(size, device=q.device)).flatten(1)
        slots = slots[:, : (int(rows.keep[i]) - 1) * size + int(rows.rest[i])]
        k, v = self.backend.read(cache, slots.T)
        seen = torch.ones(1, len(k), dtype=torch.bool, device=q.device)
        step = rows.step
        o, _ = attend(q.unsqueeze(0), k, v, seen, step.scale, step.softcap)
        return o[0].to(q.dtype)


@dataclass(slots=True)
class LayerPlan:
    """An `AttentionPlan` of one layer whose rows choose."""

    plan: Any  #: `SelectedPlan`
    sketch: Tensor
    choose: Choose

    def run(self, cache: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        return self.plan.run(cache, self.sketch, q, k, v, self.choose), None

    def fused(self, cache: Any, qkv: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor | None]:
        """See `FusedPlan`."""
        return self.plan.fused(cache, self.sketch, qkv, rotary), None
