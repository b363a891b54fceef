"""RMSNorm, alone and with the residual addition before it; statistics in fp32."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm

from kvarn.kernels import native
from kvarn.kernels.timing import compare


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; x [..., D], weight [D]; result in x's dtype."""
    if x.is_cuda and not x.requires_grad:
        from kvarn.kernels.triton import norm

        return norm.rms_norm(x, weight, eps)
    kernel = native.kernel("rms_norm", x)
    if kernel is None:
        return plain(x, weight, eps)
    shape, dim = x.shape, x.shape[-1]
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous().view(-1, dim)
    out = torch.empty(shape, dtype=x.dtype)
    kernel(
        x.data_ptr(), x.shape[0], x.shape[1] if x.dim() == 3 else 1, dim, x.stride(0), x.stride(-2),
        None, *_factor(weight, x.dtype), eps, out.data_ptr(), None,
    )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), all [..., D]; the sum goes on as the residual."""
    if x.is_cuda and not x.requires_grad and not residual.requires_grad:
        from kvarn.kernels.triton import norm

        return norm.add_rms_norm(x, residual, weight, eps)
    kernel = native.kernel("rms_norm", x)
    if kernel is None or residual.requires_grad or residual.dtype != x.dtype:
        total = x + residual
        return plain(total, weight, eps), total
    shape, dim = x.shape, x.shape[-1]
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty(shape, dtype=x.dtype), torch.empty(shape, dtype=x.dtype)
    kernel(
        x.data_ptr(), shape.numel() // dim, 1, dim, dim, 0, residual.data_ptr(),
        *_factor(weight, x.dtype), eps, out.data_ptr(), total.data_ptr(),
    )  # fmt: skip
    return out, total


def _factor(weight: Tensor, dtype: torch.dtype) -> tuple[int, bool]:
    """Address of the weight, and whether it is in fp32."""
    if weight.dtype not in (torch.float32, dtype):
        raise TypeError(f"the norm's weight is {weight.dtype}; it must be float32 or {dtype}")
    return weight.data_ptr(), weight.dtype == torch.float32


def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The form in torch."""
    return torch_rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


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
