"""int8 weights and activations on the CPU, through torch's own kernels."""

import warnings

import torch
from torch import Tensor

from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.stored import Affine, Quantized


class Int8(Linear):
    """int8 weights with a scale a row; activations are quantised as they come (W8A8, fbgemm).

    On Zen 4 the weight-only product is slower than this from two rows on and no faster at one, so
    there is one form, and one copy of the weights, for every T.
    """

    mode = "int8"

    @classmethod
    def takes(cls, weight: Quantized) -> bool:
        """Eight bits, symmetric, one scale a row, on the CPU."""
        return (
            isinstance(weight, Affine)
            and weight.bits == 8
            and weight.group == weight.shape[1]
            and weight.offset is None
            and weight.codes.device.type == "cpu"
        )

    def __init__(self, weight: Affine, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        zero = torch.zeros(self.n_out, dtype=torch.int64)
        with warnings.catch_warnings():  # torch means to drop this call; no other packs for x86
            warnings.filterwarnings("ignore", message=".*quantize_per_channel")
            quantized = torch._make_per_channel_quantized_tensor(
                weight.codes, weight.scale[:, 0].contiguous(), zero, 0
            )
        torch.backends.quantized.engine = "x86"
        self.packed = torch.ops.quantized.linear_prepack(
            quantized, None if bias is None else bias.float()
        )
        self.weight_bytes = self.n_out * self.n_in + 4 * self.n_out

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.n_out)
        y: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self.packed, False)
        return y.to(x.dtype)
