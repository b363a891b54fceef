"""Matrices in 4 or 8 bits to dense ones, and the sums of inputs that their products need."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def expand(
    w, scale, offset, out, k,
    BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w int16 [N, K * BITS / 16] in the layout of `codes` -> out [N, K]; GROUP 0: one scale a row.

    One program a row and BLOCK of its words, whose number is a multiple of 32.
    """
    RUNS: tl.constexpr = 16 // BITS
    row = tl.program_id(0).to(tl.int64)
    width = k // RUNS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    words = tl.load(w + row * width + at, mask=inside, other=0).to(tl.int32)
    groups = k // GROUP if GROUP else 1
    for i in tl.static_range(RUNS):
        column = at // 32 * (32 * RUNS) + i * 32 + at % 32
        code = ((words >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.float32)
        if BITS == 8:
            code -= 128.0
        place = row * groups + column // (GROUP if GROUP else k)
        wide = code * tl.load(scale + place, mask=inside, other=0.0)
        if OFFSET:
            wide += tl.load(offset + place, mask=inside, other=0.0)
        tl.store(out + row * k + column, wide.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_runs(x, out, k, x_row, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Sums of every 32 inputs: x [M, K] -> fp32 [M, K / 32]; one program a row and BLOCK runs."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = run[:, None] * 32 + tl.arange(0, 32)[None, :]
    some = tl.load(x + row * x_row + at, mask=at < k, other=0.0).to(tl.float32)
    tl.store(out + row * (k // 32) + run, tl.sum(some, 1), mask=run * 32 < k)
