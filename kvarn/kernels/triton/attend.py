"""Attention of query tiles over paged KV: one program a work item and KV head.

The query heads of a KV head are folded into the rows of the tile, KV is read page by page in place
and folded into a running softmax. Cache [pages, Hkv, 2, page, d]; items as in
`kvarn.kernels.attention.tiles`.
"""

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _fold(
    queries, kv, pages, at, high, base, positions, peak, total, out, scale, cap,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold positions at .. at + BLOCK_N into the state (peak, total, out), in base 2.

    `at - base` is a multiple of the smaller of PAGE and BLOCK_N.
    """
    step = tl.arange(0, BLOCK_N)
    keys_at = at + step
    dims = tl.arange(0, BLOCK_D)
    there = keys_at < high
    if WINDOW > 0:
        there &= keys_at >= base
    if PAGE <= BLOCK_N:  # whole pages: the place inside a page is the same in every round
        nth = (at - base) // PAGE + step // PAGE
        inside = step % PAGE
    else:
        nth = (keys_at - base) // PAGE
        inside = (keys_at - base) % PAGE
    if MASKED:
        page = tl.load(pages + nth, mask=there, other=0)
    else:
        page = tl.load(pages + nth)
    place = page.to(tl.int64) * (KV_HEADS * 2 * PAGE * DIM)
    spot = kv + place[:, None] + (inside * DIM)[:, None] + dims[None, :]
    if MASKED or BLOCK_D != DIM:
        seen = (there[:, None] | (not MASKED)) & (dims < DIM)[None, :]
        keys = tl.load(spot, mask=seen, other=0.0)
        values = tl.load(spot + PAGE * DIM, mask=seen, other=0.0)
    else:
        keys = tl.load(spot)
        values = tl.load(spot + PAGE * DIM)
    keys, values = keys.to(queries.dtype), values.to(queries.dtype)  # an fp8 cache
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1); 2.885... = 2 / ln 2
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores * (scale * 2.8853900817779268)) + 1.0))
        scale = 1.0
    if MASKED:
        visible = (keys_at[None, :] <= positions[:, None]) & there[None, :]
        if WINDOW > 0:
            visible &= keys_at[None, :] > positions[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    top = tl.maximum(peak, tl.max(scores, 1) * scale)
    pivot = top
    if MASKED:
        pivot = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores * scale - pivot[:, None])
    shrink = tl.exp2(peak - pivot)
    total = total * shrink + tl.sum(weights, 1)
    out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], input_precision=PRECISION)
    return top, total, out


@triton.jit
def attend(
    q, cache, items, pages, o, lse, part_o, part_lse, q_row, q_head, scale, cap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    HEAD_PAGES: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, SINKS: tl.constexpr = 0,
):  # fmt: skip
    """q [T, Hq, d] (strides q_row, q_head, 1) -> o [T, Hq, d], lse [T, Hq] or partial results.

    `scale` takes a dot product to base 2; with CAPPED it takes it to the argument of tanh, and
    `cap` is what tanh is multiplied with, in base 2. The page list of a KV head begins HEAD_PAGES
    entries after that of the head before: 0 where all heads have one. Of SINKS positions at the
    start, those behind a row's window are folded in by the item where the window begins.
    """
    program = tl.program_id(0)
    head = program % KV_HEADS
    item = items + program // KV_HEADS * 8
    row = tl.load(item).to(tl.int64)
    n = tl.load(item + 1)
    if n == 0:  # an idle item of a captured launch
        return
    start = tl.load(item + 2)
    pages += tl.load(item + 3) + head * HEAD_PAGES
    base = tl.load(item + 4)
    low = tl.load(item + 5)
    high = tl.load(item + 6)
    part = tl.load(item + 7)

    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    live = m < n * GROUP
    rows = row + m // GROUP
    heads = head * GROUP + m % GROUP
    inside = live[:, None] & (dims < DIM)[None, :]
    queries = tl.load(
        q + rows[:, None] * q_row + heads[:, None] * q_head + dims[None, :], mask=inside, other=0.0
    )
    if cache.dtype.element_ty == tl.float8e4nv:  # fp16 holds every fp8 number: one conversion
        queries = tl.clamp(queries.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    positions = start + m // GROUP
    kv = cache + head * (2 * PAGE * DIM)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    full = low
    if WINDOW == 0:  # what every row sees needs no mask
        full = low + tl.maximum(tl.minimum(start + 1, high) - low, 0) // BLOCK_N * BLOCK_N
        for at in tl.range(low, full, BLOCK_N, num_stages=STAGES):
            peak, total, out = _fold(
                queries, kv, pages, at, high, base, positions, peak, total, out, scale, cap,
                KV_HEADS, DIM, PAGE, WINDOW, CAPPED, False, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
    if SINKS > 0:  # noqa: SIM102  (known when it is compiled)
        if low <= tl.maximum(start - WINDOW + 1, 0):
            behind = positions - WINDOW  # the last that a row sees, if any
            end = tl.minimum(SINKS, tl.maximum(start + n - WINDOW, 0))
            for at in tl.range(0, end, BLOCK_N):
                peak, total, out = _fold(
                    queries, kv, pages - base // PAGE, at, end, 0, behind, peak, total, out, scale,
                    cap, KV_HEADS, DIM, PAGE, 0, CAPPED, True, BLOCK_N, BLOCK_D, PRECISION,
                )  # fmt: skip
    for at in tl.range(full, high, BLOCK_N, num_stages=STAGES):
        peak, total, out = _fold(
            queries, kv, pages, at, high, base, positions, peak, total, out, scale, cap,
            KV_HEADS, DIM, PAGE, WINDOW, CAPPED, True, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip

    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)[:, None]
    sums = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN2)
    if part >= 0:
        slot = (part + m // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + heads
        tl.store(part_o + slot[:, None] * DIM + dims[None, :], out, mask=inside)
        tl.store(part_lse + slot, sums, mask=live)
    else:
        place = rows * (KV_HEADS * GROUP) + heads
        tl.store(o + place[:, None] * DIM + dims[None, :], out.to(o.dtype.element_ty), mask=inside)
        if LSE:
            tl.store(lse + place, sums, mask=live)
