"""y = x W^T + b: one file a form, `make_linear` picks one by name."""

from typing import Literal

from torch import Tensor

from kvarn.core.errors import ConfigError, nearest
from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.compiled import Native
from kvarn.kernels.linear.dense import Invariant, Packed, Plain
from kvarn.kernels.linear.dynamic_int8 import Int8

Mode = Literal["plain", "packed", "native", "int8", "invariant"]

#: forms that keep the weight as it is: a tied output matrix is no copy
SHARES_MEMORY: tuple[Mode, ...] = ("plain", "invariant")

FORMS: dict[str, type[Linear]] = {
    form.mode: form for form in (Plain, Packed, Native, Int8, Invariant)
}


def make_linear(weight: Tensor, bias: Tensor | None = None, mode: Mode = "plain") -> Linear:
    """A `Linear` of `weight` [N, K] and `bias` [N] in one of `FORMS`."""
    if mode not in FORMS:
        raise ConfigError(f"unknown linear mode {mode!r}{nearest(mode, FORMS)}")
    return FORMS[mode](weight, bias)
