"""What choosing pages costs and saves in one layer's attention, on one NVIDIA GPU.

    PYTHONPATH=. python benchmarks/gpu/select_pages.py [--json FILE]

32 query and 8 KV heads of 128, bf16, pages of 16 in random order. The launches of several layers
are captured in one CUDA graph, so that no layer finds its KV in the L2 cache; times are medians a
layer. Dense attention is the engine's own paged kernel. The parts are timed cumulatively: the
bounds, then the bounds and the pick, then all.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kvarn.bench import record
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.selected import SelectedRows
from kvarn.kernels.attention.triton import TritonAttention
from kvarn.kernels.attention.triton_plan import TritonPlan, attend_all
from kvarn.kernels.attention.triton_selected import TritonSelectedPlan

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
LAYERS, REPLAYS = 4, 9
CASES = [(1, 32768, 2048), (8, 32768, 2048), (8, 32768, 4096), (16, 32768, 4096), (8, 8192, 1024)]


def steps(batch: int, length: int, budget: int) -> tuple[PagedRows, SelectedRows]:
    """One decode row of each of `batch` sequences: seeing all, and choosing."""
    count = -(-length // PAGE)
    width = count + 1
    pages = np.random.default_rng(0).permutation(batch * count).astype(np.int32)
    table = np.zeros((batch, width), np.int32)
    table[:, :count] = pages.reshape(batch, count)
    start = np.full(batch, length - 1)
    each = np.arange(batch)
    rows = PagedRows(
        indptr=np.arange(batch + 1), start=start, page_indptr=each * width, pages=each[:0],
        base=np.zeros(batch, np.int64), slots=start * 0, page_size=PAGE, scale=DIM**-0.5,
        table=torch.from_numpy(table.ravel()).cuda(),
    )  # fmt: skip
    at = start // PAGE
    chosen = SelectedRows(
        rows, each, each[:0], at + 1, start % PAGE + 1, np.full(batch, budget // PAGE), table, each,
        each[:0],
    )  # fmt: skip
    return rows, chosen


def timed(layer: Callable[[int], object]) -> float:
    """Microseconds of one layer, by replays of a graph over all."""
    for i in range(LAYERS):
        layer(i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAYERS):
            layer(i)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / LAYERS)
    return float(np.median(times))


def case(backend: TritonAttention, batch: int, length: int, budget: int) -> dict[str, Any]:
    """One setting."""
    rows, chosen = steps(batch, length, budget)
    n_pages = batch * -(-length // PAGE)
    device = torch.device("cuda")
    caches = backend.allocate(LAYERS, n_pages, PAGE, KV_HEADS, DIM, torch.bfloat16, device)
    sketches = [torch.empty(n_pages, KV_HEADS, 2, DIM, device=device, dtype=torch.bfloat16)
                for _ in caches]  # fmt: skip
    for cache, sketch in zip(caches, sketches):
        cache.normal_()
        sketch[:, :, 0] = cache[:, :, 0].amin(2)
        sketch[:, :, 1] = cache[:, :, 0].amax(2)
    q = torch.randn(batch, HEADS, DIM, dtype=torch.bfloat16, device=device)
    dense = TritonPlan(rows, False, backend.multiprocessors)
    there = dense.ready(HEADS, KV_HEADS, DIM, q)
    plan = TritonSelectedPlan(chosen, backend.multiprocessors)
    plan.bring(sketches[0])
    found = {
        "dense_us": timed(lambda i: attend_all(rows, there, caches[i], q, False)),
        "bounds_us": timed(lambda i: plan.score(sketches[i], q)),
        "pick_us": timed(lambda i: (plan.score(sketches[i], q), plan.pick())),
        "whole_us": timed(lambda i: plan.attend(caches[i], sketches[i], q)),
    }
    found["times_faster"] = found["dense_us"] / found["whole_us"]
    ideal = 1 / (1 / PAGE + budget / length)
    return {"batch": batch, "length": length, "budget": budget, "ideal": ideal} | found


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    backend = TritonAttention()
    results = []
    for batch, length, budget in CASES:
        results.append(case(backend, batch, length, budget))
        print({k: round(v, 2) for k, v in results[-1].items()}, flush=True)
        torch.cuda.empty_cache()
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "page_size": PAGE}
    record.write(record.header("select", shape, {}) | {"results": results}, given.json)


if __name__ == "__main__":
    main()
