"""Linear layers of an 8B decoder: a step's chain of products, and every form alone.

    PYTHONPATH=. python benchmarks/gpu/linear.py

The chain is qkv, out, gate_up with its activation and down over 32 layers in one CUDA graph: what
a decode step reads, without attention and norms. Each form alone: its matrices are rotated past
the L2.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvarn.kernels.linear import make_linear, quantize
from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.stored import Stored

HIDDEN, FFN, QKV, LAYERS = 4096, 14336, 6144, 32
POOL = 500e6  #: weights of a form, well past the L2 [bytes]
FORMS: dict[str, Callable[[Tensor], Stored]] = {
    "small_m": lambda weight: weight.clone(),
    "invariant": lambda weight: weight.clone(),
    "plain": lambda weight: weight.clone(),
    "fp8": quantize.to_float8,
    "int8": quantize.to_int8,
    "int4": quantize.to_int4,
}


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of replays of the call's graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[3]


def made(n: int, k: int, form: str) -> Linear:
    """A matrix of noise in a form."""
    weight = torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    mode: Any = form if form in ("small_m", "invariant", "plain") else "plain"
    return make_linear(FORMS[form](weight), None, mode)


def chain(form: str, rows: list[int]) -> None:
    """One decode step's products."""
    shapes = ((QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN))
    layers = [[made(n, k, form) for n, k in shapes] for _ in range(LAYERS)]
    n_bytes = sum(matrix.weight_bytes for layer in layers for matrix in layer)
    for m in rows:
        x = torch.randn(m, HIDDEN, dtype=torch.bfloat16, device="cuda")

        def step(h: Tensor = x) -> Tensor:
            for qkv, out, gate_up, down in layers:
                h = down(gate_up.gated(out(qkv(h)[:, :HIDDEN]), "silu"))
            return h

        ms = milliseconds(step)
        print(f"chain {form:9s} M={m:4d}: {ms:7.3f} ms {n_bytes / ms / 1e6:5.0f} GB/s", flush=True)


def alone(form: str, rows: list[int]) -> None:
    """Each matrix of a layer by itself."""
    for n, k in ((QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN)):
        first = made(n, k, form)
        layers = [first] + [made(n, k, form) for _ in range(int(POOL / first.weight_bytes))]
        for m in rows:
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            ms = milliseconds(lambda x=x, layers=layers: [f(x) for f in layers]) / len(layers)
            rate, flops = first.weight_bytes / ms / 1e6, 2 * m * n * k / ms / 1e9
            print(
                f"{form:9s} [{n}, {k}] M={m:4d}: {ms * 1e3:7.1f} us {rate:5.0f} GB/s "
                f"{flops:5.0f} TFLOP/s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32, 64, 128, 256])
    parser.add_argument("--many", type=int, nargs="+", default=[1, 16, 64, 256, 2048])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    options = parser.parse_args()
    for form in options.forms:
        chain(form, options.rows)
    for form in options.forms:
        alone(form, options.many)


if __name__ == "__main__":
    main()
