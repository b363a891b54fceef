"""Selection on a GPU against masks in fp32: the same pages, the same attention.

`TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_select_kernels.py` runs it without a GPU.
"""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from unit.test_attention import Case, make_case
from unit.test_selected import PAGE, bounds_choose, expected, fill, remembered, select

pytest.importorskip("triton")

from kvarn.kernels.attention.reference import Reference
from kvarn.kernels.attention.selected import Book, GatheringPlan, SelectedRows, never
from kvarn.kernels.attention.triton import TritonAttention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
STEPS = {
    "decode": [(61, 1, 1), (90, 1, 1), (300, 1, 1)],
    "some see all": [(61, 1, 1), (0, 9, 0), (90, 1, 1), (33, 1, 0), (40, 6, 4)],
    "nobody chooses": [(0, 9, 0), (20, 1, 0)],
}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device_is_there() -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 32), (3, 3, 64)])
def test_selection(step: str, kind: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    spans = STEPS[step]
    rng = np.random.default_rng(5)
    case = make_case(rng, [(a, n) for a, n, _ in spans], PAGE, heads, kv_heads, dim, kind)
    backend: Any = TritonAttention()
    rows = select(case, [n for _, _, n in spans], 7)
    cache, (q, k, v) = fill(case, backend, DEVICE)
    width = rows.table.shape[1]
    rows.step.table = torch.from_numpy(rows.table.ravel().astype(np.int32)).to(DEVICE)
    rows.step.page_indptr = np.arange(len(spans)) * width
    sketch = torch.zeros(case.n_pages, kv_heads, 2, dim, dtype=kind, device=DEVICE)
    found = backend.selected(rows).run(cache, Book(sketch), q, k, v, never)
    wanted = expected(case, rows)
    torch.testing.assert_close(found.cpu(), wanted, atol=TOLERANCE[kind], rtol=TOLERANCE[kind])


#: rows of one page share choices of two; some of the first are from an earlier step
SHARING = {
    "decode": [(61, 1, 1), (90, 1, 1), (300, 1, 1), (63, 1, 1)],
    "nobody chooses anew": [(61, 1, 1), (91, 1, 1)],
    "chunks": [(61, 1, 1), (0, 9, 0), (90, 1, 1), (41, 6, 5), (44, 9, 9), (33, 1, 0)],
}


def on_device(case: Case, rows: SelectedRows) -> SelectedRows:
    """The same step with its page tables on the device."""
    step = replace(
        rows.step, table=torch.from_numpy(rows.table.ravel().astype(np.int32)).to(DEVICE),
        page_indptr=np.arange(len(case.tables)) * rows.table.shape[1],
    )  # fmt: skip
    return replace(rows, step=step)


def on_host(case: Case, rows: SelectedRows, memory: Tensor, choose: Any) -> Tensor:
    """What the plan for any backend makes of it; `memory` is brought up to date."""
    backend = Reference()
    cache, (q, k, v) = fill(case, backend)
    sketch = torch.zeros(case.n_pages, k.shape[1], 2, k.shape[2])
    plan = GatheringPlan(backend, rows, torch.device("cpu"))
    return plan.run(cache, Book(sketch, memory), q, k, v, choose)


@pytest.mark.parametrize("step", SHARING)
def test_shared_choices(step: str) -> None:
    spans = SHARING[step]
    rng = np.random.default_rng(7)
    case = make_case(rng, [(a, n) for a, n, _ in spans], PAGE, 8, 2, 32, torch.float32)
    rows, memory = remembered(rng, case, select(case, [n for _, _, n in spans], 7), 2, 2)
    there = memory.to(DEVICE, copy=True)
    wanted = on_host(case, rows, memory, bounds_choose)
    backend: Any = TritonAttention()
    cache, (q, k, v) = fill(case, backend, DEVICE)
    sketch = torch.zeros(case.n_pages, 2, 2, 32, device=DEVICE)
    plan = backend.selected(on_device(case, rows))
    for _ in range(2):  # the first layer lays it out
        found = plan.run(cache, Book(sketch, there), q, k, v, never)
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(there.cpu()[:, :, :7], memory[:, :, :7])


@pytest.mark.parametrize("step", ["decode", "nobody chooses anew"])
@pytest.mark.parametrize("remembers", [True, False])
def test_captured_choices(step: str, remembers: bool) -> None:
    """The plan of fixed launches, with room for more rows than there are."""
    spans = SHARING[step]
    rng = np.random.default_rng(8)
    case = make_case(rng, [(a, n) for a, n, _ in spans], PAGE, 8, 2, 32, torch.float32)
    rows, memory = remembered(rng, case, select(case, [n for _, _, n in spans], 7), 2, 2)
    if not remembers:
        some = np.arange(len(spans))
        rows = replace(rows, anew=some >= 0, places=some, remembers=False)
    once = [table[(a + n) // PAGE - 1] for table, (a, n, _) in zip(case.tables, spans)]
    there = memory.to(DEVICE, copy=True)
    wanted = on_host(case, rows, memory, bounds_choose)
    backend: Any = TritonAttention()
    cache, (q, k, v) = fill(case, backend, DEVICE)
    sketch = torch.zeros(case.n_pages, 2, 2, 32, device=DEVICE)
    for page in range(case.n_pages):  # what the steps before have left
        keys = backend.keys(cache, torch.arange(page * PAGE, (page + 1) * PAGE, device=DEVICE))
        sketch[page] = torch.stack((keys.amin(0), keys.amax(0)), 1)
    rows = on_device(case, replace(rows, whole=np.array(once, np.int64)))
    plan = backend.selected_graph_plan(8, 8, 2, 32, rows)
    arrays = {name: np.zeros(size, np.int32) for name, size in plan.sizes.items()}
    plan.fill(rows, arrays)
    inputs = {name: torch.from_numpy(array).to(DEVICE) for name, array in arrays.items()}
    plan.bind(inputs, rows.step.table)
    book = Book(sketch, there if remembers else None)
    padded = [torch.cat([x, x.new_zeros(8 - len(x), *x.shape[1:])]) for x in (q, k, v)]
    found = plan.run(cache, book, *padded, never)[: len(q)]
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(there.cpu()[:, :, :7], memory[:, :, :7]) or not remembers


def test_other_parts_score_all_their_rows_together() -> None:
    """Beside rows that choose by the bounds."""
    spans = STEPS["some see all"]
    rng = np.random.default_rng(9)
    case = make_case(rng, [(a, n) for a, n, _ in spans], PAGE, 8, 2, 32, torch.float32)
    rows = select(case, [n for _, _, n in spans], 7)
    rows = replace(rows, odd=np.array([1, 2, 4]))
    calls = list[list[int]]()

    def choose(which: Any, q: Tensor, sketch: Tensor, table: Tensor) -> Tensor:
        calls.append(which.tolist())
        lots = (torch.arange(table.shape[1], device=q.device) * 37.719).sin()
        odd = torch.tensor([bool(i in (1, 2, 4)) for i in which.tolist()], device=q.device)
        bounds = bounds_choose(which, q, sketch, table)
        return torch.where(odd[:, None, None], lots, bounds)

    wanted = on_host(case, rows, torch.zeros(0), choose)
    assert calls == [[i] for i in range(len(rows.rows))]
    backend: Any = TritonAttention()
    cache, (q, k, v) = fill(case, backend, DEVICE)
    sketch = torch.zeros(case.n_pages, 2, 2, 32, device=DEVICE)
    calls.clear()
    plan = backend.selected(on_device(case, rows))
    found = plan.run(cache, Book(sketch), q, k, v, choose)
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-4, rtol=1e-4)
    assert calls == [[1, 2, 4]]


def test_ties_go_to_the_first_and_nothing_twice() -> None:
    """Equal scores: the lists are ascending, and of the right length."""
    from kvarn.kernels.triton.select import pick_pages

    counts = torch.tensor([40, 300, 12], dtype=torch.int32, device=DEVICE)
    keeps = torch.tensor([7, 130, 11], dtype=torch.int32, device=DEVICE)
    scores = torch.zeros(3, 2, 300, device=DEVICE)
    scores[1, 1, 100:120] = -1.0
    table = torch.arange(1000, dtype=torch.int32, device=DEVICE)
    entries = torch.tensor([0, 100, 500], dtype=torch.int32, device=DEVICE)
    chosen = torch.full((3, 2, 130), -1, dtype=torch.int32, device=DEVICE)
    places = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    args = (scores, table, entries, counts, keeps, places, chosen, 300, 130, 2, 512)
    pick_pages[(6,)](*args, num_warps=4)
    assert chosen[0, 0, :7].tolist() == [0, 1, 2, 3, 4, 5, 39]
    assert chosen[2, 1, :11].tolist() == [*range(500, 510), 511]
    assert chosen[1, 1, :130].tolist() == [*range(100, 200), *range(220, 249), 399]
    assert (chosen[0, :, 7:] == -1).all()
