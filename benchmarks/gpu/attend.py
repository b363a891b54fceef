"""The attention kernels alone: are they right, and how fast in each shape of tile?

    PYTHONPATH=. python benchmarks/gpu/attend.py

Prompts and chunks through `attend_hopper` and `attend` beside cuDNN, decodes at the shapes of the
workloads, with caches of bf16 and fp8.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.testing import do_bench

from kvarn.kernels.triton.attend import attend
from kvarn.kernels.triton.attend_hopper import attend_hopper

LOG2E = 1.4426950408889634


@dataclass(slots=True)
class Step:
    """Spans of (start, rows) with a cache of random pages."""

    spans: list[tuple[int, int]]
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page: int = 16
    kind: torch.dtype = torch.bfloat16
    copies: int = 1  #: caches, to rotate past the L2 cache

    def tensors(self) -> tuple[Tensor, list[Tensor], Tensor, list[int]]:
        """q, caches, pages, first page of each span."""
        counts = [-(-(start + n) // self.page) for start, n in self.spans]
        first = [0, *itertools.accumulate(counts)]
        pages = torch.from_numpy(np.random.default_rng(0).permutation(first[-1])).int().cuda()
        shape = (first[-1], self.kv_heads, 2, self.page, self.dim)
        torch.manual_seed(0)
        caches = [torch.randn(shape, device="cuda").to(self.kind) for _ in range(self.copies)]
        rows = sum(n for _, n in self.spans)
        q = torch.randn(rows, self.heads, self.dim, device="cuda", dtype=torch.bfloat16)
        return q, caches, pages, first

    def items(self, height: int, limit: int) -> tuple[Tensor, int]:
        """Work items, most KV first, cut at `limit` positions; number of partial rows."""
        found, row, parts = [], 0, 0
        first = 0
        for start, rows in self.spans:
            for skip in range(0, rows, height):
                n = min(height, rows - skip)
                high = start + skip + n
                pieces = -(-high // limit)
                for i in range(pieces):
                    part = -1
                    if pieces > 1:
                        part, parts = parts, parts + n
                    ends = i * limit, min(high, (i + 1) * limit)
                    found.append((row + skip, n, start + skip, first, 0, *ends, part))
            row += rows
            first += -(-(start + rows) // self.page)
        found.sort(key=lambda item: item[5] - item[6])
        return torch.tensor(found, dtype=torch.int32).cuda(), parts


def launcher(step: Step, height: int, limit: int, window: int = 0, cap: float = 0.0) -> Any:
    """A function of a shape of tile that returns calls, one a cache, and their outputs."""
    q, caches, pages, _ = step.tensors()
    items, parts = step.items(height, limit)
    o = torch.full_like(q, float("nan"))
    lse = torch.full(q.shape[:2], float("nan"), device="cuda")
    part_o = torch.empty(max(parts, 1), step.heads, step.dim, device="cuda")
    part_lse = torch.empty(max(parts, 1), step.heads, device="cuda")
    scale = step.dim**-0.5 * LOG2E if not cap else step.dim**-0.5 / cap
    fixed = (step.kv_heads, step.heads // step.kv_heads, step.dim, step.page, window, cap > 0)
    n = len(items)

    def hopper(block_n: int, stages: int, inner: int, most: int = 132) -> list[Callable[[], None]]:
        layout = gl.NVMMASharedLayout(128, 16, 2)
        calls = []
        for cache in caches:
            rows = cache.numel() // step.dim
            boxes = TensorDescriptor(
                cache, [rows, step.dim], [step.dim, 1], [step.page, 64], layout
            )
            calls.append(
                lambda boxes=boxes: attend_hopper[(min(n * step.kv_heads, most),)](
                    q, boxes, items, pages, o, lse, part_o, part_lse, q.stride(0), q.stride(1),
                    scale, cap * LOG2E, n, inner, *fixed, True, block_n, stages, num_warps=4,
                )
            )  # fmt: skip
        return calls

    def plain(m: int, block_n: int, warps: int, stages: int) -> list[Callable[[], None]]:
        return [
            lambda cache=cache: attend[(n * step.kv_heads,)](
                q, cache, items, pages, o, lse, part_o, part_lse, q.stride(0), q.stride(1),
                scale, cap * LOG2E, *fixed, True, m, block_n, step.dim, "tf32", stages,
                num_warps=warps,
            )
            for cache in caches
        ]  # fmt: skip

    return hopper, plain, (q, caches[0], pages, o, lse, part_o, part_lse, items)


def reference(
    step: Step, q: Tensor, cache: Tensor, pages: Tensor, window: int, cap: float
) -> Tensor:
    """fp32, one span at a time."""
    outs, row, first = [], 0, 0
    for start, n in step.spans:
        end = start + n
        count = -(-end // step.page)
        seen = cache[pages[first : first + count].long()].float()
        kv = seen.permute(2, 1, 0, 3, 4).reshape(2, step.kv_heads, -1, step.dim)[:, :, :end]
        k, v = kv.repeat_interleave(step.heads // step.kv_heads, 1)
        scores = q[row : row + n].float().transpose(0, 1) @ k.transpose(1, 2) * step.dim**-0.5
        if cap:
            scores = cap * torch.tanh(scores / cap)
        at = torch.arange(end, device="cuda")
        mine = start + torch.arange(n, device="cuda")
        visible = at[None] <= mine[:, None]
        if window:
            visible &= at[None] > mine[:, None] - window
        scores.masked_fill_(~visible, float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        row, first = row + n, first + count
    return torch.cat(outs)


DECODES = [
    (16, 64, 2, 3), (16, 64, 2, 4), (16, 64, 4, 4), (16, 128, 4, 2), (16, 128, 4, 3),
]  # fmt: skip
CHECKS: list[dict[str, Any]] = [
    {"dim": 128}, {"dim": 64}, {"dim": 128, "page": 64}, {"dim": 64, "page": 32},
    {"dim": 128, "window": 100}, {"dim": 128, "cap": 20.0, "window": 300}, {"heads": 56},
    {"heads": 8}, {"limit": 256}, {"block_n": 64, "stages": 4},
    {"dim": 64, "block_n": 64, "stages": 6}, {"dim": 64, "stages": 3},
]  # fmt: skip


def check(options: dict[str, Any]) -> str:
    """The largest relative error of one form on ragged spans; also fills the compiler's cache."""
    options = dict(options)
    began = time.perf_counter()
    window, cap = options.pop("window", 0), options.pop("cap", 0.0)
    limit = options.pop("limit", 1 << 20)
    block_n, stages = options.pop("block_n", 128), options.pop("stages", 0)
    spans = [(0, 300), (700, 129), (5, 40), (1000, 65), (0, 1), (0, 1024)]
    step = Step(spans, **options)
    stages = stages or (2 if step.dim == 128 else 4)
    height = 128 // (step.heads // step.kv_heads)
    with torch.inference_mode():
        hopper, _, (q, cache, pages, o, _, part_o, part_lse, items) = launcher(
            step, height, limit, window, cap
        )
        wanted = reference(step, q, cache, pages, window, cap)
        _poison(step, cache, pages)
        hopper(block_n, stages, step.kv_heads)[0]()
        found = o.float()
        if limit < 1 << 20:
            found = _merged(items, o, part_o, part_lse)
        error = ((found - wanted).norm() / wanted.norm()).item()
        worst = (found - wanted).abs().max().item()
    return f"error {error:.2e} worst {worst:.2e} in {time.perf_counter() - began:.1f} s"


