"""Rotary embedding of q and k in one launch: one program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(
    x, out, cos, sin, row, x_row, x_head, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotate the HEADS heads of one row; out is packed."""
    HALF: tl.constexpr = DIM // 2
    head = tl.arange(0, BLOCK_H)[:, None]
    dim = tl.arange(0, BLOCK_D)
    fits = dim < HALF
    inside = (head < HEADS) & fits[None, :]
    angle = row * DIM + dim
    cos_1 = tl.load(cos + angle, mask=fits)[None, :]
    cos_2 = tl.load(cos + angle + HALF, mask=fits)[None, :]
    sin_1 = tl.load(sin + angle, mask=fits)[None, :]
    sin_2 = tl.load(sin + angle + HALF, mask=fits)[None, :]
    source = x + row * x_row + head * x_head + dim[None, :]
    first = tl.load(source, mask=inside).to(tl.float32)
    second = tl.load(source + HALF, mask=inside).to(tl.float32)
    target = out + (row * HEADS + head) * DIM + dim[None, :]
    kind = out.dtype.element_ty
    tl.store(target, tl.fma(first, cos_1, second * sin_1).to(kind), mask=inside)
    tl.store(target + HALF, tl.fma(second, cos_2, first * sin_2).to(kind), mask=inside)


@triton.jit
def turn_row(
    q, k, q_out, k_out, cos, sin, q_row, q_head, k_row, k_head,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """cos and sin [T, d] fp32, the first half of sin negated."""
    row = tl.program_id(0).to(tl.int64)
    _turn(q, q_out, cos, sin, row, q_row, q_head, Q_HEADS, DIM, BLOCK_Q, BLOCK_D)
    _turn(k, k_out, cos, sin, row, k_row, k_head, K_HEADS, DIM, BLOCK_K, BLOCK_D)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, Hq, d] and k [T, Hkv, d], any strides but the last; cos, sin [T, 1, d] fp32."""
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    rows, q_heads, dim = q.shape
    k_heads = k.shape[1]
    blocks = (1 << (n - 1).bit_length() for n in (q_heads, k_heads, dim // 2))
    if rows:
        turn_row[(rows,)](
            q, k, q_out, k_out, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            q_heads, k_heads, dim, *blocks,
        )  # fmt: skip
    return q_out, k_out
