"""A few small launches of every attention and KV-write kernel, for compute-sanitizer.

PYTHONPATH=. compute-sanitizer --tool memcheck python benchmarks/gpu/sanitize.py
PYTHONPATH=. compute-sanitizer --tool racecheck python benchmarks/gpu/sanitize.py

racecheck names two lines of `attend_hopper`, its head and its `warp_specialize`: there Triton hands
the groups of warps their work through shared memory. The code it makes has barriers of the whole
block around that, which the groups reach in different places, so these reports are taken to be
false, which is not proven. Any other line is to be looked into.
"""

import sys

import numpy as np
import torch

from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.triton import TritonAttention

SPANS = [(0, 70), (100, 33), (5, 1), (700, 1), (0, 1)]
PAGE = 16


def rows_of(window: int | None, softcap: float | None, dim: int) -> PagedRows:
    """The spans over pages in random order."""
    starts, lengths = (np.array(x) for x in zip(*SPANS))
    counts = -(-(starts + lengths) // PAGE)
    page_indptr = np.cumsum([0, *counts])
    pages = np.random.default_rng(0).permutation(int(page_indptr[-1]))
    slots = [
        pages[first + np.arange(s, s + n) // PAGE] * PAGE + np.arange(s, s + n) % PAGE
        for first, s, n in zip(page_indptr, starts, lengths)
    ]
    return PagedRows(
        indptr=np.cumsum([0, *lengths]), start=starts, page_indptr=page_indptr, pages=pages,
        base=np.zeros(len(starts), np.int64), slots=np.concatenate(slots), page_size=PAGE,
        scale=dim**-0.5, window=window, softcap=softcap,
    )  # fmt: skip


def main() -> int:
    """Every form once; tensors of exactly the size that the kernels may touch."""
    device = torch.device("cuda")
    for dim, group, window, softcap in ((128, 4, None, None), (64, 2, 40, 20.0)):
        backend = TritonAttention()
        rows = rows_of(window, softcap, dim)
        n_pages = int(rows.page_indptr[-1])
        kind = {"dtype": torch.bfloat16, "device": device}
        cache = backend.allocate(1, n_pages, PAGE, 2, dim, torch.bfloat16, device)[0]
        q = torch.randn(int(rows.indptr[-1]), 2 * group, dim, **kind)
        k, v = (torch.randn(len(q), 2, dim, **kind) for _ in range(2))
        for lse in (False, True):
            o, _ = backend.plan(rows, lse).run(cache, q, k, v)
            torch.cuda.synchronize()
            assert not o.isnan().any()
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
