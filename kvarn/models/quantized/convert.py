"""Which number format each matrix is held in, and its conversion on the way from file to device."""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from kvarn.kernels.linear import form_of
from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.quantize import (
    GROUP,
    cut,
    expanded,
    moved,
    to_float8,
    to_int4,
    to_int8,
)
from kvarn.kernels.linear.stored import Float8, Quantized, Stored
from kvarn.models.weights import Part

Kind = Literal["none", "int8", "int4", "fp8"]
KINDS: tuple[Kind, ...] = ("none", "int8", "int4", "fp8")

#: how a dense matrix becomes one of each kind
MAKERS: Mapping[str, Callable[[Tensor], Quantized]] = {
    "int8": lambda weight: to_int8(weight, _int8_group(weight)),
    "int4": to_int4,
    "fp8": to_float8,
}
#: the output matrix, by the kind of the others: where mistakes show first it has eight bits or more
HEADS: Mapping[Kind, Kind] = {"none": "none", "int8": "int8", "int4": "int8", "fp8": "none"}


def _int8_group(weight: Tensor) -> int | None:
    """Groups on the CPU, whose kernel sums by group and so has them for nothing; rows elsewhere."""
    n_in = weight.shape[1]
    if weight.device.type != "cpu" or n_in % GROUP:
        return None
    return GROUP if form_of(to_int8(weight[:1], GROUP)) is not None else None


class Source(Protocol):
    """Weights as they come from a file or a generator."""

    def read(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """See `Weights.read`; `part` alone where it is given."""
        ...

    def stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        """See `Weights.stored`."""
        ...


def kind_for(name: str, n_in: int, quantization: Kind) -> Kind:
    """The kind that matrix `name` of `n_in` inputs is held in.

    Widths that groups of four bits do not divide get eight.
    """
    kind = HEADS[quantization] if is_output(name) else quantization
    return "int8" if kind == "int4" and n_in % GROUP else kind


def is_output(name: str) -> bool:
    """Whether the matrix is the output projection (tied: the embedding)."""
    return name in ("lm_head.weight", "embed_tokens.weight")


def kind_of(weight: Stored) -> Kind:
    """The kind of a matrix as it is."""
    if isinstance(weight, Tensor):
        return "none"
    return "fp8" if isinstance(weight, Float8) else cast(Kind, f"int{weight.bits}")


def form_on(device: torch.device, kind: Kind) -> type[Linear] | None:
    """What multiplies on `device` by matrices of a quantised kind, as `MAKERS` make them."""
    return form_of(MAKERS[kind](torch.zeros(64, 256, device=device)))


def usable(kind: Kind, device: torch.device) -> bool:
    """Whether the option can have this value on the device."""
    return kind == "none" or form_on(device, kind) is not None


class Converted:
    """`Weights` in which every matrix is held as `quantization` says.

    What the source holds in that kind already stays as it is where a linear layer takes it so, and
    the rest is made anew on the device. With `keep`, matrices that the source leaves dense stay
    dense: a quantised checkpoint has its reasons.
    """

    def __init__(
        self, source: Source, quantization: Kind, device: torch.device, keep: bool = False
    ) -> None:
        self.source, self.quantization, self.device, self.keep = source, quantization, device, keep

    def read(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """See `Weights.read`."""
        return self.source.read(name, shape, part)

    def stored(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Stored:
        """See `Weights.stored`; with `part`, that block of the converted matrix."""
        if self.quantization == "none":
            return self.source.read(name, shape, part)
        weight = self._converted(name, shape)
        return weight if part is None else cut(weight, part[0], part[1])

    def _converted(self, name: str, shape: tuple[int, ...]) -> Stored:
        weight = self.source.stored(name, shape)
        wanted = kind_for(name, shape[1], self.quantization)
        if isinstance(weight, Tensor):
            if self.keep or wanted == "none":
                return weight
        elif kind_of(weight) == wanted or is_output(name):
            here = cast(Quantized, moved(weight, self.device))
            if form_of(here) is not None:
                return here
        if wanted == "none":
            return expanded(weight)
        return MAKERS[wanted](expanded(moved(weight, self.device)))
