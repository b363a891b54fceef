"""What kernels that stream weights share: prefetch before the kernel before is done, epilogue.

Such a kernel is launched with `launch_pdl`: its programs start while the kernel before still runs,
ask for their first weights (which nobody writes), and only then wait for their input.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(w, first, n, k, start, ahead, ROWS: tl.constexpr, GATED: tl.constexpr):
    """Prefetch `ahead` x 512 bytes of ROWS rows from `first`, column `start` on; then wait.

    GATED: also of the rows n further on. With ahead > 0 the rows must be aligned to 16 bytes and
    at least 512 bytes long.
    """
    gdc_launch_dependents()
    chunk: tl.constexpr = 4096 // w.dtype.element_ty.primitive_bitwidth
    rows = tl.minimum(first + tl.arange(0, ROWS), n - 1).to(tl.int64) * k
    for i in range(ahead):
        column = tl.minimum(start + i * chunk, k - chunk)
        _prefetch(w + rows + column)
        if GATED:
            _prefetch(w + rows + n.to(tl.int64) * k + column)
    gdc_wait()


@triton.jit
def _prefetch(spots):
    """Ask for the 512 bytes at each pointer; the L2 gets them."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0;",
        "=r,l",
        [spots.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def activate(gate, up, GELU: tl.constexpr):
    """act(gate) * up in fp32."""
    if GELU:
        # tanh(y) = 2 sigmoid(2y) - 1, so gelu(x) = x sigmoid(2y)
        turn = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        turn = gate
    return gate * tl.sigmoid(turn) * up
