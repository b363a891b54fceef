"""Random weights of a given shape: for speed and memory, never for quality."""

import math
import zlib

import torch
from torch import Tensor

POOL = 4_194_301  #: normal numbers drawn; a prime, so that rows do not line up


class RandomWeights:
    """`Weights` cut from one pool of normals at a place that follows from seed and name.

    Filling billions of weights from a generator takes minutes on a CPU; copying takes seconds.
    Matrices have variance 1 / fan-in, biases are small, norms are 1 (`norm_offset` included).
    """

    def __init__(
        self, seed: int, norm_offset: float, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.seed, self.norm_offset = seed, norm_offset
        self.dtype, self.device = dtype, torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        self.pool = torch.randn(POOL, generator=generator).to(self.device, dtype)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `Weights.read`; every name exists."""
        if "norm" in name:
            return torch.full(shape, 1.0 - self.norm_offset, dtype=self.dtype, device=self.device)
        start = zlib.crc32(name.encode(), self.seed & 0xFFFFFFFF) % POOL
        n = math.prod(shape)
        out = torch.empty(n, dtype=self.dtype, device=self.device)
        at = 0
        while at < n:
            piece = self.pool[start : start + n - at]
            out[at : at + len(piece)] = piece
            at, start = at + len(piece), 0
        scale = 0.02 if len(shape) == 1 else shape[-1] ** -0.5
        return out.mul_(scale).view(shape)
