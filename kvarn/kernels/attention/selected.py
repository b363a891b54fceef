"""Rows that attend to some of their pages: what they could see, and a plan for any backend.

Beside each page of a layer lie its bounds: the least and the largest of each number of its keys,
sketches [pages, Hkv, 2, d] in the cache's dtype. A page gets them when it is whole. The page that a
row is in is always seen, so it needs none; nor does anything that a rejected draft has written.

Rows of one page may share a choice. What the first of them chose is remembered, as a list of pages
by layer and KV head, where rows of later steps find it.
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

#: choose(which [n] of the R rows, q [n, Hkv, G, d], sketch, table [n, P]) -> scores [n, Hkv, P]
Choose = Callable[[Ints, Tensor, Tensor, Tensor], Tensor]


def never(which: Ints, q: Tensor, sketch: Tensor, table: Tensor) -> Tensor:
    """For plans that choose by the bounds themselves."""
    raise NotImplementedError


@dataclass(slots=True)
class Book:
    """What one layer knows of its pages, and of what rows have chosen."""

    sketch: Tensor  #: [pages, Hkv, 2, d] bounds
    memory: Tensor | None = None  #: [places, Hkv, most] int32 lists of pages; None: no row reuses


@dataclass(slots=True)
class Lists:
    """The lists of pages that a step works with: those chosen in it, then those remembered."""

    anew: Ints  #: [A] rows that choose, of the R
    sees: Ints  #: [R] the list that each row sees
    fetched: Ints  #: [F] where in the memory the lists behind the first A come from
    kept: Ints  #: [K] lists that are remembered
    places: Ints  #: [K] where

    @property
    def count(self) -> int:
        """All of them."""
        return len(self.anew) + len(self.fetched)


@dataclass(slots=True)
class SelectedRows:
    """The R rows of a step that see some of their pages, in one group, on the host.

    Row i has `pages[i]` pages, the last of them with `rest[i]` positions up to its own, and sees
    `keep[i]` of these: the first, the last, and `keep - 2` others of each KV head. It chooses them
    if `anew[i]`, and sees what the row before it chose if not; both have the same pages.
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
    anew: NDArray[np.bool_]  #: [R]
    places: Ints  #: [R] where the list of each row is, or will be, in the memory
    remembers: bool  #: whether there is one; if not, all rows choose
    most: int  #: pages that a list has room for
    odd: Ints  #: of the R rows, those that choose by something else than the bounds

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
        return replace(
            self, step=step, rows=none, others=none, pages=none, rest=none, keep=none,
            table_rows=none, whole=none, anew=self.anew[:0], places=none, odd=none,
        )  # fmt: skip

    def lists(self) -> Lists:
        """Whose choice each row sees. Rows of a span that share one are neighbours."""
        anew = np.flatnonzero(self.anew)
        if not self.remembers:
            return Lists(anew, np.arange(len(self.rows)), anew[:0], anew[:0], anew[:0])
        sees, spans = np.cumsum(self.anew) - 1, self.spans
        here = sees >= 0
        here[here] = spans[anew[sees[here]]] == spans[here]
        fetched, which = np.unique(self.places[~here], return_inverse=True)
        sees[~here] = len(anew) + which
        last = self.places[anew][::-1]  # of two with the same place, the later one stays
        places, back = np.unique(last, return_index=True)
        return Lists(anew, sees, fetched, len(anew) - 1 - back, places)

    def plain(self) -> PagedRows:
        """The step without the R rows, which are the last of their spans."""
        step = self.step
        counts = np.diff(step.indptr) - np.bincount(self.spans, minlength=len(step.start))
        indptr = np.concatenate([[0], np.cumsum(counts)])
        return replace(step, indptr=indptr, slots=step.slots[self.others], shared=None)

    def listed(self, kv_heads: int, sees: Ints, lists: Tensor | None) -> PagedRows:
        """What is chosen, as decode rows of sequences whose page lists differ by KV head.

        `lists` [n, Hkv, most]: pages in their order, all whole but the last; row i `sees[i]`.
        """
        step, count, none = self.step, len(self.rows), self.rows[:0]
        return PagedRows(
            indptr=np.arange(count + 1), start=(self.keep - 1) * step.page_size + self.rest - 1,
            page_indptr=sees * (kv_heads * self.most), pages=none,
            base=np.zeros(count, np.int64), slots=np.zeros(count, np.int64),
            page_size=step.page_size, scale=step.scale, softcap=step.softcap,
            table=None if lists is None else lists.view(-1), head_pages=self.most,
        )  # fmt: skip


