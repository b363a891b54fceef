"""Small integers in 32-bit words: the ways that GPTQ, AWQ and compressed-tensors pack codes."""

import torch
from torch import Tensor

#: the column of each nibble of a word, from the lowest: AWQ's order for its GPU kernels
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unsigned codes of int32 words [A, B] -> uint8 [A, B * 32 / bits], lowest bits first."""
    if bits == 8:
        return words.contiguous().view(torch.uint8)
    halves = words.contiguous().view(torch.uint8)
    return torch.stack([halves & 15, halves >> 4], -1).flatten(1)


def unpack_awq(words: Tensor) -> Tensor:
    """Four-bit codes of int32 words [A, B] -> uint8 [A, 8 B], in the order of the columns."""
    nibbles = unpack(words, 4).view(len(words), -1, 8)
    inverse = [AWQ_ORDER.index(column) for column in range(8)]
    return nibbles[:, :, inverse].flatten(1)
