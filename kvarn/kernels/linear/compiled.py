"""Dense weights through the compiled CPU kernels."""

from typing import Any

import torch
from torch import Tensor

from kvarn.core.errors import ConfigError
from kvarn.kernels import native
from kvarn.kernels.linear.base import Linear

PANEL = 32  #: outputs of a panel, as in linear.cpp


class Native(Linear):
    """The compiled kernel on panels of 32 outputs; batch-invariant (bf16 with even n_in, fp32)."""

    mode = "native"
    batch_invariant = True

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
        rows = weight.contiguous()  # a name keeps a copy alive while it is read
        pack(rows.data_ptr(), self.n_out, self.n_in, self.packed.data_ptr())
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
