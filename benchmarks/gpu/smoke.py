"""Does kvarn run on this GPU, and how fast? Tests, attention alone, and the engine offline.

    PYTHONPATH=. python benchmarks/gpu/smoke.py

Attention is measured as a layer calls it (KV write, attention, merges) beside torch's SDPA in the
same run; the engine runs random weights. `--sweep` also times other tile shapes.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from triton.testing import do_bench

import kvarn.kernels.attention.triton as backend
from kvarn import LLM, SamplingParams
from kvarn.bench.record import header, write
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.triton import Tiling, TritonAttention

HEADS, KV_HEADS, PAGE = 32, 8, 16
DECODES = [
    Tiling(16, n, warps, stages)
    for n, warps, stages in (
        (32, 2, 4), (32, 4, 3), (32, 4, 4), (64, 2, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4),
        (128, 4, 2), (128, 4, 3), (128, 8, 2), (128, 8, 3),
    )
]  # fmt: skip
CHUNKS = [
    Tiling(m, n, warps, stages)
    for m, n, warps, stages in (
        (128, 32, 4, 3), (128, 32, 4, 4), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 4, 5),
        (128, 64, 8, 3), (128, 128, 8, 3), (128, 128, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4),
    )
]  # fmt: skip


def median_ms(call: Callable[[], Any]) -> float:
    """Median time of a call on the device, the L2 cache cleared before each."""
    return float(do_bench(call, warmup=20, rep=150, return_mode="median"))


def rows_of(starts: list[int], lengths: list[int], dim: int, pages: np.ndarray) -> PagedRows:
    """Spans over pages in the given order."""
    ends = np.array(starts) + np.array(lengths)
    counts = -(-ends // PAGE)
    page_indptr = np.cumsum([0, *counts])
    slots = [
        pages[first + np.arange(s, e) // PAGE] * PAGE + np.arange(s, e) % PAGE
        for first, s, e in zip(page_indptr, starts, ends)
    ]
    return PagedRows(
        indptr=np.cumsum([0, *lengths]), start=np.array(starts), page_indptr=page_indptr,
        pages=pages, base=np.zeros(len(starts), np.int64), slots=np.concatenate(slots),
        page_size=PAGE, scale=dim**-0.5,
    )  # fmt: skip


class Case:
    """A batch of equal spans with its own cache; `call` is what a layer does."""

    def __init__(self, batch: int, context: int, length: int, dim: int) -> None:
        self.batch, self.context, self.length, self.dim = batch, context, length, dim
        n_pages = batch * context // PAGE
        pages = np.random.default_rng(0).permutation(n_pages)
        self.rows = rows_of([context - length] * batch, [length] * batch, dim, pages)
        self.attention = TritonAttention()
        where = torch.device("cuda")
        self.cache = self.attention.allocate(
            1, n_pages, PAGE, KV_HEADS, dim, torch.bfloat16, where
        )[0].normal_()
        rows, kind = batch * length, {"dtype": torch.bfloat16, "device": "cuda"}
        self.q = torch.randn(rows, HEADS, dim, **kind)
        self.k, self.v = (torch.randn(rows, KV_HEADS, dim, **kind) for _ in range(2))

    def call(self) -> Callable[[], Tensor]:
        """One layer's attention, planned before."""
        plan = self.attention.plan(self.rows)
        return lambda: plan.run(self.cache, self.q, self.k, self.v)[0]

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, L, d] for SDPA, after the step's KV is written."""
        table = torch.from_numpy(self.rows.pages).cuda().view(self.batch, -1)
        seen = self.cache[table].permute(3, 0, 2, 1, 4, 5).flatten(3, 4).contiguous()
        return self.q.view(self.batch, self.length, HEADS, -1).transpose(1, 2), seen[0], seen[1]

    def rate(self, ms: float) -> float:
        """GB/s of KV for decodes, TFLOP/s for prompts."""
        if self.length == 1:
            return 2 * self.batch * self.context * KV_HEADS * self.dim * 2 / ms / 1e6
        return 4 * self.batch * HEADS * self.context**2 * self.dim / 2 / ms / 1e9


