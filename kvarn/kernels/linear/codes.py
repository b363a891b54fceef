"""Weights in 8 or 4 bits through the compiled CPU kernels; activations in 8 bits."""

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvarn.core.errors import ConfigError
from kvarn.kernels import native
from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.stored import Affine, Quantized

GROUP = 32  #: inputs that share a scale, as in quantized.h
PANEL = 32  #: outputs of a panel


class Codes(ctypes.Structure):
    """`Codes` of quantized.h."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("bits", "n", "k", "zero", "offsets")),
        ("blocks", ctypes.c_void_p),
    ]


class Activations(ctypes.Structure):
    """`Quantised` of quantized.h."""

    _fields_: ClassVar = [(x, ctypes.c_void_p) for x in ("codes", "scale", "shift", "total")]


class NativeCodes(Linear):
    """int8 or int4 weights by groups of 32 as they are stored, times activations quantised by token
    and group; sums are exact within a group, so results are batch-invariant."""

    mode = "codes"
    batch_invariant: ClassVar[bool] = True

    @classmethod
    def takes(cls, weight: Quantized) -> bool:
        """Any `Affine` on the CPU whose groups are whole multiples of 32 inputs."""
        return (
            isinstance(weight, Affine)
            and weight.codes.device.type == "cpu"
            and weight.group % GROUP == 0
            and weight.shape[1] % GROUP == 0
            and native.available()
        )

    def __init__(self, weight: Affine, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        if not self.takes(weight):
            raise ConfigError(
                f"linear mode 'codes' takes int4 and int8 on the CPU in groups of a multiple of "
                f"{GROUP} inputs, by compiled kernels ({native.reason()}), not {weight.describe()} "
                f"on {weight.codes.device}; its dense() can be multiplied by"
            )
        self.wide_bias = None if bias is None else bias.float()
        library = native.library()
        assert library is not None
        self._run, self._run_wide = (
            library.functions[name] for name in ("quantised", "quantised_wide")
        )
        zero, offset = _zero(weight)
        per_block = PANEL * (GROUP * weight.bits // 8 + (2 if offset is None else 4))
        panels = -(-self.n_out // PANEL)
        self.packed = torch.empty(panels * (self.n_in // GROUP) * per_block, dtype=torch.uint8)
        self.codes = Codes(
            weight.bits, self.n_out, self.n_in, zero, offset is not None, self.packed.data_ptr()
        )
        codes = weight.codes.contiguous()
        if weight.bits == 8:
            codes = codes.view(torch.uint8) ^ 0x80  # signed to unsigned: 128 more
        scale = _halves(weight, weight.scale)
        shift = None if offset is None else _halves(weight, offset)
        library.pack_codes(
            ctypes.addressof(self.codes), codes.data_ptr(), scale.data_ptr(),
            None if shift is None else shift.data_ptr(), self.packed.data_ptr(),
        )  # fmt: skip
        self.weight_bytes = self.packed.numel()

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, self._run, x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """The sums as they are, never rounded to bf16."""
        return self._multiply(x, self._run_wide, torch.float32)

    def _multiply(self, x: Tensor, run: dict[torch.dtype, Any], kind: torch.dtype) -> Tensor:
        if x.dtype not in run:
            raise ConfigError(f"linear mode 'codes' takes float32 and bfloat16, not {x.dtype}")
        if x.stride(1) != 1:
            x = x.contiguous()
        t, groups = x.shape[0], self.n_in // GROUP
        codes = torch.empty((t, self.n_in), dtype=torch.int8)
        factors = torch.empty((3, t, groups), dtype=torch.float32)
        at, size = factors.data_ptr(), 4 * t * groups
        space = Activations(codes.data_ptr(), at, at + size, at + 2 * size)
        y = torch.empty((t, self.n_out), dtype=kind)
        run[x.dtype](
            ctypes.addressof(self.codes), x.data_ptr(), t, x.stride(0), ctypes.addressof(space),
            None if self.wide_bias is None else self.wide_bias.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y


def _zero(weight: Affine) -> tuple[int, Tensor | None]:
    """The code that stands for zero where it is one for the whole matrix, and offsets where not."""
    if weight.bits == 8:
        return 128, weight.offset
    if weight.offset is None:
        return 0, None
    if torch.equal(weight.offset, -8 * weight.scale):
        return 8, None
    return 0, weight.offset


def _halves(weight: Affine, factors: Tensor) -> Tensor:
    """Factors [N, K / group] as [N, K / 32] in half precision; Q4_1 and Q8_0 have no others."""
    spread = factors.repeat_interleave(weight.group // GROUP, 1)
    return spread.to(torch.float16).contiguous()
