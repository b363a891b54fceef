"""From unsigned codes, zero points and scales, as tools store them, to `Affine`."""

import torch
from torch import Tensor

from kvarn.kernels.linear.stored import Affine


def affine(codes: Tensor, zero: Tensor | None, scale: Tensor, bits: int) -> Affine:
    """w = (code - zero) * scale, by group.

    `codes` uint8 [N, K] from 0 to 2^bits - 1; zero of any integer type and scale of any float type
    [N, groups]; zero None: the middle, 2^(bits - 1).
    """
    middle, group = 1 << (bits - 1), codes.shape[1] // scale.shape[1]
    wide = scale.float().contiguous()
    zero = torch.full_like(wide, middle) if zero is None else zero.float()
    if bits == 4:
        return Affine(codes.contiguous(), wide, -zero * wide, 4, group)
    signed = (codes ^ 128).contiguous().view(torch.int8)
    offset = (middle - zero) * wide
    return Affine(signed, wide, offset if bool(offset.any()) else None, 8, group)


def n_groups(k: int, group: int) -> int | None:
    """Groups of a row of `k` inputs: 1 where `group` is below 1, None where it does not divide."""
    if group < 1:
        return 1
    return k // group if k % group == 0 else None
