"""What the device reaches at most: bandwidth of reading, rates of matrix products.

Its own process, so that nothing stays in memory: prints one JSON object on its last line.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

#: M, N, K of matrix products in an 8B shape's prefill
PRODUCTS = ((16384, 4096, 14336), (16384, 28672, 4096), (2048, 6144, 4096))


def read_gb_s() -> float:
    """Reading 4 GiB with one Triton kernel, the best of a few tilings. [10^9 bytes/s]"""
    import triton

    from benchmarks.gpu.stream import read

    x = torch.randint(0, 255, (1 << 30,), dtype=torch.int32, device="cuda")
    best = 0.0
    for block, warps in ((2048, 4), (4096, 8), (8192, 8)):
        programs = x.numel() // (block * 16)
        out = torch.empty(programs, dtype=torch.int32, device="cuda")
        call = lambda: read[(programs,)](x, out, block, num_warps=warps)  # noqa: B023, E731
        took = triton.testing.do_bench(call, rep=100, return_mode="median")
        best = max(best, x.numel() * 4 / took / 1e6)
    return best


def matmul_tflop_s() -> float:
    """bf16 products of an 8B shape, the best of them."""
    return max(_rate(shape, _bf16) for shape in PRODUCTS)


def fp8_tflop_s() -> float | None:
    """The same in fp8 with row-wise scales; None where the device has no such unit."""
    if torch.cuda.get_device_capability() < (8, 9):
        return None
    return max(_rate(shape, _fp8) for shape in PRODUCTS)


def _rate(shape: tuple[int, int, int], make: Callable[..., Callable[[], Any]]) -> float:
    import triton

    m, n, k = shape
    took = triton.testing.do_bench(make(m, n, k), rep=100, return_mode="median")
    return 2 * m * n * k / took / 1e9


def _bf16(m: int, n: int, k: int) -> Callable[[], Any]:
    a = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    return lambda: a @ b.T


def _fp8(m: int, n: int, k: int) -> Callable[[], Any]:
    a, b = (torch.randn(x, k, device="cuda").to(torch.float8_e4m3fn) for x in (m, n))
    rows, columns = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
    return lambda: torch._scaled_mm(
        a, b.T, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def cpu() -> dict[str, float | None]:
    """The same of a CPU, roughly: for trying the script out."""
    x = torch.ones(1 << 26)
    a = torch.randn(1024, 1024)

    def best(call: Callable[[], Any]) -> float:
        took = []
        for _ in range(3):
            began = time.perf_counter()
            call()
            took.append(time.perf_counter() - began)
        return min(took)

    return {
        "read_gb_s": x.numel() * 4 / best(x.sum) / 1e9,
        "matmul_tflop_s": 2 * 1024**3 / best(lambda: a @ a) / 1e12,
        "fp8_tflop_s": None,
    }


def gpu() -> dict[str, float | None]:
    """Every ceiling of the GPU."""
    return {
        "read_gb_s": read_gb_s(),
        "matmul_tflop_s": matmul_tflop_s(),
        "fp8_tflop_s": fp8_tflop_s(),
    }


if __name__ == "__main__":
    found = cpu() if sys.argv[1:] == ["cpu"] else gpu()
    print(
        json.dumps(found | {"gpu": torch.cuda.get_device_name() if found["fp8_tflop_s"] else None})
    )
