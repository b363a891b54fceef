"""int4 and int8 weights on a GPU, as checkpoints hold them: groups or rows, with offsets or not."""

import torch
from torch import Tensor

from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.small_m import wide
from kvarn.kernels.linear.stored import Affine, Quantized, Stored

FEW = 32  #: rows up to which weights are expanded in registers


class WeightOnly(Linear):
    """Few rows expand the weights in registers; many expand the matrix, then multiply densely.

    Activations stay as they are; other than bf16 they take the dense way. Needs K to be a multiple
    of 128 and groups of a multiple of 32.
    """

    mode = "weight_only"

    @classmethod
    def takes(cls, weight: Quantized) -> bool:
        """Any such matrix on a GPU that computes in bf16."""
        return (
            isinstance(weight, Affine)
            and weight.codes.is_cuda
            and torch.cuda.get_device_capability(weight.codes.device) >= (8, 0)
            and weight.shape[1] % 128 == 0
            and weight.group % 32 == 0
        )

    def __init__(self, weight: Stored, bias: Tensor | None) -> None:
        from kvarn.kernels.triton import launch_codes

        assert isinstance(weight, Affine)
        super().__init__(weight, bias)
        self._launch = launch_codes
        self._codes = launch_codes.Codes.of(weight, bias)
        self.weight_bytes = self._codes.n_bytes

    def __call__(self, x: Tensor) -> Tensor:
        if self._few(x):
            return self._launch.multiply_codes(x, self._codes, x.dtype)
        return torch.nn.functional.linear(x, self._codes.dense(x.dtype), self.bias)

    def wide(self, x: Tensor) -> Tensor:
        """The sums as they are, never rounded to bf16."""
        if self._few(x):
            return self._launch.multiply_codes(x, self._codes, torch.float32)
        return wide(x, self._codes.dense(x.dtype), self.bias)

    def _few(self, x: Tensor) -> bool:
        return len(x) <= FEW and (x.dtype == torch.bfloat16 or not x.is_cuda)
