"""y = x W^T + b for few rows x and weights in 4 or 8 bits, expanded in registers.

Weights come as 16-bit words. A nibble becomes a bf16 number by setting the bits of 128 above it:
one instruction for two weights; what that adds is taken off again with the sum of the inputs.
Eight bits are two nibbles of the same input, the upper one worth sixteen times as much. Every 32
inputs have one scale, applied to their fp32 sum.

Word e of a run of 32 holds the inputs e and, 4 bits: e + 32, e + 64, e + 96; 8 bits: e + 32.
"""

import triton
import triton.language as tl

from kvarn.kernels.triton.small_m import deliver
from kvarn.kernels.triton.stream import begin

#: bits 4 i to 4 i + 3 of both halves of a word, under the bits of 128
TAKE = "lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }"
TAKE_0 = tl.constexpr("{ .reg .b32 t; mov.b32 t, $1; " + TAKE)
TAKE_1 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 4; " + TAKE)
TAKE_2 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; " + TAKE)
TAKE_3 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 12; " + TAKE)


@triton.jit
def _numbers(words, NIBBLE: tl.constexpr, FAST: tl.constexpr):
    """Nibble NIBBLE of 16-bit words as 128 + its value, in bf16 (in the interpreter: fp32)."""
    if not FAST:
        return (((words.to(tl.int32) & 0xFFFF) >> (4 * NIBBLE)) & 15).to(tl.float32) + 128.0
    low: tl.constexpr = TAKE_0 if NIBBLE == 0 else TAKE_1
    high: tl.constexpr = TAKE_2 if NIBBLE == 2 else TAKE_3
    take: tl.constexpr = low if NIBBLE < 2 else high
    return tl.inline_asm_elementwise(take, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit(do_not_specialize=["m", "splits", "ahead"])
def codes(
    x, sums_of_x, w, scale, offset, bias, out, part, arrived, m, n, k, x_row, span, splits, ahead,
    BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """x [M, K] bf16, sums_of_x fp32 [M, K / 32], w int16 [N, K * BITS / 16], scale and offset fp32
    [N, K / GROUP] -> [M, N].

    GROUP 0: one scale a row. span: inputs of a program, a multiple of 128 (4 bits) or 64.
    """
    RUNS: tl.constexpr = 16 // BITS
    m_tiles = tl.cdiv(m, BLOCK_M)
    program = tl.program_id(0)
    m_tile = program % m_tiles
    split = program // m_tiles % splits
    tile = program // (m_tiles * splits)
    start = split * span
    width = k // RUNS
    if FAST:
        begin(w, tile * BLOCK_N, n, width, start // RUNS, ahead, BLOCK_N, False)

    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(columns, n - 1).to(tl.int64)
    lines = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = lines < m
    run = tl.arange(0, 32)
    x_at = x + lines.to(tl.int64)[:, None] * x_row + run[None, :]
    w_at = w + rows[:, None] * width + run[None, :]
    sums_at = sums_of_x + lines.to(tl.int64) * (k // 32)
    groups = k // GROUP if GROUP else 1
    scale_at = scale + rows * groups
    offset_at = offset + rows * groups if OFFSET else scale_at
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # one load ahead by hand: what is expanded in registers is not pipelined by the compiler
    high = tl.minimum(start + span, k)
    last = high // RUNS - 32
    words = tl.load(w_at + tl.minimum(start // RUNS, last))
    for at in tl.range(start, high, 32 * RUNS, num_stages=STAGES):
        later = tl.load(w_at + tl.minimum(at // RUNS + 32, last))
        for i in tl.static_range(RUNS):
            some = tl.load(x_at + at + i * 32, mask=live[:, None], other=0.0)
            right = tl.trans(some if FAST else some.to(tl.float32))
            sums = tl.load(sums_at + (at // 32 + i), mask=live, other=0.0)
            if BITS == 4:
                product = tl.dot(_numbers(words, i, FAST), right)
                extra = 128.0
            else:
                product = tl.dot(_numbers(words, 2 * i, FAST), right)
                product += 16.0 * tl.dot(_numbers(words, 2 * i + 1, FAST), right)
                extra = 17.0 * 128.0 + 128.0  # the codes are stored plus 128
            group = (at + i * 32) // GROUP if GROUP else 0
            factor = tl.load(scale_at + group)
            total += factor[:, None] * (product - extra * sums[None, :])
            if OFFSET:
                total += tl.load(offset_at + group)[:, None] * sums[None, :]
        words = later
    deliver(
        total, total, bias, scale, scale, out, part, arrived, m, n, tile, m_tile, split, splits,
        False, False, BIAS, False, SPLIT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
