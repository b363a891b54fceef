"""RMSNorm, with or without the residual addition before it: one program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.triton.dependent import can_follow, follow, options


@triton.jit
def norm_row(
    x, residual, weight, out, total, inner, x_outer, x_inner, eps,
    ADD: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Row r of x starts at (r // inner) * x_outer + (r % inner) * x_inner; the rest is packed."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    follow(PDL)
    wide = tl.load(x + row // inner * x_outer + row % inner * x_inner + at, mask=inside, other=0.0)
    wide = wide.to(tl.float32)
    if ADD:
        wide += tl.load(residual + row * DIM + at, mask=inside, other=0.0).to(tl.float32)
        narrow = wide.to(total.dtype.element_ty)
        tl.store(total + row * DIM + at, narrow, mask=inside)
        wide = narrow.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps) * factor
    tl.store(out + row * DIM + at, scaled.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] of two or three dimensions, any strides but the last."""
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous().view(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inner = x.shape[1] if x.dim() == 3 else 1
    _launch(x, None, weight, out, None, (inner, x.stride(0), x.stride(-2)), eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), all [..., D]."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, out, total, (1, x.shape[-1], 0), eps)
    return out, total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None,
    strides: tuple[int, int, int], eps: float,
) -> None:  # fmt: skip
    dim = x.shape[-1]
    rows = x.numel() // dim
    block = 1 << (dim - 1).bit_length()
    if rows:
        pdl = can_follow(x)
        norm_row[(rows,)](
            x, residual, weight, out, total, *strides, eps, residual is not None, dim, block,
            pdl, num_warps=max(1, min(8, block // 256)), **options(pdl),
        )  # fmt: skip
