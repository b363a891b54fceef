"""y = x W^T + b for few rows x: W streams through the tensor cores as their wide operand.

Roles are swapped: a tile of W is the first operand, [BLOCK_N, BLOCK_K], the rows of x the narrow
second one. K can be split over programs; the last to arrive at a tile adds the parts in their
order, so a result never depends on which that was.
"""

import triton
import triton.language as tl

from kvarn.kernels.triton.stream import activate, begin


@triton.jit
def _weights(
    w, tiles, rows, first, at, k,
    TMA: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of W: rows from `first`, columns from `at`; nothing beyond column k."""
    if TMA:
        return tiles.load([first, at])
    inner = at + tl.arange(0, BLOCK_K)
    spot = w + rows[:, None] * k + inner[None, :]
    if EVEN:
        return tl.load(spot, eviction_policy="evict_first")
    return tl.load(spot, mask=(inner < k)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["m", "splits", "ahead"])
def small_m(
    x, w, tiles, bias, x_scale, w_scale, out, part, arrived, m, n, k, x_row, span, splits, ahead,
    GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
    SPLIT: tl.constexpr, SEGMENTS: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K] (stride x_row), w [N, K] packed (GATED: [2N, K], gate then up) -> out [M, N].

    A program takes SEGMENTS times `span` columns and adds the sums of the segments in order, as
    the parts of `splits` programs are: both give the same bits. `tiles` is w again, with TMA its
    descriptor. SCALED: times x_scale [M] and w_scale [N]. part: fp32 [splits, (2,) M, N]; arrived:
    int32 by tile, zero before and after. EVEN: BLOCK_K divides K.
    """
    m_tiles = tl.cdiv(m, BLOCK_M)
    program = tl.program_id(0)
    m_tile = program % m_tiles
    split = program // m_tiles % splits
    tile = program // (m_tiles * splits)
    first = tile * BLOCK_N
    start = split * SEGMENTS * span
    if PDL:
        begin(w, first, n, k, start, ahead, BLOCK_N, GATED)

    columns = first + tl.arange(0, BLOCK_N)
    rows = tl.minimum(columns, n - 1).to(tl.int64)
    lines = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = lines < m
    x_at = x + lines.to(tl.int64)[:, None] * x_row
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for segment in range(SEGMENTS):
        low = start + segment * span
        high = tl.minimum(low + span, k)
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        ups = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for at in tl.range(low, high, BLOCK_K, num_stages=STAGES):
            inner = at + tl.arange(0, BLOCK_K)
            there = live[:, None]
            if not EVEN:
                there = there & (inner < k)[None, :]
            some = tl.load(x_at + inner[None, :], mask=there, other=0.0)
            gate = _weights(w, tiles, rows, first, at, k, TMA, EVEN, BLOCK_N, BLOCK_K)
            sums = tl.dot(gate, tl.trans(some), sums, input_precision=PRECISION)
            if GATED:
                up = _weights(w, tiles, rows + n, first + n, at, k, TMA, EVEN, BLOCK_N, BLOCK_K)
                ups = tl.dot(up, tl.trans(some), ups, input_precision=PRECISION)
        total = sums if SEGMENTS == 1 else total + sums
        total_up = ups if SEGMENTS == 1 else total_up + ups

    deliver(
        total, total_up, bias, x_scale, w_scale, out, part, arrived, m, n, tile, m_tile, split,
        splits, GATED, GELU, BIAS, SCALED, SPLIT, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def deliver(
    total, total_up, bias, x_scale, w_scale, out, part, arrived, m, n, tile, m_tile, split, splits,
    GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_N, BLOCK_M] of one of `splits` programs to `out`: the last one adds them all."""
    m_tiles = tl.cdiv(m, BLOCK_M)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    lines = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = lines < m
    spot = lines.to(tl.int64)[None, :] * n + columns[:, None]
    inside = live[None, :] & (columns < n)[:, None]
    if SPLIT:
        planes: tl.constexpr = 2 if GATED else 1
        plane = m.to(tl.int64) * n
        slot = part + split * plane * planes + spot
        tl.store(slot, total, mask=inside)
        if GATED:
            tl.store(slot + plane, total_up, mask=inside)
        tl.debug_barrier()
        counter = arrived + tile * m_tiles + m_tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            tl.store(counter, 0)
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in range(splits):
                slot = part + i * plane * planes + spot
                total += tl.load(slot, mask=inside, other=0.0, cache_modifier=".cg")
                if GATED:
                    total_up += tl.load(slot + plane, mask=inside, other=0.0, cache_modifier=".cg")
            _finish(
                total, total_up, lines, columns, live, inside, spot, bias, x_scale, w_scale, out,
                n, GATED, GELU, BIAS, SCALED,
            )  # fmt: skip
    else:
        _finish(
            total, total_up, lines, columns, live, inside, spot, bias, x_scale, w_scale, out,
            n, GATED, GELU, BIAS, SCALED,
        )  # fmt: skip


@triton.jit
def _finish(
    total, total_up, lines, columns, live, inside, spot, bias, x_scale, w_scale, out, n,
    GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Scale, add the bias, activate, store."""
    real = columns < n
    if SCALED:
        by_row = tl.load(x_scale + lines, mask=live, other=0.0)[None, :]
        total *= by_row * tl.load(w_scale + columns, mask=real, other=0.0)[:, None]
        if GATED:
            total_up *= by_row * tl.load(w_scale + n + columns, mask=real, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)[:, None]
        if GATED:
            total_up += tl.load(bias + n + columns, mask=real, other=0.0).to(tl.float32)[:, None]
    if GATED:
        total = activate(total, total_up, GELU)
    tl.store(out + spot, total.to(out.dtype.element_ty), mask=inside)
