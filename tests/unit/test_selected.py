"""Rows that choose pages: the bounds, the choice, and attention over nothing but what is chosen."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.test_attention import NATIVE, Case, make_case

from kvarn.core.part import find
from kvarn.kernels.attention.reference import attend
from kvarn.kernels.attention.selected import Book, GatheringPlan, SelectedRows
from kvarn.sparse.part import Pages
from kvarn.sparse.quest import Quest

PAGE, CPU = 4, torch.device("cpu")
#: (start, length, rows that choose) of a step, pages that these see
MIXED = [(61, 1, 1), (0, 9, 0), (90, 1, 1), (33, 1, 0), (40, 6, 4)]
KEEP = 5


def select(case: Case, tails: list[int], keep: int) -> SelectedRows:
    """The last `tails[s]` rows of each span choose."""
    ends = case.rows.indptr[1:]
    rows = np.concatenate([np.arange(e - n, e) for e, n in zip(ends, tails)]).astype(np.int64)
    spans = np.repeat(np.arange(len(tails)), tails)
    at = case.rows.start[spans] + rows - case.rows.indptr[spans]
    widest = max(map(len, case.tables))
    table = np.stack([np.pad(t, (0, widest - len(t))) for t in case.tables]).astype(np.int32)
    lengths = case.rows.start + np.diff(case.rows.indptr)
    whole = [t[: n // PAGE] for t, n in zip(case.tables, lengths.tolist())]
    return SelectedRows(
        case.rows, rows, np.setdiff1d(np.arange(ends[-1]), rows), at // PAGE + 1, at % PAGE + 1,
        np.full(len(rows), keep), table, spans, np.concatenate(whole).astype(np.int64),
        np.ones(len(rows), np.bool_), np.arange(len(rows)), False, keep, rows[:0],
    )  # fmt: skip


def remembered(
    rng: np.random.Generator, case: Case, rows: SelectedRows, reuse: int, depth: int
) -> tuple[SelectedRows, Tensor]:
    """The rows share choices within a page; lists that earlier steps could have left."""
    at = (rows.pages - 1) * PAGE + rows.rest - 1
    nth = at // PAGE * -(-PAGE // reuse) + (rows.rest - 1) // reuse
    anew, places = (rows.rest - 1) % reuse == 0, rows.spans * depth + nth % depth
    kv_heads, most = case.keys[0].shape[1], int(rows.keep.max()) + 2
    memory = torch.zeros(len(case.tables) * depth, kv_heads, most, dtype=torch.int32)
    for i in np.flatnonzero(~anew):
        table, count = rows.table[rows.table_rows[i]], int(rows.pages[i])
        for head in range(kv_heads):
            some = rng.choice(np.arange(1, count - 1), int(rows.keep[i]) - 2, replace=False)
            chosen = table[[0, *sorted(some), count - 1]]
            memory[places[i], head, : len(chosen)] = torch.from_numpy(chosen)
    return replace(rows, anew=anew, places=places, remembers=True, most=most), memory


def fill(case: Case, backend: Any, where: torch.device = CPU) -> tuple[Any, list[Tensor]]:
    """A cache with what earlier steps wrote; q, k and v of this one."""
    kv_heads, dim = case.keys[0].shape[1:]
    kind = case.q.dtype
    cache = backend.allocate(1, case.n_pages, PAGE, kv_heads, dim, kind, where)[0]
    for s, table in enumerate(case.tables):
        at = torch.arange(int(case.rows.start[s]))
        slots = torch.from_numpy(table)[at // PAGE] * PAGE + at % PAGE
        k, v = case.keys[s][at], case.values[s][at]
        backend.write(cache, slots.to(where), k.to(where), v.to(where))
    spans = list(enumerate(zip(case.rows.start.tolist(), np.diff(case.rows.indptr).tolist())))
    new = [torch.cat([x[s][a : a + n] for s, (a, n) in spans]) for x in (case.keys, case.values)]
    return cache, [x.to(where) for x in (case.q, *new)]


def expected(case: Case, rows: SelectedRows, choosers: dict[int, int] | None = None) -> Tensor:
    """Dense attention with masks, by Quest's bounds computed from the keys themselves.

    `choosers`: whose query chooses for a row, where it is another one's.
    """
    choosers = choosers or {}
    o = torch.empty_like(case.q)
    chooses = dict(zip(rows.rows.tolist(), range(len(rows.rows))))
    part = Quest()
    for s, (start, n) in enumerate(zip(case.rows.start.tolist(), np.diff(rows.step.indptr))):
        for j in range(int(n)):
            row, length = int(rows.step.indptr[s]) + j, start + j + 1
            keys, values = case.keys[s][:length], case.values[s][:length]
            q, kv_heads = case.q[row : row + 1], keys.shape[1]
            seen = torch.ones(kv_heads, length, dtype=torch.bool)
            if row in chooses:
                n_whole = (length - 1) // PAGE
                pages = keys[: n_whole * PAGE].view(n_whole, PAGE, *keys.shape[1:]).float()
                asked = case.q[choosers.get(row, row)].view(kv_heads, -1, q.shape[2])
                bounds = part.select(some_pages(asked, pages))[0]
                bounds[:, 0] = torch.inf
                best = bounds.topk(int(rows.keep[chooses[row]]) - 1, dim=1).indices
                there = torch.zeros(kv_heads, n_whole + 1, dtype=torch.bool)
                there.scatter_(1, best, True)
                there[:, -1] = True
                seen = there.repeat_interleave(PAGE, 1)[:, :length]
            group = q.shape[1] // kv_heads
            for head in range(kv_heads):
                mine = q[:, head * group : (head + 1) * group]
                k, v = (x[:, head : head + 1] for x in (keys, values))
                mask = seen[head : head + 1]
                found, _ = attend(mine, k, v, mask, rows.step.scale, rows.step.softcap)
                o[row, head * group : (head + 1) * group] = found[0].to(o.dtype)
    return o


def some_pages(q: Tensor, keys: Tensor) -> Pages:
    """One row's q [Hkv, G, d] and the keys [P, size, Hkv, d] of its pages."""
    sketch = torch.stack((keys.amin(1), keys.amax(1)), 2)
    table = torch.arange(len(keys)).unsqueeze(0)
    return Pages(q.unsqueeze(0), sketch, table, 0, torch.zeros(1))


