"""Codes and scales of GGUF blocks, as they lie in the file: no weight is rounded again.

Layouts by the format's description (ggml's block_q4_0, block_q4_1, block_q8_0, block_q4_K): a block
of 32 weights begins with its scale in fp16 and, in Q4_1, its minimum; of four-bit codes the first
half of the weights are the low nibbles. Q4_K: 8 groups of 32 whose scales and minimums are 6-bit
multiples of two fp16 numbers of the block.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvarn.kernels.linear.stored import Affine

GROUP = 32


def q4_0(blocks: Tensor, n: int) -> Affine:
    """From bytes [blocks, 18] of `n` rows; w = (code - 8) * scale."""
    scale = _halves(blocks[:, :2]).view(n, -1)
    return Affine(_nibbles(blocks[:, 2:]).view(n, -1), scale, scale * -8.0, 4, GROUP)


def q4_1(blocks: Tensor, n: int) -> Affine:
    """From bytes [blocks, 20] of `n` rows; w = code * scale + minimum."""
    numbers = _halves(blocks[:, :4])
    scale, offset = (numbers[:, i].reshape(n, -1) for i in (0, 1))
    return Affine(_nibbles(blocks[:, 4:]).view(n, -1), scale, offset, 4, GROUP)


def q8_0(blocks: Tensor, n: int) -> Affine:
    """From bytes [blocks, 34] of `n` rows; w = code * scale."""
    codes = blocks[:, 2:].contiguous().view(torch.int8).view(n, -1)
    return Affine(codes, _halves(blocks[:, :2]).view(n, -1), None, 8, GROUP)


def q4_k(blocks: Tensor, n: int) -> Affine:
    """From bytes [blocks, 144] of `n` rows, 256 weights a block; w = code * d * s - dmin * m."""
    numbers = _halves(blocks[:, :4])
    packed = blocks[:, 4:16].view(-1, 3, 4)
    first, second, rest = packed[:, 0], packed[:, 1], packed[:, 2]
    # six bits each: groups 0-3 in the low bits, groups 4-7 split between nibbles and top bits
    scales = torch.cat([first & 63, (rest & 15) | (first >> 6 << 4)], 1)
    minimums = torch.cat([second & 63, (rest >> 4) | (second >> 6 << 4)], 1)
    scale = (scales * numbers[:, :1]).view(n, -1)
    offset = (minimums * -numbers[:, 1:]).view(n, -1)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 32))
    return Affine(codes.view(n, -1), scale, offset, 4, GROUP)


#: `GGMLQuantizationType` by name -> its reader
READERS: Mapping[str, Callable[[Tensor, int], Affine]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
}


def _halves(raw: Tensor) -> Tensor:
    """fp16 numbers of each block, in fp32."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """Codes 0 to 15 of bytes [blocks, B]: the low nibbles of a block, then the high ones."""
    raw = raw.contiguous()  # else the two operations take a hundred times as long
    return torch.cat([raw & 15, raw >> 4], 1)
