"""Merge of partial results, in the order of their lists: no atomics."""

import triton
import triton.language as tl

BLOCK_E, WARPS = 4, 1  #: entries folded at a time, warps of a program


@triton.jit
def merge(
    merges, entries, part_o, part_lse, o, lse,
    HEADS: tl.constexpr, DIM: tl.constexpr, LSE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a row of `merges` [m, 3] (flattened row, its first entry, entries) and head.

    `entries` are slots of part_o [slots, Hq, d] and part_lse [slots, Hq], both fp32; an empty range
    has lse = -inf. Idle rows of `merges` have no entries and write nothing.
    """
    merges += tl.program_id(0) * 3
    head = tl.program_id(1)
    row = tl.load(merges).to(tl.int64)
    entries += tl.load(merges + 1)
    count = tl.load(merges + 2)
    nth = tl.arange(0, BLOCK_E)
    dims = tl.arange(0, BLOCK_D)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    out = tl.zeros([BLOCK_D], tl.float32)
    for at in range(0, count, BLOCK_E):
        there = at + nth < count
        slot = tl.load(entries + at + nth, mask=there, other=0).to(tl.int64) * HEADS + head
        sums = tl.load(part_lse + slot, mask=there, other=float("-inf"))
        inside = there[:, None] & (dims < DIM)[None, :]
        some = tl.load(part_o + slot[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        top = tl.maximum(peak, tl.max(sums, 0))
        pivot = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp(peak - pivot)
        weights = tl.exp(sums - pivot)
        total = total * shrink + tl.sum(weights, 0)
        out = out * shrink + tl.sum(some * weights[:, None], 0)
        peak = top
    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)
    place = row * HEADS + head
    inside = (dims < DIM) & (count > 0)
    tl.store(o + place * DIM + dims, out.to(o.dtype.element_ty), mask=inside)
    if LSE:
        sums = tl.where(empty, float("-inf"), peak + tl.log(total))
        tl.store(lse + place, sums, mask=count > 0)
