"""y = x W^T + b in the forms that pay on a CPU: plain, packed, int8, batch-invariant."""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvarn.core.errors import ConfigError, nearest

Mode = Literal["plain", "packed", "int8", "invariant"]


class Linear:
    """A matrix ready to multiply: callable x [T, K] -> [T, N] in x's dtype."""

    mode: ClassVar[str]
    n_out: int
    n_in: int
    weight_bytes: int  #: read from memory by one call

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.n_out, self.n_in = weight.shape
        self.bias = bias
        self.weight_bytes = weight.numel() * weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


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
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8(Linear):
    """int8 weights with a scale a row; activations are quantised as they come."""

    mode = "int8"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        wide = weight.float()
        scale = wide.abs().amax(1).clamp_min(1e-12) / 127.0
        zero = torch.zeros(self.n_out, dtype=torch.int64)
        quantized = torch.quantize_per_channel(wide, scale, zero, 0, torch.qint8)
        torch.backends.quantized.engine = "x86"
        self.packed = torch.ops.quantized.linear_prepack(
            quantized, None if bias is None else bias.float()
        )
        self.weight_bytes = self.n_out * self.n_in + 4 * self.n_out

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.n_out)
        return torch.ops.quantized.linear_dynamic(x.float(), self.packed, False).to(x.dtype)


class Invariant(Linear):
    """Tiles of one fixed shape, the last one padded with zeros, so a row never sees its batch."""

    mode = "invariant"
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


FORMS: dict[str, type[Linear]] = {form.mode: form for form in (Plain, Packed, Int8, Invariant)}


def make_linear(weight: Tensor, bias: Tensor | None = None, mode: Mode = "plain") -> Linear:
    """A `Linear` of `weight` [N, K] and `bias` [N] in one of `FORMS`."""
    if mode not in FORMS:
        raise ConfigError(f"unknown linear mode {mode!r}{nearest(mode, FORMS)}")
    return FORMS[mode](weight, bias)
