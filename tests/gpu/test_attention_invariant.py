"""The batch-invariant Triton attention: right, and the same bits in any batch and chunking.

`TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_attention_invariant.py` runs it without a GPU.
"""

from typing import Any

import numpy as np
import pytest
import torch
from gpu.test_attention_triton import DEVICE, INTERPRETED, RAGGED, TOLERANCE, make, prepare
from torch import Tensor
from unit.test_attention import expected

pytest.importorskip("triton")

from kvarn.core.part import Cap, find
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.triton_invariant import TritonInvariant

SIZE = 16  #: of a page
MOST = 320  #: rows of other spans

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device_is_there() -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def finely_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short contexts are cut too, and few partial results are held."""
    monkeypatch.setattr("kvarn.kernels.attention.triton_invariant.CUT", 64)
    monkeypatch.setattr("kvarn.kernels.attention.triton_invariant.MOST_SLOTS", 64)


def test_it_claims_invariance() -> None:
    assert Cap.BATCH_INVARIANT in find("attention", "triton-invariant").gives


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 50},
        {"window": 500},
        {"window": 50, "sinks": 20},
        {"heads": 18, "softcap": 9.0},
    ],
)
def test_random_batches(options: dict[str, Any]) -> None:
    case = make(RAGGED, **options)
    backend = TritonInvariant()
    o, lse = backend.plan(case.rows, lse=True).run(*prepare(case, backend))
    wanted, wanted_lse = expected(case)
    near = TOLERANCE[torch.float32]
    assert lse is not None
    torch.testing.assert_close(o.cpu(), wanted, atol=near, rtol=near)
    torch.testing.assert_close(lse.cpu(), wanted_lse, atol=near, rtol=near)


@pytest.mark.skipif(INTERPRETED, reason="numpy's products are not those of a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40, 100])
def test_bitwise_the_same_under_any_chunking(dtype: torch.dtype, window: int | None) -> None:
    """A prompt computed whole, in chunks and by the end token by token, alone and beside others."""
    length = 330
    torch.manual_seed(1)
    q = torch.randn(length, 8, 64).to(DEVICE, dtype)
    k, v = torch.randn(2, length, 2, 64).to(DEVICE, dtype)
    whole = chunked(q, k, v, [length], window, None)
    for chunks in ([64, length - 64], [7] * (length // 7) + [length % 7], [length - 2, 1, 1]):
        for others in (None, np.random.default_rng(0)):
            o, lse = chunked(q, k, v, chunks, window, others)
            assert torch.equal(o, whole[0]), chunks[:3]
            assert torch.equal(lse, whole[1]), chunks[:3]


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: list[int],
    window: int | None,
    others: np.random.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A sequence computed chunk by chunk; `others` puts fresh spans before and after it."""
    backend = TritonInvariant()
    own, extra = -(-len(q) // SIZE), 20
    cache = backend.allocate(1, own + 2 * extra, SIZE, k.shape[1], k.shape[2], q.dtype, DEVICE)[0]
    outs, start = [], 0
    for n in chunks:
        before, after = others.integers(1, MOST, 2).tolist() if others else (0, 0)
        first = 0 if window is None else max(0, start - window + 1) // SIZE
        spans = [
            (0, before, 0, own + np.arange(extra)),
            (start, n, first, np.arange(first, own)),
            (0, after, 0, own + extra + np.arange(extra)),
        ]
        spans = [span for span in spans if span[1]]
        at = [(s + np.arange(m), f, t) for s, m, f, t in spans]
        rows = PagedRows(
            indptr=np.cumsum([0, *(m for _, m, _, _ in spans)]),
            start=np.array([s for s, _, _, _ in spans]),
            page_indptr=np.cumsum([0, *(len(t) for _, _, _, t in spans)]),
            pages=np.concatenate([t for _, _, _, t in spans]),
            base=np.array([f * SIZE for _, _, f, _ in spans]),
            slots=np.concatenate([t[p // SIZE - f] * SIZE + p % SIZE for p, f, t in at]),
            page_size=SIZE, scale=0.125, window=window,
        )  # fmt: skip

        def mixed(
            x: Tensor, b: int = before, a: int = after, lo: int = start, m: int = n
        ) -> Tensor:
            noise = [torch.randn(c, *x.shape[1:]).to(x) for c in (b, a)]
            return torch.cat((noise[0], x[lo : lo + m], noise[1]))

        o, lse = backend.plan(rows, lse=True).run(cache, mixed(q), mixed(k), mixed(v))
        assert lse is not None
        outs.append((o[before : before + n], lse[before : before + n]))
        start += n
    return torch.cat([o for o, _ in outs]), torch.cat([lse for _, lse in outs])
