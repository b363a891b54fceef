"""Random weights of a given shape: for speed and memory, never for quality."""

import math
import zlib

import torch
from torch import Tensor

from kvarn.kernels.linear.quantize import GROUP
from kvarn.kernels.linear.stored import Affine, Float8, Stored
from kvarn.models.quantized.convert import Kind, kind_for
from kvarn.models.weights import Part

POOL = 4_194_301  #: numbers drawn; a prime, so that rows do not line up
CODE_SPREAD = {"int4": 4.61, "int8": 73.6}  #: standard deviation of evenly drawn codes
FLOAT8_SPREAD = 64.0  #: standard deviation of normal numbers as fp8 codes: few beyond 448


class RandomWeights:
    """`Weights` cut from one pool of numbers at a place that follows from seed and name.

    Filling billions of weights from a generator takes minutes on a CPU; copying takes seconds.
    Matrices have variance 1 / fan-in, biases are small, norms are 1 (`norm_offset` included).
    Quantised matrices are codes from a pool of codes: nothing is ever held or filled in a wider
    format than it is used in.
    """

    def __init__(
        self,
        seed: int,
        norm_offset: float,
        dtype: torch.dtype,
        device: torch.device | str,
        quantization: Kind = "none",
    ) -> None:
        self.seed, self.norm_offset, self.quantization = seed, norm_offset, quantization
        self.dtype, self.device = dtype, torch.device(device)
        self._pools: dict[float | Kind, Tensor] = {}
        self._normal: Tensor | None = None

    def read(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """See `Weights.read`; every name exists. `part` is cut from the whole."""
        if part is not None:
            return self.read(name, shape)[part]
        if "norm" in name:
            return torch.full(shape, 1.0 - self.norm_offset, dtype=self.dtype, device=self.device)
        scale = 0.02 if len(shape) == 1 else shape[-1] ** -0.5
        return self._fill(name, shape, scale)

    def stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        """See `Weights.stored`: of the kind that the quantisation gives this matrix."""
        kind = kind_for(name, shape[1], self.quantization)
        if kind == "none":
            return self.read(name, shape)
        (n, k), wide = shape, torch.float32
        codes = self._fill(name, shape, kind)
        if kind == "fp8":
            scale = k**-0.5 / FLOAT8_SPREAD
            return Float8(codes, torch.full((n,), scale, dtype=wide, device=self.device))
        bits, group = (4, GROUP) if kind == "int4" else (8, k)
        scale = k**-0.5 / CODE_SPREAD[kind]
        scales = torch.full((n, k // group), scale, dtype=wide, device=self.device)
        return Affine(codes, scales, scales * -7.5 if bits == 4 else None, bits, group)

    def _fill(self, name: str, shape: tuple[int, ...], what: float | Kind) -> Tensor:
        """A tensor of numbers of the pool `what`: two copies, whatever its size."""
        twice = self._pool(what)
        start = zlib.crc32(name.encode(), self.seed & 0xFFFFFFFF) % POOL
        turned = twice[start : start + POOL]
        n = math.prod(shape)
        out = torch.empty(n, dtype=twice.dtype, device=self.device)
        whole = n // POOL * POOL
        out[:whole].view(-1, POOL).copy_(turned)
        out[whole:].copy_(turned[: n - whole])
        return out.view(torch.float8_e4m3fn if what == "fp8" else out.dtype).view(shape)

    def _pool(self, what: float | Kind) -> Tensor:
        """The pool twice over, made once: normals of a standard deviation, or codes of a kind."""
        if what not in self._pools:
            made = self._numbers(what).to(self.device)
            self._pools[what] = torch.cat([made, made])
        return self._pools[what]

    def _numbers(self, what: float | Kind) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if what == "int4":
            return torch.randint(0, 16, (POOL,), dtype=torch.uint8, generator=generator)
        if what == "int8":
            return torch.randint(-127, 128, (POOL,), dtype=torch.int8, generator=generator)
        if self._normal is None:
            self._normal = torch.randn(POOL, generator=generator)
        if what == "fp8":
            codes = (self._normal * FLOAT8_SPREAD).clamp(-448, 448).to(torch.float8_e4m3fn)
            return codes.view(torch.uint8)
        assert isinstance(what, float)
        return (self._normal * what).to(self.dtype)
