"""y = x W^T + b in the forms that pay on a CPU: plain, packed, int8, batch-invariant."""

import warnings
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvarn.core.errors import ConfigError, nearest
from kvarn.kernels import native
from kvarn.kernels.timing import compare

Mode = Literal["plain", "packed", "native", "int8", "invariant"]

PANEL = 32  #: outputs of a panel, as in linear.cpp


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

    def wide(self, x: Tensor) -> Tensor:
        """The product in fp32, for logits: bf16 steps by an eighth where logits are decided."""
        return self(x).float()


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


class Native(Linear):
    """The compiled kernel on panels of 32 outputs; batch-invariant (bf16 with even n_in, fp32)."""

    mode = "native"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        pack = native.kernel("pack", weight)
        run = native.kernel("linear", weight)
        if pack is None or run is None or (weight.dtype == torch.bfloat16 and self.n_in % 2):
            raise ConfigError(
                f"linear mode 'native' cannot take {weight.dtype} [{self.n_out}, {self.n_in}] on "
                f"{weight.device}: {native.reason()}; mode 'packed' or 'plain' works"
            )
        panels = -(-self.n_out // PANEL)
        self.packed = torch.empty(panels * PANEL * self.n_in, dtype=weight.dtype)
        pack(weight.contiguous().data_ptr(), self.n_out, self.n_in, self.packed.data_ptr())
        self.dtype = weight.dtype
        self.wide_bias = None if bias is None else bias.float()
        self.weight_bytes = self.packed.numel() * self.packed.element_size()
        self._run = run
        self._run_wide = native.kernel("linear_wide", weight)
        self._packed_at = self.packed.data_ptr()
        self._bias_at = None if self.wide_bias is None else self.wide_bias.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, self._run, self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """The sums as they are, never rounded to bf16."""
        return self._multiply(x, self._run_wide, torch.float32)

    def _multiply(self, x: Tensor, run: Any, kind: torch.dtype) -> Tensor:
        if x.stride(1) != 1 or x.stride(0) % 2:
            x = x.contiguous()
        t = x.shape[0]
        y = torch.empty((t, self.n_out), dtype=kind)
        run(
            x.data_ptr(), t, self.n_in, x.stride(0), self._packed_at, self._bias_at, self.n_out,
            y.data_ptr(),
        )  # fmt: skip
        return y


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


FORMS: dict[str, type[Linear]] = {
    form.mode: form for form in (Plain, Packed, Native, Int8, Invariant)
}


def make_linear(weight: Tensor, bias: Tensor | None = None, mode: Mode = "plain") -> Linear:
    """A `Linear` of `weight` [N, K] and `bias` [N] in one of `FORMS`."""
    if mode not in FORMS:
        raise ConfigError(f"unknown linear mode {mode!r}{nearest(mode, FORMS)}")
    return FORMS[mode](weight, bias)


def bench() -> None:
    """The layers of SmolLM2-135M in bf16 at 1, 16 and 512 rows; weights come from memory."""
    for n, k in ((960, 576), (3072, 576), (576, 1536)):
        weights = [torch.randn(n, k).bfloat16() for _ in range(24)]
        modes: list[Mode] = ["plain", "packed", "int8"]
        modes += ["native"] if native.available() else []
        layers = {mode: [make_linear(weight, None, mode) for weight in weights] for mode in modes}
        for rows in (1, 16, 512):
            x = torch.randn(rows, k).bfloat16()
            forms = {
                mode: (lambda made=made, x=x: [layer(x) for layer in made])
                for mode, made in layers.items()
            }
            compare(f"24 x linear [{rows}, {k}] -> {n}", **forms)


if __name__ == "__main__":
    bench()
