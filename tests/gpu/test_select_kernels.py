"""Selection on a GPU against masks in fp32: the same pages, the same attention.

`TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_select_kernels.py` runs it without a GPU.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch
from unit.test_attention import make_case
from unit.test_selected import PAGE, expected, fill, select

pytest.importorskip("triton")

from kvarn.kernels.attention.selected import never
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
    found = backend.selected(rows).run(cache, sketch, q, k, v, never)
    wanted = expected(case, rows)
    torch.testing.assert_close(found.cpu(), wanted, atol=TOLERANCE[kind], rtol=TOLERANCE[kind])


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
    pick_pages[(6,)](scores, table, entries, counts, keeps, chosen, 300, 130, 2, 512, num_warps=4)
    assert chosen[0, 0, :7].tolist() == [0, 1, 2, 3, 4, 5, 39]
    assert chosen[2, 1, :11].tolist() == [*range(500, 510), 511]
    assert chosen[1, 1, :130].tolist() == [*range(100, 200), *range(220, 249), 399]
    assert (chosen[0, :, 7:] == -1).all()