class SelectedPlan(Protocol):
    """The work of one step on one group in which rows choose; used by every layer of the group."""

    def run(
        self, cache: Any, book: Book, q: Tensor, k: Tensor, v: Tensor, choose: Choose
    ) -> Tensor:
        """Write k and v, bring the bounds up to date, attend with q [T, Hq, d]: o [T, Hq, d]."""
        ...


class FusedSelectedPlan(SelectedPlan, Protocol):
    """A plan that takes the projection as it is."""

    def fused(self, cache: Any, book: Book, qkv: Tensor, rotary: Rotary, choose: Choose) -> Tensor:
        """Normalise and rotate q and k of qkv [T, (Hq + 2 Hkv) * d], then as `run`."""
        ...


class SelectBackend(AttentionBackend, Protocol):
    """A backend with kernels for rows that choose, all of them together."""

    def selected(self, rows: SelectedRows) -> FusedSelectedPlan:
        """Lay out one step."""
        ...

    def selected_graph_plan(
        self, n_rows: int, n_heads: int, kv_heads: int, head_dim: int, rows: SelectedRows
    ) -> Any:
        """A `GraphPlan` and `FusedSelectedPlan` of at most `n_rows` single rows, all of which
        choose by the bounds or have chosen, for steps with the `selected_key` of `rows`."""
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
        self.lists: Lists | None = None  #: laid out by the first layer
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
        self, cache: Any, book: Book, q: Tensor, k: Tensor, v: Tensor, choose: Choose
    ) -> Tensor:
        """See `SelectedPlan`."""
        o, sketch = torch.empty_like(q), book.sketch
        if len(self.at):
            self.backend.write(cache, self.slots, k[self.at], v[self.at])
        if self.others is not None:
            at = self.rest
            o[at] = self.others.run(cache, q[at], k[at], v[at])[0]
        if len(self.whole):
            keys = self.backend.keys(cache, self.inside)
            low, high = keys.view(len(self.whole), -1, *keys.shape[1:]).float().aminmax(dim=1)
            sketch[self.whole] = torch.stack((low, high), 2).to(sketch.dtype)
        if self.lists is None:
            self.lists = self.rows.lists()
        found = self._lists(self.lists, book, q, choose)
        for i, row in enumerate(self.rows.rows.tolist()):
            o[row] = self._row(i, found[self.lists.sees[i]], cache, q[row])
        return o

    def _lists(self, lists: Lists, book: Book, q: Tensor, choose: Choose) -> list[Tensor]:
        """Pages [Hkv, keep] of every list, of what is chosen now and what is remembered."""
        found = [self._chosen(int(i), book.sketch, q, choose) for i in lists.anew]
        if book.memory is None:
            return found
        found += [book.memory[at].long() for at in lists.fetched.tolist()]
        for index, place in zip(lists.kept.tolist(), lists.places.tolist()):
            book.memory[place, :, : found[index].shape[1]] = found[index]
        return found

    def _chosen(self, i: int, sketch: Tensor, q: Tensor, choose: Choose) -> Tensor:
        """Row `i` chooses, of q [T, Hq, d]: pages [Hkv, keep]."""
        rows, table, kv_heads = self.rows, self.tables[i], sketch.shape[1]
        mine = q[rows.rows[i]].view(1, kv_heads, -1, q.shape[2])
        scores = choose(np.array([i]), mine, sketch, table[:-1].unsqueeze(0))[0]
        scores[:, 0] = torch.inf
        best = scores.topk(int(rows.keep[i]) - 1, dim=1).indices.sort(dim=1).values
        last = best.new_full((kv_heads, 1), int(rows.pages[i]) - 1)
        return table[torch.cat([best, last], 1)]

    def _row(self, i: int, pages: Tensor, cache: Any, q: Tensor) -> Tensor:
        """q [Hq, d] over the first `keep` of pages [Hkv, n] -> o [Hq, d]."""
        rows, size = self.rows, self.rows.step.page_size
        chosen = pages[:, : int(rows.keep[i])]
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
    book: Book
    choose: Choose

    def run(self, cache: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        return self.plan.run(cache, self.book, q, k, v, self.choose), None

    def fused(self, cache: Any, qkv: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor | None]:
        """See `FusedPlan`."""
        return self.plan.fused(cache, self.book, qkv, rotary, self.choose), None
