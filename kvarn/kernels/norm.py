"""RMSNorm, alone and with the residual addition before it; statistics in fp32."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; x [..., D], weight [D]; result in x's dtype."""
    return torch_rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), all [..., D]; the sum goes on as the residual."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
