"""Micro-benchmark of the attention backends: `python -m kvarn.kernels.attention.bench`."""

from typing import Any

import numpy as np
import torch

from kvarn.core.part import find
from kvarn.kernels import native
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.timing import compare

PAGE = 16  #: positions of a page
HEADS, KV_HEADS, DIM = 9, 3, 64  #: of SmolLM2-135M
LOADS = {
    "decode, 192 positions": [(192, 1)],
    "decode, 4096 positions": [(4096, 1)],
    "16 x decode, 192 positions": [(192, 1)] * 16,
    "prompt of 512": [(0, 512)],
    "chunk of 256 after 1792": [(1792, 256)],
    "15 x decode and a prompt of 497": [(192, 1)] * 15 + [(0, 497)],
}


def rows_of(spans: list[tuple[int, int]]) -> PagedRows:
    """Spans (start, length) of sequences with pages of their own, one after the other."""
    counts = [-(-(start + length) // PAGE) for start, length in spans]
    first = np.cumsum([0, *counts])
    slots = [at * PAGE + np.arange(s, s + n) for at, (s, n) in zip(first, spans)]
    return PagedRows(
        indptr=np.cumsum([0, *(n for _, n in spans)]),
        start=np.array([s for s, _ in spans], np.int64),
        page_indptr=first,
        pages=np.arange(first[-1]),
        base=np.zeros(len(spans), np.int64),
        slots=np.concatenate(slots),
        page_size=PAGE,
        scale=DIM**-0.5,
    )


def bench() -> None:
    """One layer of each load, bf16, by each fast backend."""
    names = ["cpu", *(["native"] if native.available() else [])]
    for title, spans in LOADS.items():
        rows = rows_of(spans)
        q, k, v = (
            torch.randn(len(rows.slots), heads, DIM).bfloat16()
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        forms = {}
        for name in names:
            backend: Any = find("attention", name)()
            cache = backend.allocate(
                1, int(rows.page_indptr[-1]), PAGE, KV_HEADS, DIM, torch.bfloat16,
                torch.device("cpu"),
            )[0]  # fmt: skip
            plan = backend.plan(rows)
            forms[name] = lambda p=plan, c=cache, q=q, k=k, v=v: p.run(c, q, k, v)
        compare(title, **forms)


if __name__ == "__main__":
    bench()
