"""Dense weights through torch: as they are, laid out by oneDNN, or in batch-invariant tiles."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvarn.kernels.linear.base import Linear


class Plain(Linear):
    """F.linear."""

    mode = "plain"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Packed(Linear):
    """oneDNN with the weight laid out once for its kernels (bf16, fp32)."""

    mode = "packed"
    HINT: ClassVar[int] = 16  #: batch that the layout is chosen for

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self.HINT)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.n_out)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class Invariant(Linear):
    """Tiles of one fixed shape, the last one padded with zeros, so a row never sees its batch."""

    mode = "invariant"
    batch_invariant = True
    TILE: ClassVar[int] = 16

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        tiles = -(-n // self.TILE)
        padded = x.new_zeros(tiles * self.TILE, self.n_in)
        padded[:n] = x
        out = x.new_empty(tiles * self.TILE, self.n_out)
        for i in range(0, tiles * self.TILE, self.TILE):
            out[i : i + self.TILE] = linear(padded[i : i + self.TILE], self.weight, self.bias)
        return out[:n]
