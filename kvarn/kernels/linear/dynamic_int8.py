"""int8 weights and activations on the CPU."""

import warnings

import torch
from torch import Tensor

from kvarn.kernels.linear.base import Linear


class Int8(Linear):
    """int8 weights with a scale a row; activations are quantised as they come (W8A8, fbgemm).

    On Zen 4 the weight-only product is slower than this from two rows on and no faster at one, so
    there is one form, and one copy of the weights, for every T.
    """

    mode = "int8"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        wide = weight.float()
        scale = wide.abs().amax(1).clamp_min(1e-12) / 127.0
        zero = torch.zeros(self.n_out, dtype=torch.int64)
        with warnings.catch_warnings():  # torch means to drop this call; no other packs for x86
            warnings.filterwarnings("ignore", message=".*quantize_per_channel")
            quantized = torch.quantize_per_channel(wide, scale, zero, 0, torch.qint8)
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
