"""How attention is planned: balance, shared prefixes and captured steps, on one NVIDIA GPU.

    PYTHONPATH=. python benchmarks/gpu/attention_plans.py [--json FILE]

32 query and 8 KV heads of 128, bf16, pages of 16 in random order. One layer's launches (attention
and merge, no KV write) are captured in a CUDA graph over as many layers as it takes to read more
than the L2 cache holds; times are medians per layer.
"""

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kvarn.bench import record
from kvarn.kernels.attention import PagedRows, layout
from kvarn.kernels.attention.triton import TritonAttention
from kvarn.kernels.attention.triton_plan import TritonPlan, attend_all

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
LAYERS, REPLAYS = 6, 7
NEVER = 1 << 40


def rows_of(lengths: list[int], shared: int = 0) -> PagedRows:
    """One decode row for each length; the first `shared` positions are the same pages."""
    counts = [-(-length // PAGE) for length in lengths]
    free = np.random.default_rng(0).permutation(sum(counts))
    tables = np.split(free, np.cumsum(counts)[:-1])
    for table in tables[1:]:
        table[: shared // PAGE] = tables[0][: shared // PAGE]
    start = np.array(lengths) - 1
    rows = PagedRows(
        indptr=np.arange(len(lengths) + 1), start=start, page_indptr=np.cumsum([0, *counts]),
        pages=np.concatenate(tables), base=np.zeros(len(lengths), np.int64), slots=start * 0,
        page_size=PAGE, scale=DIM**-0.5,
    )  # fmt: skip
    if shared:
        rows.shared = np.array([[0, len(lengths), shared]])
    return rows


class Bench:
    """One set of caches, large enough for every case."""

    def __init__(self, positions: int) -> None:
        self.backend = TritonAttention()
        self.caches = self.backend.allocate(
            LAYERS, positions // PAGE, PAGE, KV_HEADS, DIM, torch.bfloat16, torch.device("cuda")
        )
        for cache in self.caches:
            cache.normal_()

    def time(self, rows: PagedRows) -> tuple[float, torch.Tensor]:
        """Microseconds a layer, and o of the first."""
        q = torch.randn(
            len(rows.slots), HEADS, DIM, dtype=torch.bfloat16, device="cuda",
            generator=torch.Generator("cuda").manual_seed(0),
        )  # fmt: skip
        plan = TritonPlan(rows, False, self.backend.multiprocessors)
        there = plan.ready(HEADS, KV_HEADS, DIM, q)
        first = attend_all(rows, there, self.caches[0], q, False)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for cache in self.caches:
                attend_all(rows, there, cache, q, False)
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / LAYERS)
        return float(np.median(times)), first

    def whole(self, rows: PagedRows) -> tuple[float, torch.Tensor]:
        """One program a request and KV head."""
        least, layout.DECODE_LEAST = layout.DECODE_LEAST, NEVER
        try:
            return self.time(rows)
        finally:
            layout.DECODE_LEAST = least

    def forced(self, rows: PagedRows) -> tuple[float, torch.Tensor]:
        """Shared prefixes read once, however short."""
        least, layout.SHARED_BYTES = layout.SHARED_BYTES, 0
        try:
            return self.time(rows)
        finally:
            layout.SHARED_BYTES = least


def balanced(bench: Bench) -> list[dict[str, Any]]:
    """Lengths as they come, a program for each, and cut so that all programs have as much to do."""
    found = []
    for name, lengths in {
        "one of 64K, 15 of 1K": [65536] + [1024] * 15,
        "16 of 4K": [4096] * 16,
        "64 of 1K": [1024] * 64,
        "132 of 1K": [1024] * 132,
        "ragged 128": np.random.default_rng(1).integers(100, 2000, 128).tolist(),
    }.items():
        rows = rows_of(lengths)
        (whole, _), (cut, _) = bench.whole(rows), bench.time(rows)
        found.append({"case": name, "whole_us": whole, "cut_us": cut, "times": whole / cut})
        print(found[-1], flush=True)
    return found


def cascades(bench: Bench) -> list[dict[str, Any]]:
    """Prefixes read by each of those who share them, once for all, and as the plan chooses."""
    found = []
    for sharers, prefix in [(32, 8192), (1, 8192), (2, 1024), (8, 1024), (32, 256), (32, 1024)]:
        rows = rows_of([prefix + 256] * sharers, prefix)
        (flat, a), (chosen, _), (once, b) = (
            bench.time(replace(rows, shared=None)), bench.time(rows), bench.forced(rows),
        )  # fmt: skip
        difference = float((a.float() - b.float()).abs().max())
        found.append({
            "sharers": sharers, "prefix": prefix, "flat_us": flat, "once_us": once,
            "chosen_us": chosen, "times": flat / chosen, "difference": difference,
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    bench = Bench(32 * 8448 + 64)
    said = {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "page": PAGE, "layers": LAYERS}
    results = {"balanced": balanced(bench), "shared": cascades(bench)}
    record.write(record.header("attention_plans", said, {}) | results, given.json)


if __name__ == "__main__":
    main()
