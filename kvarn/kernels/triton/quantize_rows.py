"""Rows of activations to fp8 with a scale each, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def quantize_row(
    x, codes, scale, x_row, MOST: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x [M, DIM] -> codes [M, DIM] in e4m3 and fp32 scale [M]: x = codes * scale."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    wide = tl.load(x + row * x_row + at, mask=at < DIM, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(wide), 0), 1e-12) / MOST
    tl.store(scale + row, step)
    turned = tl.minimum(tl.maximum(wide / step, -MOST), MOST)
    tl.store(codes + row * DIM + at, turned.to(codes.dtype.element_ty), mask=at < DIM)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [M, K] float8_e4m3fn, scale [M] fp32) of x [M, K] with packed columns."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        pdl = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
        options = {"launch_pdl": True} if pdl else {}
        block = triton.next_power_of_2(x.shape[1])
        quantize_row[(len(x),)](
            x, codes, scale, x.stride(0), 448.0, x.shape[1], block, pdl,
            num_warps=max(1, min(16, block // 512)), **options,
        )  # fmt: skip
    return codes, scale
