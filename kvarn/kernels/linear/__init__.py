"""y = x W^T + b: one file a form; `make_linear` picks one by name, or by what a matrix holds."""

from typing import Literal

from torch import Tensor

from kvarn.core.errors import ConfigError, nearest
from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.codes import NativeCodes
from kvarn.kernels.linear.compiled import Native
from kvarn.kernels.linear.dense import Invariant, Packed, Plain
from kvarn.kernels.linear.dynamic_int8 import Int8
from kvarn.kernels.linear.fp8 import Fp8Cuda
from kvarn.kernels.linear.invariant_cuda import InvariantCuda
from kvarn.kernels.linear.small_m import SmallM
from kvarn.kernels.linear.stored import Quantized, Stored
from kvarn.kernels.linear.weight_only import WeightOnly

Mode = Literal["plain", "packed", "native", "small_m", "invariant"]

#: forms that keep the weight as it is: a tied output matrix is no copy
SHARES_MEMORY: tuple[Mode, ...] = ("plain", "small_m", "invariant")

#: forms of dense matrices, by name
FORMS: dict[str, type[Linear]] = {
    form.mode: form for form in (Plain, Packed, Native, SmallM, Invariant)
}

#: what a form is on a GPU, where that is another class
ON_CUDA: dict[str, type[Linear]] = {"invariant": InvariantCuda}

#: forms of quantised matrices: the first that takes a matrix is used
QUANTIZED: tuple[type[Linear], ...] = (NativeCodes, Int8, Fp8Cuda, WeightOnly)


def make_linear(weight: Stored, bias: Tensor | None = None, mode: Mode = "plain") -> Linear:
    """A `Linear` of `weight` [N, K] and `bias` [N].

    A dense weight takes the form `mode`, a quantised one the first form that can; `ConfigError`
    where there is none.
    """
    if isinstance(weight, Tensor):
        if mode not in FORMS:
            raise ConfigError(f"unknown linear mode {mode!r}{nearest(mode, FORMS)}")
        forms = FORMS | ON_CUDA if weight.is_cuda else FORMS
        return forms[mode](weight, bias)
    form = form_of(weight)
    if form is None:
        raise ConfigError(
            f"no linear layer here multiplies by {weight.describe()} on {weight.codes.device}; "
            f"its dense() can be"
        )
    return form(weight, bias)


def form_of(weight: Quantized) -> type[Linear] | None:
    """The form that multiplies by a quantised matrix as it is, None where there is none."""
    return next((form for form in QUANTIZED if form.takes(weight)), None)
