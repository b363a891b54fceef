"""Zeroed KV storage that takes memory only where it is used."""

import math

import numpy as np
import torch
from torch import Tensor

from kvarn.kernels.attention import Ints
from kvarn.kernels.upload import upload


def zeros(shape: tuple[int, ...], kind: torch.dtype, where: torch.device) -> Tensor:
    """A zeroed tensor. On the CPU its memory comes page by page at the first write (calloc), so
    gigabytes of KV cost nothing at start-up, and nothing at all while few sequences run.
    """
    if where.type != "cpu":
        return torch.zeros(shape, dtype=kind, device=where)
    raw = np.zeros(math.prod(shape) * kind.itemsize, np.uint8)
    return torch.from_numpy(raw).view(kind).view(shape)


def move_slots(cache: Tensor, sources: Ints, targets: Ints) -> None:
    """Copy slots of a cache [pages, Hkv, 2, page, d]: all are read, then all are written."""
    size = cache.shape[3]
    arrays = [sources // size, sources % size, targets // size, targets % size]
    page, at, new_page, new_at = upload(arrays, torch.int64, cache.device)
    cache[new_page, :, :, new_at] = cache[page, :, :, at]


def keys_of_slots(cache: Tensor, slots: Tensor) -> Tensor:
    """K [n, Hkv, d] of slots [n] of such a cache."""
    size = cache.shape[3]
    return cache[slots // size, :, 0, slots % size]


def read_slots(cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [n, Hkv, d] of slots [n, Hkv] of such a cache."""
    size = cache.shape[3]
    heads = torch.arange(cache.shape[1], device=cache.device)
    page, at = slots // size, slots % size
    return cache[page, heads, 0, at], cache[page, heads, 1, at]


def write_slots(cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Put k and v [n, Hkv, d] into slots [n] of such a cache."""
    size = cache.shape[3]
    page, at = slots // size, slots % size
    cache[page, :, 0, at] = k.to(cache.dtype)
    cache[page, :, 1, at] = v.to(cache.dtype)
