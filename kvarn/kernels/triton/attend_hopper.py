"""Attention of large query tiles over paged KV on Hopper: a program a multiprocessor.

The same operation, items and cache as `kvarn.kernels.triton.attend`, in Gluon: one warp copies
whole pages into shared memory with the tensor memory accelerator, two groups of four warps each
take 64 rows of a tile. Each group has a product of queries and keys and one of weights and
values in flight while it computes a softmax (arXiv 2407.08608). A tile is one work item and KV
head; the copies for the next tile of a program begin while the last one is being finished.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  #: of the tile, for each group of warps
COLUMNS = gl.constexpr(64)  #: 128 bytes, the widest a swizzled copy can be
MANY = 1024  #: programs from which heads take turns: the KV of one at a time stays in the L2 cache
OUTSIDE = gl.constexpr(2147483647 // 2)  #: a row that no cache has: reads as zeros


@gluon.jit
def _tile(items, nth, n_items, inner, KV_HEADS: gl.constexpr):
    """Head and item of this program's tile number `nth`; an idle one where there are no more.

    Programs take tiles in turn, every other round from the last program to the first, so that all
    get about as much of a list that is sorted by work.
    """
    program = gl.program_id(0)
    count = gl.num_programs(0)
    at = nth * count + gl.where(nth % 2 == 0, program, count - 1 - program)
    there = at < n_items * KV_HEADS
    at = gl.where(there, at, 0)
    left = at % (n_items * inner)
    head = at // (n_items * inner) * inner + left % inner
    item = items + left // inner * 8
    n = gl.where(there, gl.load(item + 1), 0)
    low = gl.load(item + 5)
    high = gl.where(n > 0, gl.load(item + 6), low)
    return (
        head, gl.load(item), n, gl.load(item + 2), gl.load(item + 3), gl.load(item + 4), low, high,
        gl.load(item + 7),
    )  # fmt: skip


@gluon.jit
def _copy(
    cache, pages, tiles, full, free, count, at, high, base, first_row,
    stride, PAGE: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Positions at .. at + BLOCK_N of all keys or all values, as block number `count`."""
    COUNT: gl.constexpr = BLOCK_N // PAGE
    PARTS: gl.constexpr = DIM // COLUMNS
    boxes: gl.constexpr = [PARTS * COUNT, PAGE, COLUMNS]
    stage = count % STAGES
    mbarrier.wait(free.index(stage), count // STAGES & 1 ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * DIM * 2)
    tile = tiles.index(stage)._reinterpret(cache.dtype, boxes, cache.layout)
    for i in gl.static_range(COUNT):
        there = at + i * PAGE < high
        page = gl.load(pages + (at - base) // PAGE + i, mask=there, other=0)
        row = gl.where(there, page * stride + first_row, OUTSIDE)
        for part in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(
                cache, [row, part * COLUMNS], full.index(stage), tile.index(part * COUNT + i)
            )


@gluon.jit
def _produce(
    cache, pages, items, n_items, inner, rounds, k_tiles, v_tiles, k_full, k_free, v_full, v_free,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the pages of every tile, keys and values of a block each in their turn."""
    count = 0
    for nth in range(rounds):
        head, _row, _n, _start, page_at, base, low, high, _part = _tile(
            items, nth, n_items, inner, KV_HEADS
        )
        for at in range(low, high, BLOCK_N):
            _copy(
                cache, pages + page_at, k_tiles, k_full, k_free, count, at, high, base,
                head * 2 * PAGE, KV_HEADS * 2 * PAGE, PAGE, DIM, BLOCK_N, STAGES,
            )  # fmt: skip
            _copy(
                cache, pages + page_at, v_tiles, v_full, v_free, count, at, high, base,
                head * 2 * PAGE + PAGE, KV_HEADS * 2 * PAGE, PAGE, DIM, BLOCK_N, STAGES,
            )  # fmt: skip
            count += 1


@gluon.jit
def _clear_beyond(
    tile, rest, nth, cleared, turn, half: gl.constexpr, PAGE: gl.constexpr, DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Zero the rows of page `nth` of a tile of values from `rest` on: they may hold anything.

    Each of the two groups clears its half of the page and waits for the other's, for the `turn`-th
    time.
    """
    COUNT: gl.constexpr = BLOCK_N // PAGE
    SHARE: gl.constexpr = PAGE // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = half * SHARE + gl.arange(0, SHARE, layout=gl.SliceLayout(1, layout))
    pieces = tile._reinterpret(tile.dtype, [DIM // COLUMNS * COUNT, PAGE, COLUMNS], tile.layout)
    for part in gl.static_range(DIM // COLUMNS):
        piece = pieces.index(part * COUNT + nth).slice(half * SHARE, SHARE)
        values = piece.load(layout)
        piece.store(gl.where((row < rest)[:, None], values, 0.0).to(tile.dtype))
    fence_async_shared()
    mbarrier.arrive(cleared)
    mbarrier.wait(cleared, turn & 1)


@gluon.jit
def _softmax(
    scores, at, low, high, positions, peak, total, scale, cap,
    WINDOW: gl.constexpr, CAPPED: gl.constexpr, MASKED: gl.constexpr, BLOCK_N: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """The weights of a block of scores in base 2, and the state after it."""
    if CAPPED:
        scores = cap * _tanh(scores * scale)
        scale = 1.0
    if MASKED:
        keys_at = at + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        visible = (keys_at[None, :] <= positions[:, None]) & (keys_at < high)[None, :]
        if WINDOW > 0:
            visible &= keys_at[None, :] > positions[:, None] - WINDOW
        scores = gl.where(visible, scores, float("-inf"))
    top = gl.maximum(peak, gl.max(scores, 1) * scale)
    pivot = top
    if MASKED:
        pivot = gl.where(top == float("-inf"), 0.0, top)
    weights = gl.exp2(scores * scale - pivot[:, None])
    shrink = gl.exp2(peak - pivot)
    return weights, top, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _tanh(x):
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _fold(
    queries, k_tiles, v_tiles, k_full, k_free, v_full, v_free, count, first, end, low, high,
    positions,
    peak, total, out, weights, scale, cap, WINDOW: gl.constexpr, CAPPED: gl.constexpr,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr,
    operand: gl.constexpr,
):  # fmt: skip
    """Blocks first .. end: scores of each while the values of the one before it are added.

    `count` blocks came before this tile.
    """
    for nth in range(first, end):
        stage = (count + nth) % STAGES
        before = (count + nth - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (count + nth) // STAGES & 1)
        nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        scores = warpgroup_mma(
            queries, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(before), (count + nth - 1) // STAGES & 1)
        out = warpgroup_mma(weights, v_tiles.index(before), out, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(k_free.index(stage))
        at = low + nth * BLOCK_N
        found, peak, total, shrink = _softmax(
            scores, at, low, high, positions, peak, total, scale, cap,
            WINDOW, CAPPED, MASKED, BLOCK_N, layout,
        )  # fmt: skip
        out = warpgroup_mma_wait(0, [out])
        mbarrier.arrive(v_free.index(before))
        weights = gl.convert_layout(found.to(v_tiles.dtype), operand)
        out = out * gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None]
    return peak, total, out, weights


@gluon.jit
def _load_queries(
    q, row, n, head, q_row, q_head, half: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr
):
    """Rows 64 * half on of a tile: [64, d]."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    m = half * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))
    spot = (row + m // GROUP).to(gl.int64) * q_row + (head * GROUP + m % GROUP) * q_head
    return gl.load(q + spot[:, None] + dims[None, :], mask=(m < n * GROUP)[:, None], other=0.0)


@gluon.jit
def _attend(
    queries, k_tiles, v_tiles, k_full, k_free, v_full, v_free, cleared, turn, count, n, start, low,
    high, scale, cap, GROUP: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr,
    WINDOW: gl.constexpr, CAPPED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    half: gl.constexpr, layout: gl.constexpr, sums: gl.constexpr, operand: gl.constexpr,
):  # fmt: skip
    """Rows 64 * half on of a tile of at least one block: peak, total, out."""
    m = half * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    positions = start + m // GROUP
    peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    out = gl.zeros([ROWS, DIM], gl.float32, sums)
    blocks = (high - low + BLOCK_N - 1) // BLOCK_N
    stage = count % STAGES
    mbarrier.wait(k_full.index(stage), count // STAGES & 1)
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    scores = warpgroup_mma(
        queries, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_free.index(stage))
    found, peak, total, _shrink = _softmax(
        scores, low, low, high, positions, peak, total, scale, cap,
        WINDOW, CAPPED, True, BLOCK_N, layout,
    )  # fmt: skip
    weights = gl.convert_layout(found.to(v_tiles.dtype), operand)
    first = start + half * ROWS // GROUP
    clear = gl.minimum(gl.maximum(gl.minimum(first + 1, high) - low, 0) // BLOCK_N, blocks)
    entered = 1
    if WINDOW > 0:
        last = start + gl.minimum((half * ROWS + ROWS - 1) // GROUP, n - 1)
        entered = (gl.maximum(last - WINDOW + 1 - low, 0) + BLOCK_N - 1) // BLOCK_N
        entered = gl.maximum(gl.minimum(entered, blocks), 1)
        peak, total, out, weights = _fold(
            queries, k_tiles, v_tiles, k_full, k_free, v_full, v_free, count, 1, entered, low,
            high, positions, peak, total, out, weights, scale, cap,
            WINDOW, CAPPED, True, BLOCK_N, STAGES, layout, operand,
        )  # fmt: skip
    clear = gl.maximum(clear, entered)
    peak, total, out, weights = _fold(
        queries, k_tiles, v_tiles, k_full, k_free, v_full, v_free, count, entered, clear, low, high,
        positions, peak, total, out, weights, scale, cap,
        0, CAPPED, False, BLOCK_N, STAGES, layout, operand,
    )  # fmt: skip
    peak, total, out, weights = _fold(
        queries, k_tiles, v_tiles, k_full, k_free, v_full, v_free, count, clear, blocks, low, high,
        positions, peak, total, out, weights, scale, cap,
        WINDOW, CAPPED, True, BLOCK_N, STAGES, layout, operand,
    )  # fmt: skip
    stage = (count + blocks - 1) % STAGES
    mbarrier.wait(v_full.index(stage), (count + blocks - 1) // STAGES & 1)
    if high % PAGE != 0:
        nth = (high - low - (blocks - 1) * BLOCK_N) // PAGE
        _clear_beyond(
            v_tiles.index(stage), high % PAGE, nth, cleared, turn, half, PAGE, DIM, BLOCK_N
        )
    out = warpgroup_mma(weights, v_tiles.index(stage), out, is_async=True)
    out = warpgroup_mma_wait(0, [out])
    mbarrier.arrive(v_free.index(stage))
    return peak, total, out


@gluon.jit
def _store(
    o, lse, part_o, part_lse, peak, total, out, row, n, head, part, KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr, DIM: gl.constexpr, LSE: gl.constexpr, half: gl.constexpr,
):  # fmt: skip
    """The results of rows 64 * half on of a tile, to their rows or to partial results."""
    layout: gl.constexpr = peak.type.layout
    sums: gl.constexpr = out.type.layout
    m = half * ROWS + gl.arange(0, ROWS, layout=layout)
    heads = head * GROUP + m % GROUP
    inside = m < n * GROUP
    empty = total == 0.0
    scaled = gl.convert_layout(gl.where(empty, 1.0, 1.0 / total), gl.SliceLayout(1, sums))
    out = out * scaled[:, None]
    found = gl.where(empty, float("-inf"), (peak + gl.log2(total)) * LN2)
    m_out = half * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, sums))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, sums))
    heads_out = head * GROUP + m_out % GROUP
    live = (m_out < n * GROUP)[:, None]
    if part >= 0:
        at_part = (part + m_out // GROUP) * (KV_HEADS * GROUP) + heads_out
        parts = part_o + at_part.to(gl.int64)[:, None] * DIM + dims[None, :]
        gl.store(parts, out, mask=live)
        gl.store(part_lse + (part + m // GROUP) * (KV_HEADS * GROUP) + heads, found, mask=inside)
    else:
        place = (row + m_out // GROUP) * (KV_HEADS * GROUP) + heads_out
        places = o + place.to(gl.int64)[:, None] * DIM + dims[None, :]
        gl.store(places, out.to(o.dtype.element_ty), mask=live)
        if LSE:
            gl.store(lse + (row + m // GROUP) * (KV_HEADS * GROUP) + heads, found, mask=inside)


@gluon.jit
def _consume(
    q, items, n_items, inner, rounds, o, lse, part_o, part_lse, q_tiles, k_tiles, v_tiles,
    k_full, k_free, v_full, v_free, cleared, q_row, q_head, scale, cap, KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, WINDOW: gl.constexpr,
    CAPPED: gl.constexpr, LSE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    half: gl.constexpr,
):  # fmt: skip
    """Rows 64 * half on of every tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    queries = q_tiles.index(half)
    count = 0
    turn = 0
    head, row, n, start, _at, _base, low, high, part = _tile(items, 0, n_items, inner, KV_HEADS)
    queries.store(_load_queries(q, row, n, head, q_row, q_head, half, GROUP, DIM))
    fence_async_shared()
    gl.thread_barrier()
    for nth in range(rounds):
        (
            next_head, next_row, next_n, next_start, _next_at, _next_base, next_low, next_high,
            next_part,
        ) = _tile(items, nth + 1, n_items, inner, KV_HEADS)  # fmt: skip
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
        out = gl.zeros([ROWS, DIM], gl.float32, sums)
        if high > low:
            peak, total, out = _attend(
                queries, k_tiles, v_tiles, k_full, k_free, v_full, v_free, cleared, turn, count, n,
                start, low, high, scale, cap, GROUP, DIM, PAGE, WINDOW, CAPPED, BLOCK_N, STAGES,
                half, layout, sums, operand,
            )  # fmt: skip
            count += (high - low + BLOCK_N - 1) // BLOCK_N
            turn += gl.where(high % PAGE != 0, 1, 0)
        coming = _load_queries(q, next_row, next_n, next_head, q_row, q_head, half, GROUP, DIM)
        _store(
            o, lse, part_o, part_lse, peak, total, out, row, n, head, part,
            KV_HEADS, GROUP, DIM, LSE, half,
        )  # fmt: skip
        gl.thread_barrier()
        queries.store(coming)
        fence_async_shared()
        gl.thread_barrier()
        head, row, n, start = next_head, next_row, next_n, next_start
        low, high, part = next_low, next_high, next_part


# how many items there are is no reason to compile anew, in the middle of serving
@gluon.jit(do_not_specialize=["n_items", "inner"])
def attend_hopper(
    q, cache, items, pages, o, lse, part_o, part_lse, q_row, q_head, scale, cap, n_items, inner,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr,
    WINDOW: gl.constexpr, CAPPED: gl.constexpr, LSE: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As `attend`, with tiles of 128 rows, for any number of programs.

    `cache` describes [pages * Hkv * 2 * page, d] in boxes of [page, 64]; `inner` heads of an item
    follow each other before the next item.
    """
    rounds = gl.cdiv(n_items * KV_HEADS, gl.num_programs(0))
    shape: gl.constexpr = cache.layout
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(q.dtype.element_ty, [2, ROWS, DIM], shape)
    k_tiles = gl.allocate_shared_memory(cache.dtype, [STAGES, BLOCK_N, DIM], shape)
    v_tiles = gl.allocate_shared_memory(cache.dtype, [STAGES, BLOCK_N, DIM], shape)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    cleared = gl.allocate_shared_memory(gl.int64, [1], bar)
    mbarrier.init(cleared, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    gl.thread_barrier()

    gl.warp_specialize(
        [
            (_consume, (
                q, items, n_items, inner, rounds, o, lse, part_o, part_lse, q_tiles, k_tiles,
                v_tiles, k_full, k_free, v_full, v_free, cleared, q_row, q_head, scale, cap,
                KV_HEADS, GROUP, DIM, PAGE, WINDOW, CAPPED, LSE, BLOCK_N, STAGES, 0,
            )),
            (_consume, (
                q, items, n_items, inner, rounds, o, lse, part_o, part_lse, q_tiles, k_tiles,
                v_tiles, k_full, k_free, v_full, v_free, cleared, q_row, q_head, scale, cap,
                KV_HEADS, GROUP, DIM, PAGE, WINDOW, CAPPED, LSE, BLOCK_N, STAGES, 1,
            )),
            (_produce, (
                cache, pages, items, n_items, inner, rounds, k_tiles, v_tiles,
                k_full, k_free, v_full, v_free, KV_HEADS, DIM, PAGE, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fits(cache: Tensor, q: Tensor) -> bool:
    """Whether `attend_chunks` takes a cache [pages, Hkv, 2, page, d] and q [T, Hq, d]."""
    if triton.knobs.runtime.interpret or cache.dtype != q.dtype or not cache.is_cuda:
        return False
    _, kv_heads, _, page, dim = cache.shape
    shapes = dim in (64, 128) and 16 <= page <= 64 and q.shape[1] // kv_heads <= ROWS.value
    kinds = q.dtype in (torch.bfloat16, torch.float16)
    return shapes and kinds and torch.cuda.get_device_capability(q.device) == (9, 0)


def attend_chunks(
    items: Tensor, pages: Tensor, cache: Tensor, q: Tensor, o: Tensor, lse: Tensor | None,
    part_o: Tensor, part_lse: Tensor, scale: float, cap: float, window: int, capped: bool,
) -> None:  # fmt: skip
    """One launch over items [n, 8] of at most 128 // group rows; the rest as `attend` takes it."""
    n_pages, kv_heads, _, page, dim = cache.shape
    group, n = q.shape[1] // kv_heads, len(items)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    boxes = TensorDescriptor(
        cache, [n_pages * kv_heads * 2 * page, dim], [dim, 1], [page, COLUMNS.value], layout
    )
    block_n, stages = (128, 2) if dim == 128 else (128, 4)
    inner = kv_heads if n * kv_heads < MANY else 1
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    attend_hopper[(min(n * kv_heads, processors),)](
        q, boxes, items, pages, o, lse, part_o, part_lse, q.stride(0), q.stride(1), scale, cap,
        n, inner, kv_heads, group, dim, page, window, capped, lse is not None, block_n, stages,
        num_warps=4,
    )  # fmt: skip
