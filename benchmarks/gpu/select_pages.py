"""What choosing pages costs and saves in one layer's attention, on one NVIDIA GPU.

    PYTHONPATH=. python benchmarks/gpu/select_pages.py [--json FILE]

32 query and 8 KV heads of 128, bf16, pages of 16 in random order. The launches of several layers
are captured in one CUDA graph, so that no layer finds its KV in the L2 cache; times are medians a
layer. Dense attention is the engine's own paged kernel. The parts are timed cumulatively: the
bounds, then the bounds and the pick, then all. The same where a choice serves four rows: a step in
which a quarter of the rows choose (one of four where there is but one row, averaged), and one in
which none does.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kvarn.bench import record
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.selected import Book, SelectedRows, never
from kvarn.kernels.attention.triton import TritonAttention
from kvarn.kernels.attention.triton_plan import TritonPlan, attend_all
from kvarn.kernels.attention.triton_selected import TritonSelectedPlan

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
LAYERS, REPLAYS, REUSE = 4, 9, 4
CASES = [(1, 32768, 2048), (8, 32768, 2048), (8, 32768, 4096), (16, 32768, 4096), (8, 8192, 1024)]


def steps(batch: int, length: int, budget: int) -> tuple[PagedRows, SelectedRows]:
    """One decode row of each of `batch` sequences: seeing all, and choosing anew."""
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
        each[:0], each >= 0, each, False, budget // PAGE, each[:0],
    )  # fmt: skip
    return rows, chosen


def shared(backend: TritonAttention, rows: SelectedRows, books: list[Book], choosing: int) -> Any:
    """A captured step in which the first `choosing` rows choose and all find lists in place."""
    n = len(rows.rows)
    anew = np.arange(n) < choosing
    rows = replace(rows, anew=anew, remembers=True)
    plan = backend.selected_graph_plan(n, HEADS, KV_HEADS, DIM, rows)
    arrays = {name: np.zeros(size, np.int32) for name, size in plan.sizes.items()}
    plan.fill(rows, arrays)
    there = {name: torch.from_numpy(array).cuda() for name, array in arrays.items()}
    plan.bind(there, rows.step.table)
    return plan


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
    books = []
    for cache in caches:
        cache.normal_()
        keys = cache[:, :, 0]
        lists = torch.zeros(batch, KV_HEADS, budget // PAGE, dtype=torch.int32, device=device)
        books.append(Book(torch.stack((keys.amin(2), keys.amax(2)), 2), lists))
    q = torch.randn(batch, HEADS, DIM, dtype=torch.bfloat16, device=device)
    dense = TritonPlan(rows, False, backend.multiprocessors)
    there = dense.ready(HEADS, KV_HEADS, DIM, q)
    plan = TritonSelectedPlan(chosen, backend.multiprocessors)
    plan.bring(books[0])
    found = {
        "dense_us": timed(lambda i: attend_all(rows, there, caches[i], q, False)),
        "bounds_us": timed(lambda i: plan.score(books[i].sketch, q)),
        "pick_us": timed(lambda i: (plan.score(books[i].sketch, q), plan.pick(plan.pages))),
        "whole_us": timed(lambda i: plan.attend(caches[i], books[i], q, never)),
    }
    every, some, nobody = (
        shared(backend, chosen, books, count) for count in (batch, -(-batch // REUSE), 0)
    )
    for name, step in (("every_us", every), ("some_us", some), ("nobody_us", nobody)):
        found[name] = timed(lambda i, step=step: step.attend(caches[i], books[i], q, never))
    alone = (found["every_us"] + (REUSE - 1) * found["nobody_us"]) / REUSE
    found["reuse_us"] = found["some_us"] if batch >= REUSE else alone
    found["times_faster"] = found["dense_us"] / found["whole_us"]
    found["times_faster_reuse"] = found["dense_us"] / found["reuse_us"]
    ideal, reused = (1 / (1 / PAGE / rows_ + budget / length) for rows_ in (1, REUSE))
    said = {"batch": batch, "length": length, "budget": budget, "reuse": REUSE}
    return said | {"ideal": ideal, "ideal_reuse": reused} | found


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
