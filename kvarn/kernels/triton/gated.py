"""act(gate) * up in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.triton.dependent import can_follow, follow, options

BLOCK = 1024


@triton.jit
def gated_row(
    x, out, x_row, GELU: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """x [T, 2F]: gate, then up."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < F
    gate = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + F + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        # tanh(y) = 2 sigmoid(2y) - 1, so gelu(x) = x sigmoid(2y)
        turn = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        turn = gate
    result = gate * tl.sigmoid(turn) * up
    tl.store(out + row * F + at, result.to(out.dtype.element_ty), mask=inside)


def gated(x: Tensor, gelu: bool) -> Tensor:
    """x [T, 2F] with packed columns -> [T, F]."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        pdl = can_follow(x)
        gated_row[(rows, -(-width // BLOCK))](
            x, out, x.stride(0), gelu, width, BLOCK, pdl, **options(pdl)
        )
    return out