def _poison(step: Step, cache: Tensor, pages: Tensor) -> None:
    first = 0
    for start, n in step.spans:
        end = start + n
        count = -(-end // step.page)
        if end % step.page:
            cache[pages[first + count - 1].long(), :, :, end % step.page :] = float("nan")
        first += count


def _merged(items: Tensor, o: Tensor, part_o: Tensor, part_lse: Tensor) -> Tensor:
    rows: dict[int, list[int]] = {}
    for row, n, _, _, _, _, _, part in items.tolist():
        for i in range(n if part >= 0 else 0):
            rows.setdefault(row + i, []).append(part + i)
    found = o.float()
    for row, slots in rows.items():
        weights = part_lse[slots].softmax(0)
        found[row] = (weights[..., None] * part_o[slots]).sum(0)
    return found


def timed(calls: list[Callable[[], None]], budget: int = 40) -> float:
    """Median ms of a call, the L2 cache cleared before each."""
    return float(do_bench(calls[0], warmup=10, rep=budget, return_mode="median"))


def graphed(calls: list[Callable[[], None]], rounds: int) -> float:
    """ms of a call inside a CUDA graph that goes round all caches."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.05:  # until the clocks are up
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(9):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / rounds / len(calls))
    return float(np.median(times))


def flops(step: Step) -> float:
    """Of what causality leaves."""
    seen = sum(n * start + n * (n + 1) / 2 for start, n in step.spans)
    return 4 * step.heads * step.dim * seen


def contiguous(step: Step, q: Tensor) -> Callable[[], Tensor]:
    """cuDNN on as many equal prompts."""
    n = step.spans[0][1]
    shape = (len(step.spans), n, step.kv_heads, step.dim)
    k, v = (torch.randn(shape, device="cuda", dtype=q.dtype).transpose(1, 2) for _ in range(2))
    q = q.view(len(step.spans), n, step.heads, step.dim).transpose(1, 2)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v, is_causal=True, enable_gqa=True)

    return call


def prompts() -> None:
    """TFLOP/s of prompts and chunks."""
    cases = {
        "4x8192": ([(0, 8192)] * 4, 128), "16x1024": ([(0, 1024)] * 16, 128),
        "2048@6144": ([(6144, 2048)], 128), "4x8192 d64": ([(0, 8192)] * 4, 64),
        "16x1024 d64": ([(0, 1024)] * 16, 64), "1x128": ([(0, 128)], 128),
    }  # fmt: skip
    for name, (spans, dim) in cases.items():
        step = Step(spans, dim=dim)
        hopper, plain, (q, cache, _, o, *_) = launcher(step, 32, 1 << 20)
        work = flops(step)
        plain(128, 64, 4, 3 if dim == 128 else 5)[0]()
        before = o.clone()
        line = {"triton": round(work / timed(plain(128, 64, 4, 3 if dim == 128 else 5)) / 1e9)}
        shape = (128, 2) if dim == 128 else (128, 4)
        for inner, most in itertools.product((1, 2, 8), (132, 1 << 20)):
            ms = timed(hopper(*shape, inner, most))
            label = f"hopper/{inner}" + ("" if most == 132 else " a program a tile")
            line[label] = round(work / ms / 1e9)
        line["difference"] = ((o - before).float().norm() / before.float().norm()).item()
        if spans[0][0] == 0 and len(spans) > 1:
            line["cudnn"] = round(work / timed([contiguous(step, q)]) / 1e9)
        print(name, line, flush=True)
        del q, cache, o, before
        torch.cuda.empty_cache()


def decodes() -> None:
    """GB/s of decodes in graphs."""
    rng = np.random.default_rng(1)
    ragged = [(int(n), 1) for n in rng.integers(100, 2000, 256)]
    fp8 = torch.float8_e4m3fn
    cases = {
        "64x8192": Step([(8191, 1)] * 64),
        "64x8192 fp8": Step([(8191, 1)] * 64, kind=fp8),
        "64x8192 d64": Step([(8191, 1)] * 64, dim=64),
        "W1 16/8 d128": Step(ragged, heads=16),
        "W1 32/8 d64": Step(ragged, dim=64),
        "W2 64x1152": Step([(1151, 1)] * 64),
        "W2 64x1152 fp8": Step([(1151, 1)] * 64, kind=fp8),
        "W3 1x384": Step([(383, 1)], copies=32),
    }
    for name, step in cases.items():
        wide = 1 if step.kind == fp8 else 2
        size = sum(start + 1 for start, _ in step.spans) * step.kv_heads * step.dim * 2 * wide
        step.copies = max(step.copies, int(2e8 // size) + 1)
        limits = (64, 128, 1 << 20) if "W3" in name else (1 << 20,)
        line = {}
        for limit in limits:
            plain = launcher(step, 1, limit)[1]
            for shape in DECODES:
                ms = graphed(plain(*shape), 1 if size > 5e8 else 4)
                label = f"{limit}:{'/'.join(map(str, shape[1:]))}"
                line[label] = (round(size / ms / 1e6), round(ms * 1e3, 1))
        best = sorted(line.items(), key=lambda row: -row[1][0])[:6]
        now = {label: rate for label, rate in line.items() if label.endswith(":64/2/4")}
        print(name, f"{size / 1e6:.0f} MB", best, "now", now, flush=True)
        torch.cuda.empty_cache()


def main() -> int:
    """Checks in processes beside each other, then the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("check", "prompts", "decodes"))
    only = parser.parse_args().only
    began = time.perf_counter()
    with ProcessPoolExecutor(12) as pool:
        checks = CHECKS if only in (None, "check") else []
        waiting = [(options, pool.submit(check, options)) for options in checks]
        for options, future in waiting:
            try:
                print(options, future.result(timeout=60), flush=True)
            except Exception as error:
                print(options, "failed:", type(error).__name__, str(error)[:300], flush=True)
    print(f"checked in {time.perf_counter() - began:.1f} s", flush=True)
    for part in (prompts, decodes):
        if only not in (None, part.__name__):
            continue
        try:
            with torch.inference_mode():
                part()
        except Exception as error:
            print(part.__name__, "failed:", type(error).__name__, str(error)[:600], flush=True)
        print(f"{part.__name__} by {time.perf_counter() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
