"""The Triton attention against the fp32 oracle, over random ragged batches.

`TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_attention_triton.py` runs it without a GPU.
"""

import os
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from unit.test_attention import Case, expected, make_case

pytest.importorskip("triton")

from kvarn.core.errors import ConfigError
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.layout import Heads, lay_out
from kvarn.kernels.attention.tiles import HIGH, LOW, PART, ROW, ROWS
from kvarn.kernels.attention.triton import TritonAttention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
RAGGED = [
    (0, 1),
    (0, 33),
    (37, 1),
    (100, 20),
    (0, 0),
    (15, 1),
    (16, 1),
    (63, 2),
    (5, 140),
    (700, 1),
]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device_is_there() -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def prepare(
    case: Case, backend: TritonAttention, stored: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """Poison a cache, write what earlier steps wrote: the cache, and the step's q, k and v."""
    kv_heads, dim = case.keys[0].shape[1:]
    size = case.rows.page_size
    kind = stored or case.q.dtype
    cache = backend.allocate(1, case.n_pages, size, kv_heads, dim, kind, DEVICE)[0]
    cache.fill_(torch.nan)
    for s, table in enumerate(case.tables):
        for p in range(int(case.rows.start[s])):
            page, at = table[p // size], p % size
            cache[page, :, 0, at] = case.keys[s][p].to(kind)
            cache[page, :, 1, at] = case.values[s][p].to(kind)
    new = [
        torch.cat([kv[s][int(start) :] for s, start in enumerate(case.rows.start)]).to(DEVICE)
        for kv in (case.keys, case.values)
    ]
    return cache, case.q.to(DEVICE), *new


def run(case: Case, lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An eager plan of the step."""
    backend = TritonAttention()
    o, sums = backend.plan(case.rows, lse=lse).run(*prepare(case, backend))
    return o.cpu(), None if sums is None else sums.cpu()


def check(case: Case) -> None:
    o, lse = run(case)
    wanted, wanted_lse = expected(case)
    assert lse is not None
    assert not o.isnan().any()
    near = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(o.float(), wanted, atol=near, rtol=near)
    torch.testing.assert_close(lse, wanted_lse, atol=near, rtol=near)


def make(spans: list[tuple[int, int]], **options: Any) -> Case:
    known = {"page_size": 16, "heads": 4, "kv_heads": 2, "dim": 64, "dtype": torch.float32}
    return make_case(np.random.default_rng(0), spans, **(known | options))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 9])
def test_groups(group: int) -> None:
    check(make(RAGGED, heads=2 * group))


@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 64])
def test_page_sizes(page_size: int) -> None:
    check(make(RAGGED, page_size=page_size))


@pytest.mark.parametrize("dim", [12, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(make(RAGGED[:8], dim=dim, dtype=dtype))


@pytest.mark.parametrize("window", [1, 10, 64, 1000])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_windows_and_caps(window: int, softcap: float | None) -> None:
    check(make(RAGGED, window=window, softcap=softcap))


@pytest.mark.parametrize(("window", "sinks"), [(1, 1), (10, 4), (64, 16), (40, 70), (1000, 8)])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_sinks_beside_a_window(window: int, sinks: int, softcap: float | None) -> None:
    check(make(RAGGED, window=window, softcap=softcap, sinks=sinks))


def test_softcap() -> None:
    check(make(RAGGED, softcap=5.0))


def test_long_contexts_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some in many parts, some in one, chunks as well."""
    monkeypatch.setattr("kvarn.kernels.attention.layout.DECODE_LEAST", 1)
    monkeypatch.setattr("kvarn.kernels.attention.layout.CHUNK_LEAST", 1)
    monkeypatch.setattr("kvarn.kernels.attention.layout.CHUNK_WAVES", 1000)
    monkeypatch.setattr("kvarn.kernels.attention.layout.DECODE_WAVES", 1000)
    spans = [(900, 1), (300, 1), (20, 1), (600, 3), (500, 70)]
    check(make(spans))
    check(make(spans, window=400))
    check(make(spans, window=400, sinks=100))
    check(make(spans, heads=18, softcap=10.0))


@pytest.mark.parametrize("seed", range(4))
def test_random_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spans = [
        (int(rng.integers(0, 300)), int(rng.choice([1, 1, 1, 2, 5, 40, 150]))) for _ in range(9)
    ]
    options = {
        "page_size": int(rng.choice([1, 4, 16, 64])),
        "heads": int(rng.integers(1, 10)) * 2,
        "dim": int(rng.choice([64, 96, 128])),
        "window": [None, 33][int(rng.integers(2))],
        "dtype": [torch.float32, torch.bfloat16][int(rng.integers(2))],
    }
    check(make(spans, **options))


def test_pages_written_in_the_same_step_are_seen() -> None:
    """Two spans of one sequence in one step: the second sees what the first wrote."""
    torch.manual_seed(0)
    length, cut, size = 50, 30, 8
    table = np.random.default_rng(0).permutation(7)
    q, k, v = torch.randn(length, 4, 64), torch.randn(length, 2, 64), torch.randn(length, 2, 64)
    at = np.arange(length)
    slots = (table[at // size] * size + at % size).astype(np.int64)
    whole = rows_of(np.array([0, length]), np.array([0]), [table], slots, size)
    halves = [table[: -(-cut // size)], table]
    parts = rows_of(np.array([0, cut, length]), np.array([0, cut]), halves, slots, size)
    backend = TritonAttention()
    cache = backend.allocate(2, 7, size, 2, 64, torch.float32, DEVICE)
    q, k, v = q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)
    one, _ = backend.plan(whole).run(cache[0], q, k, v)
    two, _ = backend.plan(parts).run(cache[1], q, k, v)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache[0], cache[1])


def rows_of(
    indptr: np.ndarray, start: np.ndarray, tables: list[np.ndarray], slots: np.ndarray, size: int
) -> PagedRows:
    return PagedRows(
        indptr=indptr, start=start, page_indptr=np.cumsum([0, *map(len, tables)]),
        pages=np.concatenate(tables).astype(np.int64), base=np.zeros(len(start), np.int64),
        slots=slots, page_size=size, scale=0.125,
    )  # fmt: skip


def test_views_into_one_row_are_taken() -> None:
    """q, k and v as they come from a fused projection, without copies."""
    case = make([(0, 5), (0, 40)])
    total, dim = len(case.q), case.q.shape[2]
    fused = torch.randn(total, 8, dim)
    q, k, v = fused.to(DEVICE).split((4, 2, 2), 1)
    backend = TritonAttention()
    caches = backend.allocate(2, case.n_pages, 16, 2, dim, torch.float32, DEVICE)
    strided, _ = backend.plan(case.rows).run(caches[0], q, k, v)
    packed, _ = backend.plan(case.rows).run(
        caches[1], q.contiguous(), k.contiguous(), v.contiguous()
    )
    assert torch.equal(strided, packed)


@pytest.mark.parametrize("page_size", [1, 16])
def test_fp8_caches(page_size: int) -> None:
    """Keys and values that fp8 holds exactly give what they give in bf16."""
    case = make([*RAGGED[:5], (300, 1)], dtype=torch.bfloat16, page_size=page_size)
    kind = torch.float8_e4m3fn
    for kv in (case.keys, case.values):
        kv[:] = [x.to(kind).to(torch.bfloat16) for x in kv]
    backend = TritonAttention()
    o, _ = backend.plan(case.rows).run(*prepare(case, backend, kind))
    near = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(o.float().cpu(), expected(case)[0], atol=near, rtol=near)


def test_repeated_runs_are_bitwise_equal() -> None:
    case = make([(900, 1), (2000, 1), (0, 100)], dtype=torch.float32)
    first, second = run(case), run(case)
    assert torch.equal(first[0], second[0])


def test_copy_moves_whole_pages() -> None:
    backend = TritonAttention()
    cache = backend.allocate(1, 5, 4, 2, 8, torch.float32, DEVICE)[0]
    cache.copy_(torch.randn(cache.shape))
    before = cache.clone()
    backend.copy(cache, [0, 3], [4, 1])
    assert torch.equal(cache[[4, 1]], before[[0, 3]])
    assert torch.equal(cache[[0, 2, 3]], before[[0, 2, 3]])


def test_bad_shapes_are_refused() -> None:
    backend = TritonAttention()
    with pytest.raises(ConfigError, match="page_size"):
        backend.allocate(1, 4, 12, 2, 64, torch.float32, DEVICE)
    with pytest.raises(ConfigError, match="head_dim"):
        backend.allocate(1, 4, 16, 2, 512, torch.float32, DEVICE)


def test_every_row_and_position_is_in_one_item() -> None:
    """Tiles cover each span's rows once, and the parts of a tile its KV range once."""
    case = make([(4000, 1), (10, 300), (0, 1), (900, 2)])
    work = lay_out(case.rows, Heads(4, 2, 64, 4, 25)).work
    items_of_all = np.concatenate(work.items)
    tiles: dict[int, list[np.ndarray]] = {}
    for item in items_of_all:
        tiles.setdefault(int(item[ROW]), []).append(item)
    assert sum(int(items[0][ROWS]) for items in tiles.values()) == len(case.q)
    partial = items_of_all[items_of_all[:, PART] >= 0]
    slots = [slot for item in partial for slot in range(item[PART], item[PART] + item[ROWS])]
    assert sorted(slots) == sorted(work.entries.tolist()) == list(range(work.n_slots))
    for items in tiles.values():
        items.sort(key=lambda item: int(item[LOW]))
        assert all(a[HIGH] == b[LOW] for a, b in pairwise(items))
        assert items[0][LOW] == 0
