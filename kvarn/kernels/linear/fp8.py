"""fp8 weights on a GPU: activations are quantised by row as they come (W8A8, e4m3)."""

import torch
from torch import Tensor

from kvarn.core.model import Activation
from kvarn.kernels import activation as pointwise
from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.stored import Float8, Quantized, Stored
from kvarn.kernels.linear.tiles import Tile

FEW = 64  #: rows up to which the streaming kernel is chosen
PROGRAMS = 264  #: two for each multiprocessor of an H100


class Fp8Cuda(Linear):
    """Few rows: the streaming kernel; many: `torch._scaled_mm` with a scale a row.

    Needs compute capability 8.9, N and K multiples of 16, bf16 activations.
    """

    mode = "fp8"

    @classmethod
    def takes(cls, weight: Quantized) -> bool:
        """e4m3 on a GPU that multiplies it."""
        return (
            isinstance(weight, Float8)
            and weight.codes.is_cuda
            and torch.cuda.get_device_capability(weight.codes.device) >= (8, 9)
            and weight.shape[0] % 16 == 0
            and weight.shape[1] % 16 == 0
        )

    def __init__(self, weight: Stored, bias: Tensor | None) -> None:
        from kvarn.kernels.triton import launch
        from kvarn.kernels.triton.quantize_rows import quantize_rows

        assert isinstance(weight, Float8)
        super().__init__(weight, bias)
        self._launch, self._quantize = launch, quantize_rows
        scale = weight.scale.float().expand(self.n_out).contiguous()
        self._matrix = launch.Matrix.of(weight.codes, bias, scale)
        self.weight_bytes = self.n_out * self.n_in + 4 * self.n_out

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """The sums as they are for few rows; rounded to bf16 by the library for many."""
        return self._multiply(x, torch.float32)

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        """act(gate) * up, in one launch for few rows."""
        if len(x) > FEW:
            return pointwise.gated(self(x), activation)
        codes, scale = self._quantize(_packed(x))
        tile = _tile(len(x), self.n_out // 2, self.n_in)
        return self._launch.multiply(
            codes, self._matrix, tile, dtype=x.dtype, x_scale=scale, gate=activation
        )

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        codes, scale = self._quantize(_packed(x))
        if len(x) <= FEW:
            tile = _tile(len(x), self.n_out, self.n_in)
            return self._launch.multiply(codes, self._matrix, tile, dtype=dtype, x_scale=scale)
        matrix = self._matrix
        assert matrix.scale is not None
        y: Tensor = torch._scaled_mm(
            codes,
            matrix.weight.t(),
            scale_a=scale[:, None],
            scale_b=matrix.scale[None, :],
            bias=None if self.bias is None else self.bias.bfloat16(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.to(dtype)


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(rows: int, n: int, k: int) -> Tile:
    """Enough programs to keep the memory busy, each with at least 1,024 columns."""
    splits = 1
    while splits < 8 and -(-n // 64) * splits < PROGRAMS and k // splits >= 2048:
        splits *= 2
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return Tile("tma", block_m, 64, 256 if block_m < 64 else 128, 4, 4, splits, ahead=1)
