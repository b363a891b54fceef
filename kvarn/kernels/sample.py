"""Micro-benchmark of the small kernels of a GPU step: `python -m kvarn.kernels.sample`.

Sampling, the launch between the qkv projection and attention, norms and the gated activation, each
as the median of captured replays over inputs that take turns past the L2 cache.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvarn.kernels.rope import Rope
from kvarn.kernels.triton.gated import gated
from kvarn.kernels.triton.norm import add_rms_norm
from kvarn.kernels.triton.rope_write import rope_write
from kvarn.kernels.triton.sample import sample

VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, DIM, PAGE = 151936, 4096, 14336, 32, 8, 128, 16
TURNS = 1 << 28  #: bytes that the inputs of a replay span [bytes]
SPREADS = {"flat": 0.3, "peaked": 3.0}  #: standard deviation of the logits


def captured(form: Callable[[Any], Any], inputs: list[Any], replays: int = 5) -> float:
    """Median time of one call, when a graph calls `form` on all inputs in turn. [s]"""
    form(inputs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in inputs:
            form(each)
    graph.replay()
    taken: list[float] = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e-3 / len(inputs))
    return statistics.median(taken)


def report(title: str, seconds: float, moved: float) -> None:
    """One line; `moved` is what must at least be read and written. [bytes]"""
    print(f"{title:48s} {seconds * 1e6:9.1f} us {moved / seconds * 1e-9:7.0f} GB/s", flush=True)


def some(make: Callable[[], Tensor]) -> list[Tensor]:
    """Enough tensors that each has left the cache when its turn comes again, 16 at most."""
    first = make()
    size = first.numel() * first.element_size()
    return [first, *(make() for _ in range(min(15, max(1, TURNS // size))))]


def bench_sample() -> None:
    """Greedy, drawn, and drawn with filters, of fp32 logits."""
    kinds = {
        "greedy": (0.0, 0, 1.0),
        "drawn": (1.0, 0, 1.0),
        "top-k 50": (1.0, 50, 1.0),
        "top-p 0.95": (1.0, 0, 0.95),
        "top-k 20, top-p 0.95": (0.6, 20, 0.95),
    }
    for rows in (1, 64, 256):
        where: dict[str, Any] = {"device": "cuda"}
        key, length = torch.arange(rows, **where), torch.arange(rows, dtype=torch.int32, **where)
        for spread, width in SPREADS.items():
            inputs = some(lambda: torch.randn(rows, VOCAB, **where) * width)  # noqa: B023
            for kind, (temperature, top_k, top_p) in kinds.items():
                draw = partial(
                    sample,
                    temperature=torch.full((rows,), temperature, **where),
                    top_k=torch.full((rows,), top_k, dtype=torch.int32, **where),
                    top_p=torch.full((rows,), top_p, **where),
                    min_p=torch.zeros(rows, **where),
                    key=key,
                    length=length,
                    filtered=top_k > 0 or top_p < 1,
                )
                taken = captured(draw, inputs)
                report(f"sample {rows} rows, {spread}, {kind}", taken, inputs[0].numel() * 4)


def bench_rows() -> None:
    """rope_write, add_rms_norm and gated of bf16 rows of an 8B model."""
    rope = Rope(DIM, 5e5, None, 8192, torch.bfloat16, "cuda")
    weight, norm = (torch.ones(n, device="cuda").bfloat16() for n in (HIDDEN, DIM))
    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    for rows in (1, 64, 1024, 8192):
        at = torch.arange(rows, device="cuda", dtype=torch.int32)
        cache = torch.zeros(-(-rows // PAGE), KV_HEADS, 2, PAGE, DIM, **kind)
        heads = HEADS + 2 * KV_HEADS
        inputs = some(lambda: torch.randn(rows, heads * DIM, **kind))  # noqa: B023
        for title, weights in (("rope_write", None), ("qk-norm, rope_write", norm)):
            write = partial(
                rope_write,
                positions=at,
                slots=at,
                cos=rope.cos,
                sin=rope.sin,
                cache=cache,
                heads=HEADS,
                kv_heads=KV_HEADS,
                q_norm=weights,
                k_norm=weights,
                eps=1e-5,
            )
            taken = captured(write, inputs)
            report(f"{title} {rows} rows", taken, rows * heads * DIM * 4)
        pairs = some(lambda: torch.randn(2, rows, HIDDEN, **kind))  # noqa: B023
        taken = captured(lambda x: add_rms_norm(x[0], x[1], weight, 1e-5), pairs)
        report(f"add_rms_norm {rows} x {HIDDEN}", taken, rows * HIDDEN * 8)
        wide = some(lambda: torch.randn(rows, 2 * FFN, **kind))  # noqa: B023
        report(f"gated {rows} x {FFN}", captured(lambda x: gated(x, False), wide), rows * FFN * 6)


if __name__ == "__main__":
    bench_sample()
    bench_rows()
