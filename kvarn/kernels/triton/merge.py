"""Merge of the partial results of split tiles, in the order of their KV ranges: no atomics."""

import triton
import triton.language as tl


@triton.jit
def merge(
    merges, part_o, part_lse, o, lse,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program a row of `merges`, KV head and TILE of the BLOCK_M packed rows of the tile.

    part_o [parts, Hkv, BLOCK_M, d] and part_lse [parts, Hkv, BLOCK_M] are fp32; an empty range has
    lse = -inf.
    """
    program = tl.program_id(0)
    head = program % KV_HEADS
    entry = merges + program // KV_HEADS * 4
    row = tl.load(entry).to(tl.int64)
    n = tl.load(entry + 1)
    first = tl.load(entry + 2)
    count = tl.load(entry + 3)
    m = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, BLOCK_D)
    live = m < n * GROUP
    inside = live[:, None] & (dims < DIM)[None, :]
    peak = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, BLOCK_D], tl.float32)
    for i in range(count):
        at = ((first + i) * KV_HEADS + head).to(tl.int64) * BLOCK_M + m
        sums = tl.load(part_lse + at, mask=live, other=float("-inf"))
        some = tl.load(part_o + at[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        top = tl.maximum(peak, sums)
        pivot = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp(peak - pivot)
        weight = tl.exp(sums - pivot)
        total = total * shrink + weight
        out = out * shrink[:, None] + some * weight[:, None]
        peak = top
    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)[:, None]
    place = (row + m // GROUP) * (KV_HEADS * GROUP) + head * GROUP + m % GROUP
    tl.store(o + place[:, None] * DIM + dims[None, :], out.to(o.dtype.element_ty), mask=inside)
    if LSE:
        tl.store(lse + place, tl.where(empty, float("-inf"), peak + tl.log(total)), mask=live)
