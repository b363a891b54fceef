"""What this machine can do at most: memory read bandwidth and matrix-product rate, measured."""

import time
from collections.abc import Callable

import torch

READ_BYTES = 512 << 20  #: far above any cache
SIZE = (
    1024  #: of the square factors: large enough to be bound by arithmetic, small enough to be quick
)
ROUNDS = 5


def measure(dtype: str, device: str = "cpu") -> dict[str, float]:
    """Best of a few rounds: `read_gb_s` [10^9 bytes/s] and `gemm_gflop_s` in `dtype`."""
    kind = getattr(torch, dtype)
    big = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)
    a = torch.randn(SIZE, SIZE, device=device).to(kind)
    b = torch.randn(SIZE, SIZE, device=device).to(kind)
    read = _best(lambda: big.sum(), device)
    gemm = _best(lambda: torch.nn.functional.linear(a, b), device)
    return {
        "read_gb_s": READ_BYTES / read / 1e9,
        "gemm_gflop_s": 2 * SIZE**3 / gemm / 1e9,
    }


def _best(call: Callable[[], object], device: str) -> float:
    """Shortest time of a call [s]."""
    call()
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
