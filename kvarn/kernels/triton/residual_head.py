"""The kernels of a residual head: x + silu(W x + b), a launch a block, and the probability of a
row's last linear function.

Few rows are bound by launches and by the way of W to the device's cores: programs share the rows of
W, ask for theirs while the kernel before still runs, and add the residual as they store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.triton.dependent import can_follow, follow, options
from kvarn.kernels.triton.stream import begin

FEW = 16  #: rows that are one narrow tile
WIDE = 2048  #: hidden numbers from which on broader tiles still fill a device
LEAST = 1e-4  #: probabilities nearer to 0 or 1 have the log-odds of this one


@triton.jit(do_not_specialize=["m", "ahead"])
def residual_block(
    x, w, bias, out, m, k, ahead, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K] and w [K, K] packed, bias [K] -> out [M, K]; EVEN: BLOCK_K divides K.

    x is rounded to the dtype of w where they are multiplied, and as it is where it is added.
    """
    m_tiles = tl.cdiv(m, BLOCK_M)
    first = tl.program_id(0) // m_tiles * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    real = columns < k
    shift = tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)
    if PDL:
        begin(w, first, k, k, 0, ahead, BLOCK_N, False)
    lines = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live = lines < m
    x_at = x + lines.to(tl.int64)[:, None] * k
    w_at = w + tl.minimum(columns, k - 1).to(tl.int64)[:, None] * k
    inside = live[None, :] & real[:, None]
    spot = lines.to(tl.int64)[None, :] * k + columns[:, None]
    before = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        inner = at + tl.arange(0, BLOCK_K)
        if EVEN:
            rows = tl.load(x_at + inner[None, :], mask=live[:, None], other=0.0)
            tile = tl.load(w_at + inner[None, :])
        else:
            fits = (inner < k)[None, :]
            rows = tl.load(x_at + inner[None, :], mask=live[:, None] & fits, other=0.0)
            tile = tl.load(w_at + inner[None, :], mask=fits, other=0.0)
        sums = tl.dot(tile, tl.trans(rows.to(tile.dtype)), sums, input_precision=PRECISION)
    sums += shift[:, None]
    tl.store(out + spot, before + sums * tl.sigmoid(sums), mask=inside)


@triton.jit
def chance_row(
    x, logprobs, weight, bias, out, LEAST: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a row of x [M, DIM]: sigmoid(weight [DIM + 1] . (x, log-odds) + bias [1])."""
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    factors = tl.load(weight + at, mask=inside, other=0.0)
    own, shift = tl.load(weight + DIM), tl.load(bias)
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.load(x + row * DIM + at, mask=inside, other=0.0).to(tl.float32)
    said = tl.minimum(tl.maximum(tl.exp(tl.load(logprobs + row)), LEAST), 1.0 - LEAST)
    odds = tl.sum(numbers * factors, 0) + own * tl.log(said / (1.0 - said)) + shift
    tl.store(out + row, tl.sigmoid(odds))


def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x + silu(x W^T + b) [M, hidden] in fp32; W [hidden, hidden] packed, b [hidden]."""
    x = x.contiguous()
    rows, hidden = x.shape
    out = torch.empty((rows, hidden), dtype=torch.float32, device=x.device)
    block_m, block_n, block_k, stages = _tile(rows, hidden)
    if rows:
        pdl = can_follow(x)
        residual_block[(triton.cdiv(hidden, block_n) * triton.cdiv(rows, block_m),)](
            x, weight, bias, out, rows, hidden, _ahead(weight), hidden % block_k == 0, block_m,
            block_n, block_k, stages, "ieee" if weight.dtype == torch.float32 else "tf32", pdl,
            num_warps=4, num_stages=stages, **options(pdl),
        )  # fmt: skip
    return out


def chance(x: Tensor, logprobs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Probabilities [M] in fp32 of x [M, hidden] and of the log-probabilities [M] beside it."""
    x, logprobs = x.contiguous(), logprobs.contiguous()
    rows, hidden = x.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(hidden)
    if rows:
        pdl = can_follow(x)
        chance_row[(rows,)](
            x, logprobs, weight, bias, out, LEAST, hidden, width, pdl,
            num_warps=max(1, min(8, width // 256)), **options(pdl),
        )  # fmt: skip
    return out


def _tile(rows: int, hidden: int) -> tuple[int, int, int, int]:
    """Rows of x, rows of W, columns at a time, and loads of these in flight."""
    if rows <= FEW:
        return FEW, 16 if hidden < WIDE else 32, 128, 4
    return 64, 16 if hidden < WIDE else 64, 64, 3


def _ahead(weight: Tensor) -> int:
    """512 byte pieces of each row of W that a program asks for before it waits."""
    size = weight.shape[1] * weight.element_size()
    return min(triton.cdiv(size, 512), 4) if size % 16 == 0 and size >= 512 else 0
