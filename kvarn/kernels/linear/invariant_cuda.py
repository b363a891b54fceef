"""Batch-invariant products on a GPU: the order of additions is a function of the matrix alone."""

import torch
from torch import Tensor

from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.stored import Stored
from kvarn.kernels.linear.tiles import Tile

PROGRAMS = 264  #: two for each multiprocessor of an H100
BLOCK_K = 64


class InvariantCuda(Linear):
    """K in a fixed number of parts, each added up alike, the parts added in their order.

    Few rows give each part a program of its own, many rows give all parts to one: the same bits,
    so a row never sees its batch. bf16, fp16 and fp32.
    """

    mode = "invariant"
    batch_invariant = True

    def __init__(self, weight: Stored, bias: Tensor | None) -> None:
        from kvarn.kernels.triton import launch

        assert isinstance(weight, Tensor)
        super().__init__(weight, bias)
        self._launch = launch
        self._matrix = launch.Matrix.of(weight, bias)
        self.weight = self._matrix.weight
        parts = 1
        while parts < 8 and self.n_out * parts < 64 * PROGRAMS and self.n_in // parts >= 1024:
            parts *= 2
        self._parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        return self._launch.multiply(x, self._matrix, self.tile(len(x)), dtype=x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """The sums as they are."""
        return self._launch.multiply(x, self._matrix, self.tile(len(x)), dtype=torch.float32)

    def tile(self, rows: int) -> Tile:
        """Rows decide who adds, never the order of it."""
        if self.weight.dtype == torch.float32:  # no tensor cores: one small tile for all
            return Tile("dot", 16, 64, 32, 4, 2, segments=self._parts)
        for most in (16, 32, 64):
            if rows <= most:
                return Tile("dot", most, 64, BLOCK_K, 4, 5, splits=self._parts)
        return Tile("dot", 128, 128, BLOCK_K, 8, 4, segments=self._parts)
