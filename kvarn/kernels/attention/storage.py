"""Zeroed KV storage that takes memory only where it is used."""

import math

import numpy as np
import torch
from torch import Tensor


def zeros(shape: tuple[int, ...], kind: torch.dtype, where: torch.device) -> Tensor:
    """A zeroed tensor. On the CPU its memory comes page by page at the first write (calloc), so
    gigabytes of KV cost nothing at start-up, and nothing at all while few sequences run.
    """
    if where.type != "cpu":
        return torch.zeros(shape, dtype=kind, device=where)
    raw = np.zeros(math.prod(shape) * kind.itemsize, np.uint8)
    return torch.from_numpy(raw).view(kind).view(shape)