def measure_attention(case: Case, sweep: list[Tiling]) -> dict[str, Any]:
    """kvarn and SDPA on the same KV, how far apart they are, and other tile shapes."""
    out = case.call()()
    q, k, v = case.contiguous()
    causal = case.length > 1
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        peer = sdpa(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
        peer_ms = median_ms(lambda: sdpa(q, k, v, is_causal=causal, enable_gqa=True))
    wanted = peer.reshape(out.shape).float()
    error = float((out.float() - wanted).norm() / wanted.norm())
    del peer, wanted
    ms = median_ms(case.call())
    found: dict[str, Any] = {
        "kvarn_ms": ms, "kvarn": case.rate(ms), "sdpa_cudnn_ms": peer_ms,
        "sdpa_cudnn": case.rate(peer_ms), "difference": error,
    }  # fmt: skip
    if sweep:
        found["sweep"] = sorted(
            (row for tiling in sweep for row in _tried(case, tiling)), key=lambda row: -row["rate"]
        )
    return found


def _tried(case: Case, tiling: Tiling) -> list[dict[str, Any]]:
    """The rate of a tile shape, for decodes with several ways to split."""
    kind = "decode" if case.length == 1 else "chunk"
    names = (f"{kind}_tiling", f"{kind.upper()}_WAVES")
    before = [getattr(backend, name) for name in names]
    rows = []
    try:
        setattr(backend, names[0], lambda dim, wide, group: tiling)
        for waves in (1, 4, 8, 16, 32) if kind == "decode" else before[1:]:
            setattr(backend, names[1], waves)
            rate = case.rate(median_ms(case.call()))
            shape = (tiling.block_m, tiling.block_n, tiling.warps, tiling.stages)
            rows.append({"tiling": shape, "waves": waves, "rate": round(rate, 1)})
    except Exception as error:  # a shape that the device has no room for
        rows.append({"tiling": str(tiling), "rate": 0.0, "error": str(error)[:200]})
    finally:
        for name, value in zip(names, before):
            setattr(backend, name, value)
    return rows


@triton.jit
def read(x, out, BLOCK: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * BLOCK * 16
    total = tl.zeros([BLOCK], tl.int32)
    for i in range(16):
        total += tl.load(x + base + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def read_roofline() -> float:
    """GB/s of reading 2 GiB."""
    x = torch.randint(0, 255, (1 << 29,), dtype=torch.int32, device="cuda")
    programs = x.numel() // (4096 * 16)
    out = torch.empty(programs, dtype=torch.int32, device="cuda")
    return x.numel() * 4 / median_ms(lambda: read[(programs,)](x, out, 4096, num_warps=8)) / 1e6


def measure_engine(
    model: str, requests: int, n_in: int, n_out: int, overlap: str
) -> dict[str, Any]:
    """Output tokens a second, and the share of the time in which the device computes."""
    began = time.perf_counter()
    llm = LLM(model, load="random", device="cuda", max_len=4096, prefix="none", overlap=overlap)
    started = time.perf_counter() - began
    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=n_out, ignore_eos=True)

    def burst() -> float:
        vocab = llm.spec.vocab
        prompts = [rng.integers(0, vocab, n_in).tolist() for _ in range(requests)]
        torch.cuda.synchronize()
        began = time.perf_counter()
        done = llm.generate(prompts, sampling)
        taken = time.perf_counter() - began
        assert all(len(one.outputs[0].tokens) == n_out for one in done)
        return taken

    first = burst()
    runs = [burst() for _ in range(4)]
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        burst()
    events = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in events) / 1e6
    seconds = float(np.median(runs))
    stages = llm.engine.explain()["startup"]
    llm.close()
    return {
        "model": model, "requests": requests, "input": n_in, "output": n_out,
        "output_tokens_per_second": requests * n_out / seconds, "seconds": runs,
        "start_seconds": started, "startup": stages, "first_burst_seconds": first,
        "device_busy_seconds": busy, "host_share": max(0.0, 1 - busy / seconds),
        "kernels": [
            {"name": e.key[:70], "ms": round(e.self_device_time_total / 1e3, 2), "calls": e.count}
            for e in events[:14]
        ],
    }  # fmt: skip


def run_tests() -> dict[str, Any]:
    """`pytest -m gpu`, on several processes where pytest-xdist is there."""
    many = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", *many]
    began = time.perf_counter()
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-1000:], flush=True)
    return {
        "exit": done.returncode, "seconds": time.perf_counter() - began,
        "summary": done.stdout.strip().splitlines()[-1:],
    }  # fmt: skip


def main() -> int:
    """Everything, one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parents[1] / "results" / "gpu_smoke.json"
    parser.add_argument("--json", type=Path, default=default)
    parser.add_argument("--sweep", action="store_true", help="time other tile shapes as well")
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args()
    found = header("gpu_smoke", {"sweep": options.sweep}, {})

    def keep(name: str, value: Any) -> None:
        found[name] = value
        write(found, str(options.json))
        shown = value
        if isinstance(value, dict) and "sweep" in value:
            shown = value | {"sweep": value["sweep"][:8]}
        print(f"{name}: {json.dumps(shown)}", flush=True)

    if not options.skip_tests:
        keep("tests", run_tests())
    keep("read_gb_s", read_roofline())
    for dim in (128, 64):
        shapes = (("decode", (64, 8192, 1), DECODES), ("prefill", (4, 8192, 8192), CHUNKS))
        for name, shape, sweep in shapes:
            keep(f"{name}_d{dim}", measure_attention(Case(*shape, dim), sweep * options.sweep))
            torch.cuda.empty_cache()
    for overlap in ("off", "on"):
        keep(f"engine_overlap_{overlap}", measure_engine("llama-3.2-1b", 64, 256, 128, overlap))
    return int(found.get("tests", {}).get("exit", 0))


if __name__ == "__main__":
    sys.exit(main())