def bounds_choose(which: Any, q: Tensor, sketch: Tensor, table: Tensor) -> Tensor:
    return Quest().select(Pages(q, sketch, table, 0, torch.zeros(len(which))))


@pytest.mark.parametrize("backend", ["reference", "cpu", "invariant", NATIVE])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_only_what_is_chosen_is_seen(backend: str, softcap: float | None) -> None:
    rng = np.random.default_rng(3)
    spans = [(start, n) for start, n, _ in MIXED]
    case = make_case(rng, spans, PAGE, 6, 2, 16, torch.float32, softcap=softcap)
    part: Any = find("attention", backend)()
    rows = select(case, [n for _, _, n in MIXED], KEEP)
    cache, (q, k, v) = fill(case, part)
    sketch = torch.zeros(case.n_pages, 2, 2, 16)
    found = GatheringPlan(part, rows, CPU).run(cache, Book(sketch), q, k, v, bounds_choose)
    torch.testing.assert_close(found, expected(case, rows), atol=1e-5, rtol=1e-5)


def test_rows_of_a_page_share_a_choice() -> None:
    """The first of two asks for both; what it chose is remembered for rows of later steps."""
    rng = np.random.default_rng(4)
    spans = [(60, 1), (40, 6), (90, 2)]
    case = make_case(rng, spans, PAGE, 6, 2, 16, torch.float32)
    part: Any = find("attention", "cpu")()
    rows, memory = remembered(rng, case, select(case, [1, 6, 2], KEEP), 2, 2)
    cache, (q, k, v) = fill(case, part)
    book = Book(torch.zeros(case.n_pages, 2, 2, 16), memory)
    found = GatheringPlan(part, rows, CPU).run(cache, book, q, k, v, bounds_choose)
    asks = {2: 1, 4: 3, 6: 5, 8: 7}  # the rows after those that choose
    torch.testing.assert_close(found, expected(case, rows, asks), atol=1e-5, rtol=1e-5)
    # the next position of the first sequence has only what was remembered
    later = make_case(rng, [(61, 1)], PAGE, 6, 2, 16, torch.float32)
    later.keys[0][:61], later.values[0][:61] = case.keys[0], case.values[0]
    rows, _ = remembered(rng, later, select(later, [1], KEEP), 2, 2)
    cache, (q, k, v) = fill(later, part)
    mine = {page: at for at, page in enumerate(case.tables[0].tolist())}
    moved = memory[rows.places[0], :, :KEEP].apply_(lambda page: int(later.tables[0][mine[page]]))
    memory[rows.places[0], :, :KEEP] = moved
    book = Book(torch.zeros(later.n_pages, 2, 2, 16), memory)
    found = GatheringPlan(part, rows, CPU).run(cache, book, q, k, v, bounds_choose)
    asked = replace(later, q=torch.cat([q, case.q[:1]]))
    torch.testing.assert_close(found, expected(asked, rows, {0: 1})[:1], atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 1 << 30), size=st.integers(1, 16), group=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_a_bound_is_never_below_a_key(seed: int, size: int, group: int) -> None:
    torch.manual_seed(seed)
    keys = torch.randn(6, size, 2, 8)
    q = torch.randn(2, group, 8)
    bounds = Quest().select(some_pages(q, keys))[0]
    products = torch.einsum("hgd,pshd->hgps", q, keys).amax((1, 3))
    assert (bounds >= products - 1e-5).all()
    if size == 1 and group == 1:  # the bound of one key is its product
        torch.testing.assert_close(bounds, products)
