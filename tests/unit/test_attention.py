"""Every attention backend against the fp32 oracle, over random ragged batches."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvarn.core.part import Cap, find
from kvarn.kernels import native
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.reference import attend
from kvarn.kernels.merge import merge

torch.set_num_threads(1)

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(not native.available(), reason=native.reason())
)
BACKENDS = ["reference", "cpu", "invariant", NATIVE]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """A random batch: spans (start, length) over sequences whose KV is known in full."""

    rows: PagedRows
    sequences: list[int]  #: sequence of each span
    keys: list[Tensor]  #: by sequence: [L, Hkv, d]
    values: list[Tensor]
    tables: list[np.ndarray]
    q: Tensor
    n_pages: int

    @property
    def positions(self) -> list[list[int]]:
        lengths = np.diff(self.rows.indptr)
        return [
            list(range(int(s), int(s + n))) for s, n in zip(self.rows.start, lengths, strict=True)
        ]


def make_case(
    rng: np.random.Generator,
    spans: list[tuple[int, int]],
    page_size: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
    sinks: int = 0,
) -> Case:
    """One sequence a span, pages scattered, leading pages out of the window given back.

    With sinks, the pages between them and the window are one that holds nothing.
    """
    torch.manual_seed(int(rng.integers(1 << 30)))
    counts = [-(-(start + length) // page_size) for start, length in spans]
    n_pages = sum(counts) + 3
    free = rng.permutation(n_pages)
    tables = np.split(free[: sum(counts)], np.cumsum(counts)[:-1])
    first = [0 if window is None else max(0, start - window + 1) // page_size for start, _ in spans]
    if sinks:
        stay = -(-sinks // page_size)
        for table, f in zip(tables, first):
            table[stay:f] = free[-1]
        first = [0] * len(spans)
    keys = [torch.randn(s + n, kv_heads, dim).to(dtype) for s, n in spans]
    values = [torch.randn(s + n, kv_heads, dim).to(dtype) for s, n in spans]
    total = sum(n for _, n in spans)
    slots = [
        table[p // page_size] * page_size + p % page_size
        for (s, n), table in zip(spans, tables, strict=True)
        for p in range(s, s + n)
    ]
    visible = [table[f:] for table, f in zip(tables, first, strict=True)]
    rows = PagedRows(
        indptr=np.cumsum([0, *(n for _, n in spans)]).astype(np.int64),
        start=np.array([s for s, _ in spans], np.int64),
        page_indptr=np.cumsum([0, *map(len, visible)]).astype(np.int64),
        pages=np.concatenate([*visible, np.zeros(0)]).astype(np.int64),
        base=np.array(first, np.int64) * page_size,
        slots=np.array(slots, np.int64),
        page_size=page_size,
        scale=dim**-0.5,
        window=window,
        sinks=sinks,
        softcap=softcap,
    )
    q = torch.randn(total, heads, dim).to(dtype)
    return Case(rows, list(range(len(spans))), keys, values, tables, q, n_pages)


def expected(case: Case) -> tuple[Tensor, Tensor]:
    """Dense attention of every span over its whole sequence."""
    os, lses = [torch.zeros(0, *case.q.shape[1:])], [torch.zeros(0, case.q.shape[1])]
    for s, positions in enumerate(case.positions):
        lo, hi = int(case.rows.indptr[s]), int(case.rows.indptr[s + 1])
        keys, values = case.keys[case.sequences[s]], case.values[case.sequences[s]]
        at = torch.tensor(positions, dtype=torch.int64).unsqueeze(1)
        slots = torch.arange(len(keys))
        mask = slots <= at
        if case.rows.window is not None:
            mask &= (slots > at - case.rows.window) | (slots < case.rows.sinks)
        o, lse = attend(case.q[lo:hi], keys, values, mask, case.rows.scale, case.rows.softcap)
        os.append(o)
        lses.append(lse)
    return torch.cat(os), torch.cat(lses)


def run(case: Case, name: str, lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Fill the cache up to each span's start by earlier steps, then run the step."""
    backend = find("attention", name)()
    kv_heads, dim = case.keys[0].shape[1:] if case.keys else (1, 8)
    cache = backend.allocate(
        2, case.n_pages, case.rows.page_size, kv_heads, dim, case.q.dtype, torch.device("cpu")
    )[1]
    fill(case, backend, cache)
    step = [
        [kv[case.sequences[s]][p] for s, positions in enumerate(case.positions) for p in positions]
        for kv in (case.keys, case.values)
    ]
    empty = torch.zeros(0, kv_heads, dim, dtype=case.q.dtype)
    k, v = (torch.stack(rows) if rows else empty for rows in step)
    return backend.plan(case.rows, lse=lse).run(cache, case.q, k, v)


