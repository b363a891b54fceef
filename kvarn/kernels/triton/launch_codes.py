"""Matrices in 4 or 8 bits in the layout of `codes`, and its launch."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kvarn.kernels.linear.stored import Affine
from kvarn.kernels.triton.codes import codes
from kvarn.kernels.triton.expand import expand, sum_runs

BLOCK_N = 64
PROGRAMS = 528  #: four for each multiprocessor of an H100


@dataclass(slots=True)
class Codes:
    """W [N, K] in words of 16 bits."""

    words: Tensor  #: int16 [N, K * bits / 16]
    scale: Tensor  #: fp32 [N, K / group]
    offset: Tensor | None
    bias: Tensor | None
    arrived: Tensor  #: int32, zeros: programs that have finished their part of a tile
    bits: int
    group: int  #: 0: the whole row
    n_in: int

    @classmethod
    def of(cls, weight: Affine, bias: Tensor | None) -> "Codes":
        """Codes [N, K] packed: word e of a run holds the inputs e, e + 32, ..."""
        (n, k), bits = weight.shape, weight.bits
        runs = 16 // bits
        whole = weight.codes.to(torch.int32) + (128 if bits == 8 else 0)
        parts = whole.view(n, k // (32 * runs), runs, 32)
        words = sum(parts[:, :, i] << (bits * i) for i in range(runs))
        assert isinstance(words, Tensor)
        arrived = torch.zeros(-(-n // 16) * 16, dtype=torch.int32, device=words.device)
        group = 0 if weight.group == k else weight.group
        scale = weight.scale.float().contiguous()
        offset = None if weight.offset is None else weight.offset.float().contiguous()
        packed = words.to(torch.int16).view(n, -1)
        return cls(packed, scale, offset, bias, arrived, bits, group, k)

    @property
    def n_bytes(self) -> int:
        """Read from memory by one product."""
        tables = self.scale.numel() + (0 if self.offset is None else self.offset.numel())
        return 2 * self.words.numel() + 4 * tables

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K]."""
        (n, width), block = self.words.shape, 1024
        out = torch.empty((n, self.n_in), dtype=dtype, device=self.words.device)
        expand[(n, triton.cdiv(width, block))](
            self.words, self.scale, self.offset, out, self.n_in, self.bits, self.group,
            self.offset is not None, block, num_warps=4,
        )  # fmt: skip
        return out


def multiply_codes(x: Tensor, matrix: Codes, dtype: torch.dtype) -> Tensor:
    """x [M, K], few rows, times the matrix -> [M, N] in `dtype`."""
    (m, k), n = x.shape, len(matrix.words)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    splits = 1
    while splits < 16 and -(-n // BLOCK_N) * splits < PROGRAMS and k // splits >= 1024:
        splits *= 2
    span = triton.cdiv(triton.cdiv(k, splits), 128) * 128
    part = torch.empty((splits, m, n), dtype=torch.float32, device=x.device) if splits > 1 else None
    block_m = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
    pdl = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    options = {"launch_pdl": True} if pdl else {}
    sums = torch.empty((m, k // 32), dtype=torch.float32, device=x.device)
    sum_runs[(m, triton.cdiv(k, 32 * 32))](x, sums, k, x.stride(0), 32, pdl, **options)
    codes[(triton.cdiv(n, BLOCK_N) * splits * triton.cdiv(m, block_m),)](
        x, sums, matrix.words, matrix.scale, matrix.offset, matrix.bias, out, part, matrix.arrived,
        m, n, k, x.stride(0), span, splits, 1 if pdl and k >= 1024 else 0, matrix.bits,
        matrix.group, matrix.offset is not None, matrix.bias is not None, splits > 1, block_m,
        BLOCK_N, 3, pdl, num_warps=4, **options,
    )  # fmt: skip
    return out
