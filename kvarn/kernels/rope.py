"""Rotary position embedding in NeoX (rotate-half) style, with linear and llama3 scaling."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvarn.core.model import RopeScaling
from kvarn.kernels import native
from kvarn.kernels.timing import compare


@dataclass(slots=True)
class Angles:
    """Cosines and signed sines of one step's rows, fp32 [T, 1, d] each; used by every layer."""

    cos: Tensor
    sin: Tensor  #: first half negated, so that rotation is x * cos + swap(x) * sin
    narrow: tuple[Tensor, Tensor] | None = None  #: the same in the model's dtype, for torch's form


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
        if self.dtype == torch.float32 or cos.is_cuda or native.available():
            return Angles(cos, sin)
        return Angles(cos, sin, (cos.to(self.dtype), sin.to(self.dtype)))


def turned(x: Tensor, table: Rope, by: Tensor) -> Tensor:
    """Rotated x [n, s, H, d] rotated further by `by` [n] positions (int64, of either sign), in x's
    dtype."""
    cos, sin = (part.index_select(0, by.abs())[:, None, None] for part in (table.cos, table.sin))
    sin = sin * by.sign()[:, None, None, None]
    wide = x.float()
    half = x.shape[-1] // 2
    return (wide * cos + wide.roll(half, -1) * sin).to(x.dtype)


def apply(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    """Rotate q [T, Hq, d] and k [T, Hkv, d]; the inputs stay as they are.

    Views into one fused row (k's heads right after q's) are rotated by one operation.
    """
    if q.is_cuda and not q.requires_grad:
        from kvarn.kernels.triton.rope import rotate

        return rotate(q, k, angles.cos, angles.sin)
    t, heads, dim = q.shape
    more = k.shape[1]
    strides = q.stride()
    side_by_side = (
        k.data_ptr() == q.data_ptr() + heads * dim * q.element_size()
        and k.stride() == strides
        and strides[1] == dim
        and strides[2] == 1
    )
    if not side_by_side:
        return _rotate(q, angles), _rotate(k, angles)
    out = _rotate(q.as_strided((t, heads + more, dim), strides), angles)
    turned_q, turned_k = out.split_with_sizes((heads, more), 1)
    return turned_q, turned_k


def _rotate(x: Tensor, angles: Angles) -> Tensor:
    """x [T, H, d] turned, in new memory."""
    kernel = native.kernel("rope", x)
    t, heads, dim = x.shape
    if kernel is None or x.stride(2) != 1 or x.stride(1) != dim:
        return plain(x, angles)
    out = torch.empty((t, heads, dim), dtype=x.dtype)
    kernel(
        x.data_ptr(), t, heads, dim, x.stride(0), angles.cos.data_ptr(), angles.sin.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    return out


def plain(x: Tensor, angles: Angles) -> Tensor:
    """The form in torch."""
    half = x.shape[-1] // 2
    cos, sin = angles.narrow or (angles.cos, angles.sin)
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def reference(x: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
    """The definition, in fp32: x [T, H, d], positions [T], inverse frequencies [d / 2]."""
    turns = torch.outer(positions.float(), inverse).unsqueeze(1)
    first, second = x.float().chunk(2, -1)
    cos, sin = turns.cos(), turns.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def bench() -> None:
    """q and k of 9 + 3 heads of 64 in one fused row: one row, 16 rows and 512 rows, bf16."""
    rope = Rope(64, 1e5, None, 1024, torch.bfloat16, "cpu")
    for rows in (1, 16, 512):
        qkv = torch.randn(rows, 15, 64).bfloat16()
        angles = rope.at(torch.arange(rows))
        angles.narrow = (angles.cos.bfloat16(), angles.sin.bfloat16())
        compare(
            f"rope [{rows}, 9 + 3, 64] bf16",
            torch=lambda: plain(qkv[:, :12], angles),  # noqa: B023
            in_force=lambda: apply(qkv[:, :9], qkv[:, 9:12], angles),  # noqa: B023
        )


if __name__ == "__main__":
    bench()
