"""RMSNorm, alone and with the residual addition before it; statistics in fp32."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm

from kvarn.kernels import native
from kvarn.kernels.timing import compare


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; x [..., D], weight [D]; result in x's dtype."""
    kernel = native.kernel("rms_norm", x)
    if kernel is None:
        return plain(x, weight, eps)
    return _call(kernel, x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), all [..., D]; the sum goes on as the residual."""
    kernel = native.kernel("rms_norm", x)
    if kernel is None or residual.requires_grad or residual.dtype != x.dtype:
        total = x + residual
        return plain(total, weight, eps), total
    return _call(kernel, x, residual.contiguous(), weight, eps)


def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The form in torch."""
    return torch_rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


def _call(
    kernel: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(normed, sum); without a residual the sum is x. Heads [T, H, d] are read in place."""
    dim = x.shape[-1]
    if residual is not None or x.dim() not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous().view(-1, dim)
    shape = x.shape if residual is None else residual.shape
    out = torch.empty(shape, dtype=x.dtype)
    total = x if residual is None else torch.empty(shape, dtype=x.dtype)
    if weight.dtype not in (torch.float32, x.dtype):
        weight = weight.to(x.dtype)
    kernel(
        x.data_ptr(), x.shape[0], x.shape[1] if x.dim() == 3 else 1, dim, x.stride(0), x.stride(-2),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(), weight.dtype == torch.float32, eps,
        out.data_ptr(), None if residual is None else total.data_ptr(),
    )  # fmt: skip
    return out, total


def bench() -> None:
    """Add and normalise one row, 16 rows and 512 rows of 576, bf16."""
    weight = torch.randn(576).bfloat16()
    for rows in (1, 16, 512):
        x, residual = torch.randn(2, rows, 576).bfloat16()
        compare(
            f"add_rms_norm [{rows}, 576] bf16",
            torch=lambda: plain(x + residual, weight, 1e-5),  # noqa: B023
            in_force=lambda: add_rms_norm(x, residual, weight, 1e-5),  # noqa: B023
        )


if __name__ == "__main__":
    bench()
