"""Dense weights on a GPU: kernels that stream them for few rows, the vendor's library for many."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvarn.core.model import Activation
from kvarn.kernels import activation as pointwise
from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.stored import Stored
from kvarn.kernels.linear.tiles import tile_for


class SmallM(Linear):
    """Up to 256 rows take the measured tile of `tiles`, where there is one (bf16, fp16)."""

    mode = "small_m"

    def __init__(self, weight: Stored, bias: Tensor | None) -> None:
        from kvarn.kernels.triton import launch

        assert isinstance(weight, Tensor)
        super().__init__(weight, bias)
        self._launch = launch
        self._matrix = launch.Matrix.of(weight, bias)
        self.weight = self._matrix.weight
        self._tuned = weight.element_size() == 2

    def __call__(self, x: Tensor) -> Tensor:
        tile = tile_for(self.n_out, self.n_in, False, len(x)) if self._tuned else None
        if tile is None:
            return linear(x, self.weight, self.bias)
        return self._launch.multiply(x, self._matrix, tile, dtype=x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """The sums as they are, never rounded to bf16."""
        tile = tile_for(self.n_out, self.n_in, False, len(x)) if self._tuned else None
        if tile is not None:
            return self._launch.multiply(x, self._matrix, tile, dtype=torch.float32)
        return wide(x, self.weight, self.bias)

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        """act(gate) * up in one launch where that is faster."""
        tile = tile_for(self.n_out // 2, self.n_in, True, len(x)) if self._tuned else None
        if tile is None:
            return pointwise.gated(linear(x, self.weight, self.bias), activation)
        return self._launch.multiply(x, self._matrix, tile, dtype=x.dtype, gate=activation)


def wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in fp32 from 16-bit operands, through the vendor's library."""
    if not x.is_cuda or x.dtype == torch.float32:
        return linear(x, weight, bias).float()
    y = torch.mm(x, weight.t(), out_dtype=torch.float32)
    return y if bias is None else y + bias.float()
