"""y = W x + b for one row x: multiply and add in registers, many loads in flight."""

import triton
import triton.language as tl

from kvarn.kernels.triton.stream import activate, begin


@triton.jit(do_not_specialize=["ahead"])
def gemv(
    x, w, bias, out, n, k, ahead,
    GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x [K], w [N, K] packed (GATED: [2N, K], gate then up) -> out [N]; EVEN: BLOCK_K divides K."""
    first = tl.program_id(0) * BLOCK_N
    if PDL:
        begin(w, first, n, k, 0, ahead, BLOCK_N, GATED)
    rows = tl.minimum(first + tl.arange(0, BLOCK_N), n - 1).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    spot = w + rows[:, None] * k + inner[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    ups = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for at in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        if EVEN:
            row = tl.load(x + at + inner)
            some = tl.load(spot + at, eviction_policy="evict_first")
        else:
            fits = at + inner < k
            row = tl.load(x + at + inner, mask=fits, other=0.0)
            some = tl.load(spot + at, mask=fits[None, :], other=0.0)
        wide = row.to(tl.float32)[None, :]
        sums += some.to(tl.float32) * wide
        if GATED:
            more = spot + n.to(tl.int64) * k + at
            if EVEN:
                some = tl.load(more, eviction_policy="evict_first")
            else:
                some = tl.load(more, mask=(at + inner < k)[None, :], other=0.0)
            ups += some.to(tl.float32) * wide
    y = tl.sum(sums, 1)
    columns = first + tl.arange(0, BLOCK_N)
    if BIAS:
        y += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(ups, 1)
        if BIAS:
            up += tl.load(bias + n + columns, mask=columns < n, other=0.0).to(tl.float32)
        y = activate(y, up, GELU)
    tl.store(out + columns, y.to(out.dtype.element_ty), mask=columns < n)
