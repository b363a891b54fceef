"""Dense matrices to quantised ones; joining and cutting matrices in the form they are stored in."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvarn.kernels.linear.stored import Affine, Float8, Quantized, Stored

GROUP = 32  #: inputs that share a scale where we choose; as in Q4_1
FLOAT8_MOST = 448.0  #: largest float8_e4m3fn
#: shares of a group's range that int4 tries: what lies outside is clipped
SHRINKS = (1.0, 0.92, 0.84)
BLOCK = 1 << 18  #: weights quantised at a time: temporaries stay in the cache [elements]


def to_int8(weight: Tensor, group: int | None = None) -> Affine:
    """Symmetric, one scale a row or a group of inputs, from [N, K] of any float dtype."""
    n, k = weight.shape
    group = group or k
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scale = torch.empty(n, k // group, dtype=torch.float32, device=weight.device)
    rows = _rows(weight)
    for at in range(0, n, rows):
        part = weight[at : at + rows].float().view(-1, k // group, group)
        most = part.abs().amax(2).clamp_min_(1e-12) / 127.0
        codes[at : at + rows] = (part / most[:, :, None]).round_().clamp_(-127, 127).flatten(1)
        scale[at : at + rows] = most
    return Affine(codes, scale, None, 8, group)


def to_int4(weight: Tensor, group: int = GROUP) -> Affine:
    """Scale and minimum a group of inputs, from [N, K] of any float dtype; K a multiple of group.

    Each group takes the clipping of `SHRINKS` with the least squared error, its scale and offset
    refitted to the rounded codes by least squares.
    """
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n, k // group, dtype=torch.float32, device=weight.device)
    offset = torch.empty_like(scale)
    rows = _rows(weight)
    for at in range(0, n, rows):
        part = weight[at : at + rows].float().view(-1, group)
        found = _best_clipping(part)
        codes[at : at + rows] = found[0].view(-1, k)
        scale[at : at + rows] = found[1].view(-1, k // group)
        offset[at : at + rows] = found[2].view(-1, k // group)
    return Affine(codes, scale, offset, 4, group)


def _best_clipping(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, offset) of groups x [G, group], fp32."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    middle, half = (low + high) / 2, ((high - low) / 2).clamp_min_(1e-12)
    centred = x - x.mean(1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = x.new_full(low.shape, math.inf)
    for shrink in SHRINKS:
        step = half * (shrink * 2 / 15)
        codes = ((x - (middle - half * shrink)) / step).round_().clamp_(0, 15)
        mean = codes.mean(1, keepdim=True)
        spread = codes - mean
        # least squares: the line through (codes, x)
        slope = (spread * centred).sum(1, keepdim=True)
        slope /= spread.square().sum(1, keepdim=True).clamp_min_(1e-12)
        error = (centred - spread * slope).square().sum(1, keepdim=True)
        offset = x.mean(1, keepdim=True) - slope * mean
        if best is None:
            best, least = (codes, slope, offset), error
            continue
        better = error < least
        best = (
            torch.where(better, codes, best[0]),
            torch.where(better, slope, best[1]),
            torch.where(better, offset, best[2]),
        )
        least = torch.minimum(error, least)
    assert best is not None
    return best


def to_float8(weight: Tensor) -> Float8:
    """One scale a row, from [N, K] of any float dtype."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = weight.abs().amax(1).float().clamp_min(1e-12) / FLOAT8_MOST
    rows = _rows(weight)
    for at in range(0, len(weight), rows):
        part = weight[at : at + rows].float() / scale[at : at + rows, None]
        codes[at : at + rows] = part.clamp_(-FLOAT8_MOST, FLOAT8_MOST).to(torch.float8_e4m3fn)
    return Float8(codes, scale)


def _rows(weight: Tensor) -> int:
    """Rows converted at a time: few on the CPU, whose caches are small; all of them on a GPU."""
    block = BLOCK if weight.device.type == "cpu" else BLOCK << 8
    return max(1, block // weight.shape[1])


def moved(weight: Stored, device: torch.device) -> Stored:
    """The matrix on `device`, as it is."""
    if isinstance(weight, Tensor):
        return weight.to(device)
    if isinstance(weight, Float8):
        return Float8(weight.codes.to(device), weight.scale.to(device))
    offset = None if weight.offset is None else weight.offset.to(device)
    codes, scale = weight.codes.to(device), weight.scale.to(device)
    return Affine(codes, scale, offset, weight.bits, weight.group)


def expanded(weight: Stored) -> Tensor:
    """The matrix as a dense tensor: fp32 where it was quantised."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def rows_of(weight: Quantized, at: slice | Tensor) -> Quantized:
    """Some rows of a matrix, by slice or by index."""
    if isinstance(weight, Float8):
        scale = weight.scale.expand(weight.shape[0])[at]
        return Float8(weight.codes.view(torch.uint8)[at].view(torch.float8_e4m3fn), scale)
    offset = None if weight.offset is None else weight.offset[at]
    return Affine(weight.codes[at], weight.scale[at], offset, weight.bits, weight.group)


def cut(weight: Stored, rows: slice, columns: slice) -> Stored:
    """A block of a matrix; of a quantised one, columns from and to multiples of its group.

    Raises `ValueError` for columns inside a group (a scale a row is shared by all of its parts).
    """
    if isinstance(weight, Tensor):
        return weight[rows, columns]
    part = rows_of(weight, rows)
    start, stop, _ = columns.indices(weight.shape[1])
    if isinstance(part, Float8):
        return Float8(part.codes[:, start:stop], part.scale)
    if part.group == weight.shape[1]:
        return Affine(part.codes[:, start:stop], part.scale, part.offset, part.bits, stop - start)
    if start % part.group or stop % part.group:
        raise ValueError(f"columns {start} to {stop} cut a group of {part.group}")
    groups = slice(start // part.group, stop // part.group)
    offset = None if part.offset is None else part.offset[:, groups]
    codes = part.codes[:, start:stop]
    return Affine(codes, part.scale[:, groups], offset, part.bits, part.group)


def joined(parts: Sequence[Stored]) -> Stored:
    """Matrices of one input, one below the other, as they are stored; dense where kinds differ."""
    if len(parts) == 1:
        return parts[0]
    floats = [part for part in parts if isinstance(part, Float8)]
    if len(floats) == len(parts):
        codes = torch.cat([part.codes.view(torch.uint8) for part in floats])
        scale = torch.cat([part.scale.expand(part.shape[0]) for part in floats])
        return Float8(codes.view(torch.float8_e4m3fn), scale)
    affine = [part for part in parts if isinstance(part, Affine)]
    if len(affine) == len(parts) and len({part.bits for part in affine}) == 1:
        return _joined_affine(affine)
    dense = [expanded(part) for part in parts]
    return torch.cat([part.to(dense[0].dtype) for part in dense])


def _joined_affine(parts: Sequence[Affine]) -> Affine:
    """Parts of equal bits, in the largest group that divides each of theirs."""
    group = math.gcd(*(part.group for part in parts))
    codes = torch.cat([part.codes for part in parts])
    scale = torch.cat([part.scale.repeat_interleave(part.group // group, 1) for part in parts])
    if all(part.offset is None for part in parts):
        return Affine(codes, scale, None, parts[0].bits, group)
    offsets = [
        torch.zeros_like(part.scale) if part.offset is None else part.offset for part in parts
    ]
    offset = torch.cat(
        [x.repeat_interleave(part.group // group, 1) for x, part in zip(offsets, parts)]
    )
    return Affine(codes, scale, offset, parts[0].bits, group)
