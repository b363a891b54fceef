"""Quantised matrices as checkpoints store them; a form of `Linear` takes them as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Affine:
    """w[n, k] = codes[n, k] * scale[n, k // group] + offset[n, k // group].

    Covers Q4_1 and Q8_0, GPTQ, AWQ and compressed-tensors (offset = -zero * scale), symmetric or
    not, by group or by row (group = K).
    """

    codes: Tensor  #: [N, K] uint8 (bits = 4: 0 to 15) or int8 (bits = 8: -128 to 127)
    scale: Tensor  #: [N, K / group] fp32
    offset: Tensor | None  #: [N, K / group] fp32; None: 0 everywhere
    bits: int  #: 4 or 8
    group: int  #: inputs that share a scale

    @property
    def shape(self) -> torch.Size:
        """[N, K] of the matrix."""
        return self.codes.shape

    def dense(self) -> Tensor:
        """The matrix in fp32."""
        codes = self.codes.float().view(len(self.codes), -1, self.group)
        wide: Tensor = codes * self.scale[:, :, None]
        if self.offset is not None:
            wide += self.offset[:, :, None]
        return wide.flatten(1)

    def describe(self) -> str:
        """For messages: "int4 in groups of 32"."""
        how = "with a scale a row" if self.group == self.shape[1] else f"in groups of {self.group}"
        return f"int{self.bits} {how}"


@dataclass(slots=True)
class Float8:
    """w[n, k] = codes[n, k] * scale[n], codes in float8_e4m3fn."""

    codes: Tensor  #: [N, K] float8_e4m3fn
    scale: Tensor  #: [N] fp32, or [1] for one scale a matrix

    @property
    def shape(self) -> torch.Size:
        """[N, K] of the matrix."""
        return self.codes.shape

    def dense(self) -> Tensor:
        """The matrix in fp32."""
        return self.codes.float() * self.scale[:, None]

    def describe(self) -> str:
        """For messages: "fp8 with a scale a row"."""
        return f"fp8 with a scale {'a row' if len(self.scale) > 1 else 'a matrix'}"


Quantized = Affine | Float8
Stored = Tensor | Quantized
