"""The attention and KV-write kernels themselves: fp8 caches, idle work, the Hopper form.

`TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_attend_kernels.py` runs without a GPU what is not
Hopper's own.
"""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kvarn.kernels.triton.attend import LOG2E, attend
from kvarn.kernels.triton.kv_write import kv_write

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter has no bf16 products
FP8 = torch.float8_e4m3fn
SPANS = [(0, 70), (100, 33), (5, 1), (300, 9), (0, 1)]
IDLE = [0, 0, 0, 0, 0, 0, 0, -1]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device_is_there() -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@dataclass(slots=True)
class Step:
    """Spans (start, rows) over pages in random order, the end of each last page full of NaN."""

    spans: list[tuple[int, int]]
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    page: int = 16
    kind: torch.dtype = HALF  #: of the cache
    window: int = 0
    cap: float = 0.0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, Hq, d], cache, pages."""
        torch.manual_seed(0)
        counts = [-(-(start + n) // self.page) for start, n in self.spans]
        pages = torch.from_numpy(np.random.default_rng(0).permutation(sum(counts))).int()
        cache = torch.randn(sum(counts), self.kv_heads, 2, self.page, self.dim)
        first = 0
        for (start, n), count in zip(self.spans, counts):
            if (start + n) % self.page:
                cache[pages[first + count - 1], :, :, (start + n) % self.page :] = torch.nan
            first += count
        q = torch.randn(sum(n for _, n in self.spans), self.heads, self.dim, dtype=HALF)
        return q.to(DEVICE), cache.to(self.kind).to(DEVICE), pages.to(DEVICE)

    def items(self, height: int, limit: int = 1 << 20) -> tuple[Tensor, int]:
        """Tiles of `height` rows cut at `limit` positions, an idle one among them; partial rows."""
        found, row, parts, first = [IDLE], 0, 0, 0
        for start, rows in self.spans:
            for skip in range(0, rows, height):
                n = min(height, rows - skip)
                high = start + skip + n
                low = max(start + skip - self.window + 1, 0) if self.window else 0
                low = low // self.page * self.page
                split = high - low > limit
                for at in range(low, high, limit):
                    part = parts if split else -1
                    parts += n * split
                    end = min(high, at + limit)
                    found.append([row + skip, n, start + skip, first, 0, at, end, part])
            row, first = row + rows, first - (-(start + rows) // self.page)
        return torch.tensor(found, dtype=torch.int32, device=DEVICE), parts

    def expected(self, q: Tensor, cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """o and lse in fp64 from what the cache holds."""
        q, cache, pages = q.cpu().double(), cache.cpu().float().double(), pages.cpu().long()
        outs, sums, row, first = [], [], 0, 0
        for start, n in self.spans:
            end = start + n
            count = -(-end // self.page)
            kv = cache[pages[first : first + count]].permute(2, 1, 0, 3, 4)
            kv = kv.reshape(2, self.kv_heads, -1, self.dim)[:, :, :end]
            k, v = kv.repeat_interleave(self.heads // self.kv_heads, 1)
            scores = q[row : row + n].transpose(0, 1) @ k.transpose(1, 2) * self.dim**-0.5
            if self.cap:
                scores = self.cap * torch.tanh(scores / self.cap)
            keys_at, at = torch.arange(end), start + torch.arange(n)
            hidden = keys_at > at[:, None]
            if self.window:
                hidden |= keys_at <= at[:, None] - self.window
            scores.masked_fill_(hidden, float("-inf"))
            outs.append((scores.softmax(-1) @ v).transpose(0, 1))
            sums.append(scores.logsumexp(-1).T)
            row, first = row + n, first + count
        return torch.cat(outs), torch.cat(sums)

    def scales(self) -> tuple[float, float]:
        """`scale` and `cap` as the kernels take them."""
        if self.cap:
            return self.dim**-0.5 / self.cap, self.cap * LOG2E
        return self.dim**-0.5 * LOG2E, 0.0


def merged(items: Tensor, o: Tensor, lse: Tensor, part_o: Tensor, part_lse: Tensor) -> None:
    """Fill the rows of o and lse whose results are in parts."""
    rows: dict[int, list[int]] = {}
    for row, n, *_, part in items.tolist():
        for i in range(n if part >= 0 else 0):
            rows.setdefault(row + i, []).append(part + i)
    for row, slots in rows.items():
        weights = part_lse[slots].softmax(0)
        o[row] = (weights[..., None] * part_o[slots]).sum(0).to(o.dtype)
        lse[row] = part_lse[slots].logsumexp(0)


def check(step: Step, limit: int = 1 << 20, hopper: bool = False) -> None:
    q, cache, pages = step.tensors()
    group = step.heads // step.kv_heads
    items, parts = step.items(128 // group, limit)
    o = torch.full_like(q, torch.nan)
    lse = torch.full(q.shape[:2], torch.nan, device=DEVICE)
    part_o = torch.full((max(parts, 1), step.heads, step.dim), torch.nan, device=DEVICE)
    part_lse = torch.full((max(parts, 1), step.heads), torch.nan, device=DEVICE)
    scale, cap = step.scales()
    if hopper:
        from kvarn.kernels.triton.attend_hopper import attend_chunks, fits

        assert fits(cache, q)
        attend_chunks(
            items, pages, cache, q, o, lse, part_o, part_lse, scale, cap, step.window, step.cap > 0
        )
    else:
        attend[(len(items) * step.kv_heads,)](
            q, cache, items, pages, o, lse, part_o, part_lse, q.stride(0), q.stride(1), scale, cap,
            step.kv_heads, group, step.dim, step.page, 0, step.window, step.cap > 0, True,
            128, 32, step.dim, "tf32", 2, num_warps=4,
        )  # fmt: skip
    merged(items, o, lse, part_o, part_lse)
    wanted, sums = step.expected(q, cache, pages)
    torch.testing.assert_close(o.cpu().double(), wanted, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.cpu().double(), sums, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("limit", [1 << 20, 64])
@pytest.mark.parametrize("kind", [HALF, FP8])
def test_cache_kinds(kind: torch.dtype, limit: int) -> None:
    check(Step(SPANS, kind=kind), limit)


@pytest.mark.parametrize("window", [0, 40])
def test_soft_caps(window: int) -> None:
    check(Step(SPANS, window=window, cap=5.0))


HOPPER = [
    Step([(0, 300), (700, 129), (5, 40), (1000, 65), (0, 1), (0, 1024)], heads=8, dim=128),
    Step([(0, 300), (700, 129), (5, 40)], heads=2, dim=64),
    Step([(0, 300), (700, 129), (5, 40)], heads=14, dim=128),
    Step([(0, 300), (700, 129), (5, 40)], dim=64, page=64),
    Step([(0, 300), (700, 129), (5, 40)], dim=128, page=16),
    Step([(0, 300), (700, 129), (5, 40)], dim=128, page=32),
    Step([(0, 600), (700, 129), (5, 40)], dim=128, window=100),
    Step([(0, 600), (700, 129), (5, 40)], dim=64, window=1),
    Step([(0, 600), (700, 129), (5, 40)], dim=128, window=400, cap=20.0),
    Step([(0, 600), (700, 129)], dim=64, cap=5.0),
]


@pytest.mark.parametrize("limit", [1 << 20, 256])
@pytest.mark.parametrize("step", HOPPER)
def test_hopper(step: Step, limit: int) -> None:
    if INTERPRETED or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    check(step, limit, hopper=True)


@pytest.mark.parametrize("kind", [HALF, FP8])
def test_kv_write(kind: torch.dtype) -> None:
    """Rows without a slot leave the cache alone; too large numbers become the largest there is."""
    torch.manual_seed(0)
    rows, kv_heads, dim, page = 5, 2, 64, 4
    k, v = (torch.randn(rows, kv_heads, dim, dtype=HALF) * 100 for _ in range(2))
    if INTERPRETED:  # which does not round right to fp8
        k, v = (x.clamp(-448, 448).to(FP8).to(HALF) for x in (k, v))
    k[0, 0, :3] = torch.tensor([1e4, -1e4, torch.inf])
    slots = torch.tensor([7, -1, 0, 11, -1], dtype=torch.int32)
    before = torch.ones(3, kv_heads, 2, page, dim).to(kind)
    cache = before.clone().to(DEVICE)
    k_there, v_there = k.to(DEVICE), v.to(DEVICE)
    kv_write[(rows,)](
        k_there, v_there, slots.to(DEVICE), cache, k.stride(0), k.stride(1), v.stride(0),
        v.stride(1), kv_heads, dim, page, kv_heads * dim,
    )  # fmt: skip
    wanted = before.float()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[slot // page, :, 0, slot % page] = k[row].float()
            wanted[slot // page, :, 1, slot % page] = v[row].float()
    if kind == FP8:
        wanted = wanted.clamp(-448, 448)
    assert torch.equal(cache.cpu().float(), wanted.to(kind).float())
