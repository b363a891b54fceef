"""What lies between the qkv projection and attention, in one launch.

Normalisation of the heads of q and k, rotary embedding, and the write of k and v to their slots in
the paged cache. A program takes a few heads of one kind (q, k or v) of one row, so that a single
row already spreads over many programs. Every number is rounded to the rows' dtype where the
separate kernels round it: after the norm, after the rotation, and then to the cache's dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.core.errors import ConfigError
from kvarn.kernels.triton.dependent import can_follow, follow, options

LARGEST_FP8: tl.constexpr = tl.constexpr(448.0)

#: numbers of a program: few enough that one row fills many multiprocessors, and enough that a
#: thread moves 16 bytes at a time
TILE = 512


@triton.jit
def _heads(x, inside, HALF: tl.constexpr):
    """Both halves of the heads at `x` [H, BLOCK_D], in their own dtype."""
    return tl.load(x, mask=inside, other=0.0), tl.load(x + HALF, mask=inside, other=0.0)


@triton.jit
def _normed(first, second, weight, dim, eps, DIM: tl.constexpr):
    """RMSNorm of every head over its DIM numbers, rounded to the dtype they came in."""
    HALF: tl.constexpr = DIM // 2
    kind = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    fits = dim < HALF
    factor = tl.load(weight + dim, mask=fits, other=0.0).to(tl.float32)[None, :]
    other = tl.load(weight + HALF + dim, mask=fits, other=0.0).to(tl.float32)[None, :]
    scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / DIM + eps)[:, None]
    return (first * scale * factor).to(kind), (second * scale * other).to(kind)


@triton.jit
def _turned(first, second, cos, sin, angle, dim, HALF: tl.constexpr):
    """The heads rotated by the angles at `angle`, rounded to the dtype they came in."""
    kind = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    fits = dim < HALF
    # the halves of the tables are equal, but for the sign of the first half of the sines
    cosine = tl.load(cos + angle + dim, mask=fits, other=0.0)[None, :]
    sine = tl.load(sin + angle + HALF + dim, mask=fits, other=0.0)[None, :]
    return (
        tl.fma(first, cosine, -(second * sine)).to(kind),
        tl.fma(second, cosine, first * sine).to(kind),
    )


@triton.jit
def _store(at, first, second, inside, HALF: tl.constexpr, FP8: tl.constexpr):
    """Both halves to `at`, in its dtype; fp8 saturates."""
    kind = at.dtype.element_ty
    if FP8:
        first, second = first.to(tl.float32), second.to(tl.float32)
        first = tl.clamp(first, -LARGEST_FP8, LARGEST_FP8, propagate_nan=tl.PropagateNan.ALL)
        second = tl.clamp(second, -LARGEST_FP8, LARGEST_FP8, propagate_nan=tl.PropagateNan.ALL)
    tl.store(at, first.to(kind), mask=inside)
    tl.store(at + HALF, second.to(kind), mask=inside)


@triton.jit
def _write(cache, slot, head, dim, first, second, inside, VALUE: tl.constexpr,
           KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Keys or values of some heads to a slot of the cache; nothing where the slot is negative."""
    place = (slot // PAGE * KV_HEADS + head) * (2 * PAGE * DIM) + slot % PAGE * DIM + dim[None, :]
    if VALUE:
        place += PAGE * DIM
    _store(cache + place, first, second, inside & (slot >= 0), DIM // 2, FP8)


@triton.jit
def rope_write_row(
    qkv, positions, slots, cos, sin, q_norm, k_norm, cache, q, k, v, row_step, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    NORMED: tl.constexpr, KEEP: tl.constexpr, FP8: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs: by row, groups of q's heads, then k's, then v's."""
    HALF: tl.constexpr = DIM // 2
    Q_GROUPS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    KV_GROUPS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    GROUPS: tl.constexpr = Q_GROUPS + 2 * KV_GROUPS
    follow(PDL)
    group = tl.program_id(0) % GROUPS
    row = (tl.program_id(0) // GROUPS).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    nth = tl.arange(0, BLOCK_H)[:, None]
    source = qkv + row * row_step
    if group < Q_GROUPS:
        angle = tl.load(positions + row).to(tl.int64) * DIM
        head = group * BLOCK_H + nth
        inside = (head < HEADS) & (dim < HALF)[None, :]
        at = head * DIM + dim[None, :]
        first, second = _heads(source + at, inside, HALF)
        if NORMED:
            first, second = _normed(first, second, q_norm, dim, eps, DIM)
        first, second = _turned(first, second, cos, sin, angle, dim, HALF)
        _store(q + row * (HEADS * DIM) + at, first, second, inside, HALF, False)
    else:
        slot = tl.load(slots + row).to(tl.int64)
        if group < Q_GROUPS + KV_GROUPS:
            angle = tl.load(positions + row).to(tl.int64) * DIM
            head = (group - Q_GROUPS) * BLOCK_H + nth
            inside = (head < KV_HEADS) & (dim < HALF)[None, :]
            at = head * DIM + dim[None, :]
            first, second = _heads(source + HEADS * DIM + at, inside, HALF)
            if NORMED:
                first, second = _normed(first, second, k_norm, dim, eps, DIM)
            first, second = _turned(first, second, cos, sin, angle, dim, HALF)
            _write(cache, slot, head, dim, first, second, inside, False, KV_HEADS, DIM, PAGE, FP8)
            if KEEP:
                _store(k + row * (KV_HEADS * DIM) + at, first, second, inside, HALF, False)
        else:
            head = (group - Q_GROUPS - KV_GROUPS) * BLOCK_H + nth
            inside = (head < KV_HEADS) & (dim < HALF)[None, :]
            at = head * DIM + dim[None, :]
            first, second = _heads(source + (HEADS + KV_HEADS) * DIM + at, inside, HALF)
            _write(cache, slot, head, dim, first, second, inside, True, KV_HEADS, DIM, PAGE, FP8)
            if KEEP:
                _store(v + row * (KV_HEADS * DIM) + at, first, second, inside, HALF, False)


def rope_write(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, cache: Tensor,
    heads: int, kv_heads: int, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Rotated q [T, Hq, d] of fused rows `qkv` [T, (Hq + 2 Hkv) d]; k and v go to the cache.

    `positions` [T] index the tables `cos` and `sin` [max_len, d] (fp32, as in `Rope`); `slots` [T]
    are places in `cache` [pages, Hkv, 2, page, d], whose dtype may differ from the rows'. A row
    with a negative slot writes nothing; its position must still be in the tables.
    """
    return _launch(
        qkv, positions, slots, cos, sin, cache, (heads, kv_heads), q_norm, k_norm, eps, False
    )[0]


def rope_write_keep(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, cache: Tensor,
    heads: int, kv_heads: int, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`rope_write` that also returns the step's own rotated k and v [T, Hkv, d], packed."""
    return _launch(
        qkv, positions, slots, cos, sin, cache, (heads, kv_heads), q_norm, k_norm, eps, True
    )


def _launch(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, cache: Tensor,
    counts: tuple[int, int], q_norm: Tensor | None, k_norm: Tensor | None, eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    heads, kv_heads = counts
    rows, dim, page = qkv.shape[0], cache.shape[4], cache.shape[3]
    _check(qkv, cache, cos, sin, heads, kv_heads, (q_norm is None) == (k_norm is None))
    q = qkv.new_empty((rows, heads, dim))
    k, v = qkv.new_empty((2, rows if keep else 0, kv_heads, dim)).unbind(0)
    block_d = triton.next_power_of_2(dim // 2)
    most = triton.next_power_of_2(max(heads, kv_heads))
    block_h = max(1, min(TILE // (2 * block_d), most))
    groups = triton.cdiv(heads, block_h) + 2 * triton.cdiv(kv_heads, block_h)
    if rows:
        pdl = can_follow(qkv)
        rope_write_row[(groups * rows,)](
            qkv, positions, slots, cos, sin, q_norm, k_norm, cache, q, k, v, qkv.stride(0), eps,
            heads, kv_heads, dim, page, q_norm is not None, keep,
            cache.dtype == torch.float8_e4m3fn, block_h, block_d, pdl, num_warps=1,
            **options(pdl),
        )  # fmt: skip
    return q, k, v


def _check(
    qkv: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, paired: bool
) -> None:
    dim = cache.shape[4]
    if qkv.shape[1] != (heads + 2 * kv_heads) * dim or qkv.stride(1) != 1:
        raise ConfigError(
            f"rows of {qkv.shape[1]} numbers (step {qkv.stride(1)}) are not {heads} + 2 x "
            f"{kv_heads} packed heads of {dim}"
        )
    if cache.shape[1] != kv_heads or not cache.is_contiguous():
        raise ConfigError(
            f"the cache must be packed [pages, {kv_heads}, 2, page, {dim}], not {[*cache.shape]}"
        )
    if any(
        t.dtype != torch.float32 or t.shape[-1] != dim or t.stride(0) != dim for t in (cos, sin)
    ):
        raise ConfigError(f"the tables of angles must be packed fp32 [max_len, {dim}]")
    if not paired:
        raise ConfigError("q and k are normalised both or not at all: give two weights or none")
