"""Choosing pages by the bounds of their keys: bounds of new pages, scores of all, the best of them.

Sketches [pages, Hkv, 2, d] hold the least and the largest of each number of a page's keys.
"""

import triton
import triton.language as tl


@triton.jit
def sketch_pages(
    cache, sketch, pages,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a page of `pages` and KV head; cache [pages, Hkv, 2, page, d]; -1: no page."""
    page = tl.load(pages + tl.program_id(0)).to(tl.int64)
    if page < 0:
        return
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    nth = tl.arange(0, PAGE)
    inside = dims < DIM
    place = cache + (page * KV_HEADS + head) * (2 * PAGE * DIM)
    keys = tl.load(
        place + nth[:, None] * DIM + dims[None, :], mask=inside[None, :] & (nth >= 0)[:, None],
        other=0.0,
    ).to(tl.float32)  # fmt: skip
    there = sketch + (page * KV_HEADS + head) * (2 * DIM) + dims
    tl.store(there, tl.min(keys, 0).to(sketch.dtype.element_ty), mask=inside)
    tl.store(there + DIM, tl.max(keys, 0).to(sketch.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["wide"])
def bound_pages(
    q, sketch, rows, table, entries, counts, scores, q_row, q_head, wide,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [R, Hkv, wide] of all pages but the last of each row: the largest bound of a head's
    queries. One program a row, KV head and block of pages. A row without pages idles.

    A positive number of q meets the largest of the keys, a negative one the least.
    """
    nth = tl.program_id(0)
    row, head = nth // KV_HEADS, nth % KV_HEADS
    count = tl.load(counts + row) - 1
    first = tl.program_id(1) * BLOCK_P
    if first >= count:
        return
    at = first + tl.arange(0, BLOCK_P)
    mine = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    there = at < count
    place = tl.load(rows + row).to(tl.int64) * q_row + (head * GROUP + mine) * q_head
    fits = (dims < DIM)[None, :]
    queries = tl.load(
        q + place[:, None] + dims[None, :], mask=(mine < GROUP)[:, None] & fits, other=0.0
    )
    if sketch.dtype.element_ty == tl.float8e4nv:  # as in `attend`
        queries = tl.clamp(queries.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    page = tl.load(table + tl.load(entries + row) + at, mask=there, other=0).to(tl.int64)
    spot = sketch + (page * KV_HEADS + head)[:, None] * (2 * DIM) + dims[None, :]
    inside = there[:, None] & fits
    low = tl.load(spot, mask=inside, other=0.0).to(queries.dtype)
    high = tl.load(spot + DIM, mask=inside, other=0.0).to(queries.dtype)
    up = tl.where(queries > 0, queries, 0.0).to(queries.dtype)
    down = tl.where(queries < 0, queries, 0.0).to(queries.dtype)
    bound = tl.dot(high, tl.trans(up), input_precision=PRECISION)
    bound = tl.dot(low, tl.trans(down), bound, input_precision=PRECISION)
    best = tl.max(tl.where((mine < GROUP)[None, :], bound, float("-inf")), 1)
    tl.store(scores + nth.to(tl.int64) * wide + at, best, mask=there)


@triton.jit(do_not_specialize=["wide", "most"])
def pick_pages(
    scores, table, entries, counts, keeps, places, chosen, wide, most,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pages that each row sees, `keeps` of its `counts`, in their order, to chosen
    [n, Hkv, most] at the row's place. A row without pages idles.

    The first and the last always; ties go to earlier pages. One program a row and KV head finds the
    score that just enough pages reach, bit by bit.
    """
    nth = tl.program_id(0)
    row, head = nth // KV_HEADS, nth % KV_HEADS
    count = tl.load(counts + row) - 1
    if count < 0:
        return
    keep = tl.load(keeps + row) - 1
    at = tl.arange(0, BLOCK)
    there = at < count
    bound = tl.load(scores + nth.to(tl.int64) * wide + at, mask=there, other=float("-inf"))
    bound = tl.where(at == 0, float("inf"), bound)
    bits = bound.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) | (-2147483647 - 1))  # as unsigned numbers, in the order of floats
    order = tl.where(there, order, 0).to(tl.uint32, bitcast=True)
    least = tl.full([], 0, tl.uint32)
    step = tl.full([], 1 << 31, tl.uint32)
    for _ in range(32):
        higher = least | step
        enough = tl.sum((order >= higher).to(tl.int32), 0) >= keep
        least = tl.where(enough, higher, least)
        step = step >> 1
    above = order > least
    equal = (order == least) & there
    room = keep - tl.sum(above.to(tl.int32), 0)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    pages = table + tl.load(entries + row)
    out = chosen + (tl.load(places + row).to(tl.int64) * KV_HEADS + head) * most
    tl.store(out + place, tl.load(pages + at, mask=there, other=0), mask=taken)
    tl.store(out + keep, tl.load(pages + count))
