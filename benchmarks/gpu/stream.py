"""A Triton kernel that only reads: the bandwidth roofline."""

import triton
import triton.language as tl


@triton.jit
def read(x, out, BLOCK: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * BLOCK * 16
    total = tl.zeros([BLOCK], tl.int32)
    for i in range(16):
        total += tl.load(x + base + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))
