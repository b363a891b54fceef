"""Shared prefixes, device page tables and captured plans of the Triton attention.

`TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_attention_plans.py` runs it without a GPU.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from gpu.test_attention_triton import DEVICE, INTERPRETED, TOLERANCE, check, make, prepare
from unit.test_attention import Case, expected

pytest.importorskip("triton")

from kvarn.core.errors import ConfigError
from kvarn.kernels.attention.layout import Heads, is_split, lay_out, lay_out_small
from kvarn.kernels.attention.tiles import HIGH, LOW, PART, ROW, ROWS
from kvarn.kernels.attention.triton import TritonAttention

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device_is_there() -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def finely_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short contexts are split too, and the shortest prefix pays."""
    for name in ("DECODE_LEAST", "CHUNK_LEAST", "SHARED_LEAST"):
        monkeypatch.setattr(f"kvarn.kernels.attention.layout.{name}", 1)
    for name in ("DECODE_WAVES", "CHUNK_WAVES", "SHARED_WAVES"):
        monkeypatch.setattr(f"kvarn.kernels.attention.layout.{name}", 20)
    monkeypatch.setattr("kvarn.kernels.attention.layout.SHARED_BYTES", 0)


def share(case: Case, runs: list[tuple[int, int, int]]) -> Case:
    """Make the spans of each run (first, spans, positions) share their first pages."""
    size = case.rows.page_size
    pages = case.rows.pages.copy()
    for first, count, positions in runs:
        for s in range(first + 1, first + count):
            case.keys[s][:positions] = case.keys[first][:positions]
            case.values[s][:positions] = case.values[first][:positions]
            case.tables[s] = case.tables[s].copy()
            case.tables[s][: positions // size] = case.tables[first][: positions // size]
            at = case.rows.page_indptr[s]
            pages[at : at + positions // size] = case.tables[first][: positions // size]
    case.rows = replace(case.rows, pages=pages, shared=np.array(runs, np.int64))
    return case


def tabled(case: Case) -> Case:
    """The same with the page lists in a device table of another order."""
    rows = case.rows
    counts = np.diff(rows.page_indptr)
    width = int(counts.max(initial=1)) + 2
    table = np.full((len(counts), width), -1, np.int32)
    for s, count in enumerate(counts):
        at = rows.page_indptr[s]
        table[len(counts) - 1 - s, 1 : 1 + count] = rows.pages[at : at + count]
    there = np.arange(len(counts))[::-1] * width + 1
    flat = torch.from_numpy(table).flatten().to(DEVICE)
    case.rows = replace(rows, page_indptr=there.copy(), pages=rows.pages[:0], table=flat)
    return case


def captured(
    case: Case, n_rows: int, backend: TritonAttention | None = None
) -> tuple[torch.Tensor, Any]:
    """The step by a graph plan for `n_rows` rows, run without capture: o, and the plan."""
    backend = backend or TritonAttention()
    cache, *step = prepare(case, backend)
    heads, kv_heads, dim = case.q.shape[1], cache.shape[1], case.q.shape[2]
    plan = backend.graph_plan(n_rows, heads, kv_heads, dim, case.rows)
    host = {name: np.full(size, 12345, np.int32) for name, size in plan.sizes.items()}
    plan.fill(case.rows, host)
    assert case.rows.table is not None
    there = {name: torch.from_numpy(array).to(DEVICE) for name, array in host.items()}
    plan.bind(there, case.rows.table)
    padded = [x.new_zeros(plan.sizes["slots"], *x.shape[1:]) for x in step]
    for wide, x in zip(padded, step):
        wide[: len(x)] = x
    return plan.run(cache, *padded)[0][: len(case.q)].cpu(), plan


def check_captured(case: Case, n_rows: int) -> Any:
    o, plan = captured(case, n_rows)
    near = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(o.float(), expected(case)[0], atol=near, rtol=near)
    return plan


DECODES = [(300, 1), (0, 1), (15, 1), (16, 1), (700, 1), (31, 1)]


def test_a_table_on_the_device_is_read() -> None:
    check(tabled(make([(0, 33), (100, 1), (37, 20), (0, 0), (15, 1)])))
    check(tabled(make([(100, 1), (60, 20)], window=40)))


@pytest.mark.parametrize("options", [{}, {"heads": 18, "softcap": 9.0}, {"page_size": 64}])
def test_shared_prefixes(finely_cut: None, options: dict[str, Any]) -> None:
    """Runs of several lengths beside spans that share nothing, one- and many-row."""
    spans = [(90, 1), (700, 1), (640, 1), (650, 1), (0, 30), (192, 1), (200, 1), (200, 1), (300, 9)]
    runs = [(1, 3, 640), (5, 3, 192)]
    check(share(make(spans, **options), runs))
    check(tabled(share(make(spans, **options), runs)))


def test_many_sharers_fill_several_tiles(finely_cut: None) -> None:
    spans = [(48 + i, 1) for i in range(40)]
    check(share(make(spans), [(0, 40, 48)]))


def test_spans_of_some_rows_share_too(finely_cut: None) -> None:
    check(share(make([(130, 3), (128, 2), (150, 1)]), [(0, 3, 128)]))


def test_windows_ignore_shared_prefixes(finely_cut: None) -> None:
    check(share(make([(130, 1), (140, 1)], window=1000), [(0, 2, 128)]))


def test_a_short_prefix_is_read_by_everyone() -> None:
    """What is saved does not pay for a launch."""
    case = share(make([(130, 1), (140, 1)]), [(0, 2, 128)])
    assert len(lay_out(case.rows, Heads(4, 2, 64, 4, 132)).tilings) == 1
    long = share(make([(5000, 1)] * 9), [(0, 9, 4992)])
    assert len(lay_out(long.rows, Heads(32, 8, 128, 2, 132)).tilings) == 2
    alone = replace(long.rows, shared=np.array([[0, 1, 4992]]))
    assert len(lay_out(alone, Heads(32, 8, 128, 2, 132)).tilings) == 1


def test_captured_decodes() -> None:
    short = [(100, 1), *DECODES[1:4]]  # nothing to split, on however large a device
    assert not check_captured(tabled(make(short)), 7).n_slots
    check_captured(tabled(make(DECODES, heads=18, softcap=9.0)), 6)
    check_captured(tabled(make(DECODES, window=20)), 8)


def test_captured_splits(finely_cut: None) -> None:
    assert check_captured(tabled(make([*DECODES, (900, 1)])), 9).n_slots
    check_captured(tabled(make(DECODES, window=400)), 8)


def test_captured_shared_prefixes(finely_cut: None) -> None:
    spans = [(90, 1), (700, 1), (640, 1), (650, 1), (2, 1)]
    assert check_captured(tabled(share(make(spans), [(1, 3, 640)])), 8).shared


def test_captured_spans_of_some_rows(finely_cut: None) -> None:
    spans = [(90, 4), (700, 4), (0, 4), (650, 4)]
    check_captured(tabled(make(spans)), 16)
    check_captured(tabled(share(make(spans), [(0, 2, 80)])), 20)
    with pytest.raises(ConfigError, match="spans of at most 32 rows"):
        captured(tabled(make([(90, 33)])), 40)


@pytest.mark.parametrize("longest", [2, 8, 12, 32])
def test_captured_spans_of_unlike_lengths(finely_cut: None, longest: int) -> None:
    """Drafts of any lengths in one plan, which is that of the longest; rows are left over."""
    spans = [(90, 1), (700, longest), (0, 1), (650, 1 + longest // 2), (1, 2)]
    backend, heads = TritonAttention(), (4, 2, 64)
    total = sum(rows for _, rows in spans)
    assert check_captured(tabled(make(spans)), total).sizes["slots"] == total
    check_captured(tabled(make(spans, window=40)), total + 13)
    one, other = (tabled(make([(9, rows)])).rows for rows in (longest, max(2, longest - 1)))
    same = backend.graph_key(one, *heads) == backend.graph_key(other, *heads)
    assert same or longest - 1 in (8, 16)


def test_an_idle_step_writes_nothing() -> None:
    case = tabled(make(DECODES))
    none = np.zeros(0, np.int64)
    idle = replace(
        case.rows, indptr=case.rows.indptr[:1], start=none, page_indptr=none, base=none, slots=none
    )
    backend = TritonAttention()
    plan = backend.graph_plan(8, 4, 2, 64, case.rows)
    host = {name: np.zeros(size, np.int32) for name, size in plan.sizes.items()}
    plan.fill(idle, host)
    there = {name: torch.from_numpy(array).to(DEVICE) for name, array in host.items()}
    plan.bind(there, torch.zeros(1, dtype=torch.int32, device=DEVICE))
    cache = backend.allocate(1, 4, 16, 2, 64, torch.float32, DEVICE)[0]
    cache.fill_(7.0)
    q, k, v = (torch.randn(8, heads, 64, device=DEVICE) for heads in (4, 2, 2))
    plan.run(cache, q, k, v)
    assert bool((cache == 7.0).all())


def test_a_step_that_does_not_fit_is_refused() -> None:
    """One that is split, into a plan without room for partial results."""
    backend = TritonAttention()
    short, long = tabled(make([(10, 1)])).rows, tabled(make([(5000, 1)])).rows
    backend.multiprocessors = 132
    assert backend.graph_key(short, 4, 2, 64) != backend.graph_key(long, 4, 2, 64)
    plan = backend.graph_plan(1, 4, 2, 64, short)
    host = {name: np.zeros(size, np.int32) for name, size in plan.sizes.items()}
    with pytest.raises(ConfigError, match="capture one"):
        plan.fill(long, host)


@pytest.mark.parametrize("seed", range(6))
def test_any_step_fits_the_plan_of_its_key(seed: int) -> None:
    """Random lengths, skewed and even, with and without shared prefixes; each slot used once."""
    rng = np.random.default_rng(seed)
    for _ in range(30):
        n, rows_each = int(rng.integers(1, 300)), int(rng.choice([1, 1, 2, 8]))
        group = int(rng.choice([1, 2, 4, 8]))
        rows_each = min(rows_each, 64 // group)
        kv_heads = int(rng.choice([1, 2, 8]))
        longest = int(10 ** rng.uniform(1, 5))
        start = rng.integers(0, longest, n) if rng.random() < 0.5 else np.full(n, longest)
        start[int(rng.integers(n))] = longest * int(rng.choice([1, 50]))
        rows = replace(
            make([(0, 1)]).rows, indptr=np.arange(n + 1) * rows_each, start=start,
            page_indptr=np.arange(n), base=np.zeros(n, np.int64),
            slots=np.zeros(n * rows_each, np.int64), page_size=16,
        )  # fmt: skip
        edges = np.unique(rng.integers(0, n + 1, 8))
        runs = [(a, b - a, int(start[a:b].min()) // 16 * 16) for a, b in pairwise(edges)]
        runs = [run for run in runs if run[1] > 1 and run[2]]
        if runs and rng.random() < 0.7:
            rows.shared = np.array(runs)
        backend = TritonAttention()
        backend.multiprocessors = 132
        heads = Heads(group * kv_heads, kv_heads, 128, 2, 132)
        plan = backend.graph_plan(n * rows_each, heads.heads, kv_heads, 128, rows)
        host = {name: np.zeros(size, np.int32) for name, size in plan.sizes.items()}
        plan.fill(rows, host)
        work = lay_out_small(rows, heads).work
        assert plan.shared == bool(len(work.items[0]))
        assert plan.shared or plan.split == is_split(rows, heads) == (work.n_slots > 0)
        assert sorted(work.entries.tolist()) == list(range(work.n_slots))
        seen = np.zeros(n * rows_each, np.int64)  # positions that each row is given
        for items in work.items:
            for item in items:
                seen[item[ROW] : item[ROW] + item[ROWS]] += item[HIGH] - item[LOW]
                assert item[PART] < work.n_slots
        np.testing.assert_array_equal(seen, np.repeat(start + rows_each, rows_each))


def test_repeated_captured_steps_are_bitwise_equal(finely_cut: None) -> None:
    case = tabled(make([(900, 1), (500, 1), (3, 1)]))
    assert torch.equal(captured(case, 4)[0], captured(case, 4)[0])


def test_the_bucket_does_not_matter(finely_cut: None) -> None:
    """Idle items change nothing."""
    case = tabled(make([(900, 1), (500, 1), (3, 1)]))
    assert torch.equal(captured(case, 4)[0], captured(case, 32)[0])
