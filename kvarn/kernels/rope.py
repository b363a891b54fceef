"""Rotary position embedding in NeoX (rotate-half) style, with linear and llama3 scaling."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvarn.core.model import RopeScaling


@dataclass(slots=True)
class Angles:
    """Cosines and signed sines of one step's rows, [T, 1, d] each; used by every layer."""

    cos: Tensor
    sin: Tensor  #: first half negated, so that rotation is x * cos + swap(x) * sin


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair of dimensions, fp32 [d / 2]."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_len / wavelength - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


class Rope:
    """Tables of angles for positions below `max_len`, fp32."""

    def __init__(
        self,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        turns = torch.outer(
            torch.arange(max_len, dtype=torch.float32), frequencies(head_dim, theta, scaling)
        )
        cos, sin = turns.cos(), turns.sin()
        self.cos = torch.cat((cos, cos), -1).to(device)
        self.sin = torch.cat((-sin, sin), -1).to(device)
        self.dtype = dtype

    def at(self, positions: Tensor) -> Angles:
        """Angles of rows at `positions` [T] (int64); once a step."""
        cos = self.cos.index_select(0, positions).unsqueeze(1)
        sin = self.sin.index_select(0, positions).unsqueeze(1)
        return Angles(cos.to(self.dtype), sin.to(self.dtype))


def apply(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    """Rotate q [T, Hq, d] and k [T, Hkv, d]; the inputs stay as they are.

    Views into one fused row (k's heads right after q's) are rotated by one set of operations.
    """
    joined = _joined(q, k)
    if joined is None:
        return _rotate(q, angles), _rotate(k, angles)
    turned = _rotate(joined, angles)
    return turned[:, : q.shape[1]], turned[:, q.shape[1] :]


def _joined(q: Tensor, k: Tensor) -> Tensor | None:
    """One view over q's and k's heads, or None where they do not lie side by side."""
    n, heads, dim = q.shape
    side_by_side = (
        q.stride() == k.stride()
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        and q.stride()[1:] == (dim, 1)
        and k.storage_offset() == q.storage_offset() + heads * dim
    )
    if not side_by_side:
        return None
    return q.as_strided((n, heads + k.shape[1], dim), q.stride(), q.storage_offset())


def _rotate(x: Tensor, angles: Angles) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return torch.addcmul(x * angles.cos, swapped, angles.sin)


def reference(x: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
    """The definition, in fp32: x [T, H, d], positions [T], inverse frequencies [d / 2]."""
    turns = torch.outer(positions.float(), inverse).unsqueeze(1)
    first, second = x.float().chunk(2, -1)
    cos, sin = turns.cos(), turns.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
