"""The gated activation of the MLP: act(gate) * up."""

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from kvarn.core.model import Activation
from kvarn.kernels import native
from kvarn.kernels.timing import compare


def gated(x: Tensor, kind: Activation) -> Tensor:
    """act(gate) * up; x [T, 2F] holds gate in its first F columns and up in the rest."""
    if x.is_cuda and not x.requires_grad and x.dim() == 2 and x.stride(1) == 1:
        from kvarn.kernels.triton import gated as on_gpu

        return on_gpu.gated(x, kind == "gelu_tanh")
    kernel = native.kernel("gated", x)
    if kernel is None or x.dim() != 2 or x.stride(1) != 1:
        return plain(x, kind)
    t, f = x.shape[0], x.shape[1] // 2
    out = torch.empty((t, f), dtype=x.dtype)
    kernel(x.data_ptr(), t, f, x.stride(0), kind == "gelu_tanh", out.data_ptr())
    return out


def plain(x: Tensor, kind: Activation) -> Tensor:
    """The form in torch."""
    gate, up = x.chunk(2, dim=-1)
    return (silu(gate) if kind == "silu" else gelu(gate, approximate="tanh")) * up


def reference(x: Tensor, kind: Activation) -> Tensor:
    """The definition, in fp32."""
    return plain(x.float(), kind)


def bench() -> None:
    """One row, 16 rows and 512 rows of 2 x 1536, bf16."""
    for rows in (1, 16, 512):
        x = torch.randn(rows, 3072).bfloat16()
        compare(
            f"gated [{rows}, 3072] bf16",
            torch=lambda: plain(x, "silu"),  # noqa: B023
            in_force=lambda: gated(x, "silu"),  # noqa: B023
        )


if __name__ == "__main__":
    bench()