def fill(case: Case, backend, cache) -> None:
    """Write the KV before each span's start, one sequence after the other."""
    size = case.rows.page_size
    for sequence, table in enumerate(case.tables):
        spans = [s for s, of in enumerate(case.sequences) if of == sequence]
        done = min(int(case.rows.start[s]) for s in spans)
        if done == 0:
            continue
        at = np.arange(done)
        rows = PagedRows(
            indptr=np.array([0, done]), start=np.array([0]),
            page_indptr=np.array([0, len(table)]), pages=table.astype(np.int64),
            base=np.array([0]), slots=(table[at // size] * size + at % size).astype(np.int64),
            page_size=size, scale=1.0,
        )  # fmt: skip
        k, v = case.keys[sequence][:done], case.values[sequence][:done]
        q = torch.zeros(done, case.q.shape[1], k.shape[2], dtype=k.dtype)
        backend.plan(rows).run(cache, q, k, v)


def check(case: Case, name: str) -> None:
    o, lse = run(case, name)
    want_o, want_lse = expected(case)
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(o.float(), want_o, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, want_lse, atol=tolerance, rtol=tolerance)
    assert o.dtype == case.q.dtype and o.shape == case.q.shape


def random_spans(rng: np.random.Generator, n: int, longest: int) -> list[tuple[int, int]]:
    """Decode rows, chunks with context, fresh prompts."""
    kinds = rng.integers(0, 3, n)
    spans = []
    for kind in kinds:
        start = 0 if kind == 2 else int(rng.integers(0, longest))
        spans.append((start, 1 if kind == 0 else int(rng.integers(1, longest))))
    return spans


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 8, 16, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (4, 1), (2, 2), (9, 1)])
def test_random_batch(name, dtype, page_size, heads, kv_heads):
    rng = np.random.default_rng(page_size * 100 + heads * 10 + kv_heads)
    spans = random_spans(rng, 6, 90)
    check(make_case(rng, spans, page_size, heads, kv_heads, 64, dtype), name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dim", [8, 16, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims(name, dim, dtype):
    rng = np.random.default_rng(dim)
    check(make_case(rng, [(0, 20), (70, 1), (30, 50)], 16, 6, 2, dim, dtype), name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window", [1, 7, 16, 100])
@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_window(name, window, page_size):
    rng = np.random.default_rng(window)
    spans = [*random_spans(rng, 6, 150), (200, 1), (190, 30), (0, 1)]
    check(make_case(rng, spans, page_size, 9, 3, 64, torch.float32, window), name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("window", "sinks"), [(1, 1), (7, 4), (16, 16), (40, 70), (100, 20)])
@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_sinks_beside_a_window(name, window, sinks, page_size):
    """Rows whose window has just left the sinks, is within them, or has not yet begun to leave."""
    rng = np.random.default_rng(window)
    spans = [*random_spans(rng, 6, 150), (200, 1), (190, 30), (0, 1), (0, 130), (sinks, 40)]
    check(make_case(rng, spans, page_size, 9, 3, 64, torch.float32, window, sinks=sinks), name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("softcap", "window"), [(50.0, None), (2.0, 20)])
def test_softcap(name, softcap, window):
    rng = np.random.default_rng(3)
    spans = random_spans(rng, 6, 90)
    check(make_case(rng, spans, 16, 4, 2, 64, torch.float32, window, softcap), name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "spans", [[(15, 1)], [(16, 1)], [(0, 1)], [(0, 16)], [(0, 17)], [(15, 2)], [(64, 64), (63, 1)]]
)
def test_page_and_tile_edges(name, spans):
    check(make_case(np.random.default_rng(5), spans, 16, 9, 3, 64, torch.float32), name)


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_batch(name):
    backend = find("attention", name)()
    cache = backend.allocate(1, 2, 16, 3, 64, torch.float32, torch.device("cpu"))[0]
    none = np.zeros(0, np.int64)
    zero = np.zeros(1, np.int64)
    plan = backend.plan(PagedRows(zero, none, zero, none, none, none, 16, 0.125), lse=True)
    o, lse = plan.run(cache, torch.zeros(0, 9, 64), *torch.zeros(2, 0, 3, 64))
    assert o.shape == (0, 9, 64) and lse.shape == (0, 9)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("page_size", [1, 16])
def test_empty_span_among_others(name, page_size):
    rng = np.random.default_rng(6)
    check(make_case(rng, [(0, 5), (33, 0), (20, 1)], page_size, 9, 3, 64, torch.float32), name)


@pytest.mark.parametrize("name", BACKENDS)
def test_without_lse(name):
    case = make_case(np.random.default_rng(7), [(0, 5), (20, 1)], 16, 9, 3, 64, torch.float32)
    o, lse = run(case, name, lse=False)
    assert lse is None
    torch.testing.assert_close(o, expected(case)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("cut", [1, 16, 37])
@pytest.mark.parametrize("reverse", [False, True])
def test_spans_see_pages_written_in_the_same_step(name, cut, reverse):
    """One sequence computed by two spans of one step: the second sees what the first writes."""
    rng = np.random.default_rng(cut)
    case = make_case(rng, [(0, 60)], 16, 9, 3, 64, torch.float32)
    parts = [(0, cut), (cut, 60 - cut)][:: -1 if reverse else 1]
    table = case.tables[0].astype(np.int64)
    pages = [table[: -(-(s + n) // 16)] for s, n in parts]
    at = np.concatenate([np.arange(s, s + n) for s, n in parts])
    case.rows.indptr = np.cumsum([0, *(n for _, n in parts)])
    case.rows.start = np.array([s for s, _ in parts])
    case.rows.page_indptr = np.cumsum([0, *map(len, pages)])
    case.rows.pages = np.concatenate(pages)
    case.rows.base = np.zeros(2, np.int64)
    case.rows.slots = table[at // 16] * 16 + at % 16
    case.sequences = [0, 0]
    check(case, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_query_in_a_fused_row(name):
    """q, k and v as views into one projection give what their copies give."""
    case = make_case(np.random.default_rng(9), [(0, 33), (0, 1)], 16, 9, 3, 64, torch.bfloat16)
    qkv = torch.randn(34, 15, 64).bfloat16()
    backend = find("attention", name)()
    cache = backend.allocate(1, case.n_pages, 16, 3, 64, torch.bfloat16, torch.device("cpu"))[0]
    views = qkv.split((9, 3, 3), 1)
    o, _ = backend.plan(case.rows).run(cache, *views)
    again, _ = backend.plan(case.rows).run(cache, *(x.contiguous() for x in views))
    assert torch.equal(o, again)


@pytest.mark.parametrize("name", BACKENDS)
def test_copy_of_pages(name):
    """A span over copied pages gives what the originals gave."""
    case = make_case(np.random.default_rng(10), [(40, 1)], 16, 9, 3, 64, torch.float32)
    backend = find("attention", name)()
    cache = backend.allocate(1, 12, 16, 3, 64, torch.float32, torch.device("cpu"))[0]
    fill(case, backend, cache)
    old = case.tables[0].tolist()
    new = [page for page in range(12) if page not in old][: len(old)]
    backend.copy(cache, old, new)
    case.rows.pages = np.array(new, np.int64)
    case.rows.slots = np.array([new[40 // 16] * 16 + 40 % 16], np.int64)
    o, _ = backend.plan(case.rows).run(cache, case.q, case.keys[0][40:], case.values[0][40:])
    torch.testing.assert_close(o, expected(case)[0], atol=1e-5, rtol=1e-5)


def test_reference_takes_custom_masks():
    rng = np.random.default_rng(11)
    case = make_case(rng, [(0, 12)], 16, 4, 2, 64, torch.float32)
    mask = torch.from_numpy(rng.random((12, 12)) < 0.5) | torch.eye(12, dtype=torch.bool)
    backend = find("attention", "reference")()
    cache = backend.allocate(1, case.n_pages, 16, 2, 64, torch.float32, torch.device("cpu"))[0]
    plan = backend.plan(case.rows, masks=[mask])
    o, _ = plan.run(cache, case.q, case.keys[0], case.values[0])
    want, _ = attend(case.q, case.keys[0], case.values[0], mask, 0.125, None)
    torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-5)


INVARIANT = ["invariant", NATIVE]


def test_who_claims_invariance():
    claims = [n for n in ("reference", "cpu", "invariant") if Cap.BATCH_INVARIANT in
              find("attention", n).gives]  # fmt: skip
    assert claims == ["invariant"]
    assert Cap.BATCH_INVARIANT in find("attention", "native").gives


@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_bitwise_the_same_under_any_chunking(name, dtype, window):
    """A prompt computed whole, in chunks and token by token, alone and beside others."""
    rng = np.random.default_rng(12)
    length, heads, kv_heads, dim = 150, 6, 2, 64
    torch.manual_seed(1)
    q = torch.randn(length, heads, dim).to(dtype)
    k, v = torch.randn(2, length, kv_heads, dim).to(dtype)
    whole = chunked(name, q, k, v, [length], window, 16, None)
    for chunks in ([1] * length, [64, 86], [7] * 21 + [3], [149, 1]):
        for others in (None, rng):
            got = chunked(name, q, k, v, chunks, window, 16, others)
            assert torch.equal(got[0], whole[0]) and torch.equal(got[1], whole[1]), chunks[:3]
    paged = chunked(name, q, k, v, [100, 50], window, 1, None)
    assert torch.equal(paged[0], whole[0])


def chunked(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: list[int],
    window: int | None,
    page_size: int,
    others: np.random.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A sequence computed chunk by chunk; `others` puts random fresh spans before and after it."""
    backend = find("attention", name)()
    n_own = -(-len(q) // page_size)
    cache = backend.allocate(
        1, n_own + 40, page_size, k.shape[1], k.shape[2], q.dtype, torch.device("cpu")
    )[0]
    outs, start = [], 0
    for n in chunks:
        before = int(others.integers(1, 20)) if others else 0
        after = int(others.integers(1, 20)) if others else 0
        extra = max(1, -(-20 // page_size))
        own = np.arange(n_own)
        spans = [(0, before, n_own + np.arange(extra)), (start, n, own),
                 (0, after, n_own + extra + np.arange(extra))]  # fmt: skip
        spans = [span for span in spans if span[1]]
        slots = [
            t[(s + np.arange(m)) // page_size] * page_size + (s + np.arange(m)) % page_size
            for s, m, t in spans
        ]
        rows = PagedRows(
            indptr=np.cumsum([0, *(m for _, m, _ in spans)]),
            start=np.array([s for s, _, _ in spans]),
            page_indptr=np.cumsum([0, *(len(t) for _, _, t in spans)]),
            pages=np.concatenate([t for _, _, t in spans]),
            base=np.zeros(len(spans), np.int64), slots=np.concatenate(slots),
            page_size=page_size, scale=0.125, window=window,
        )  # fmt: skip

        def mixed(x: Tensor, b=before, a=after, lo=start, hi=start + n) -> Tensor:
            return torch.cat((torch.randn(b, *x.shape[1:]).to(x.dtype), x[lo:hi],
                              torch.randn(a, *x.shape[1:]).to(x.dtype)))  # fmt: skip

        o, lse = backend.plan(rows, lse=True).run(cache, mixed(q), mixed(k), mixed(v))
        outs.append((o[before : before + n], lse[before : before + n]))
        start += n
    return torch.cat([o for o, _ in outs]), torch.cat([lse for _, lse in outs])


@pytest.mark.skipif(not native.available(), reason=native.reason())
def test_native_does_not_depend_on_threads():
    torch.manual_seed(2)
    q = torch.randn(130, 6, 64).bfloat16()
    k, v = torch.randn(2, 130, 2, 64).bfloat16()
    one = chunked("native", q, k, v, [130], None, 16, None)
    torch.set_num_threads(2)
    two = chunked("native", q, k, v, [130], None, 16, None)
    torch.set_num_threads(1)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_merge_of_any_partition_equals_the_whole(data):
    length = data.draw(st.integers(1, 40))
    parts = data.draw(st.integers(1, 6))
    owner = torch.tensor(data.draw(st.lists(st.integers(0, parts - 1), min_size=length,
                                            max_size=length)))  # fmt: skip
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    q = torch.randn(3, 6, 16)
    k, v = torch.randn(2, length, 2, 16)
    everything = torch.ones(3, length, dtype=torch.bool)
    whole, whole_lse = attend(q, k, v, everything, 0.25, None)
    states = [attend(q, k, v, (owner == p).expand(3, -1), 0.25, None) for p in range(parts)]
    o, lse = merge(states)
    torch.testing.assert_close(o, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


def test_merge_of_nothing_is_nothing():
    o, lse = merge([(torch.zeros(2, 3, 8), torch.full((2, 3), -math.inf))] * 2)
    assert torch.equal(o, torch.zeros(2, 3, 8)) and bool((lse == -math.inf).all())
