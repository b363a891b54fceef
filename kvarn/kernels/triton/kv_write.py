"""K and V of a step's rows to their slots in the paged cache [pages, Hkv, 2, page, d]."""

import triton
import triton.language as tl

FP8_LARGEST: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def kv_write(
    k, v, slots, cache, k_row, k_head, v_row, v_head,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: k and v [T, Hkv, d] with the given strides, BLOCK >= Hkv * d.

    A row whose slot is negative is not written. What an fp8 cache cannot hold becomes its largest
    number, not NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < KV_HEADS * DIM
    head, dim = at // DIM, at % DIM
    slot = tl.load(slots + row)
    inside &= slot >= 0
    page = (slot // PAGE).to(tl.int64)
    place = (page * KV_HEADS + head) * (2 * PAGE * DIM) + (slot % PAGE) * DIM + dim
    key = tl.load(k + row * k_row + head * k_head + dim, mask=inside)
    value = tl.load(v + row * v_row + head * v_head + dim, mask=inside)
    if cache.dtype.element_ty == tl.float8e4nv:
        key = tl.clamp(key.to(tl.float32), -FP8_LARGEST, FP8_LARGEST).to(tl.float8e4nv)
        value = tl.clamp(value.to(tl.float32), -FP8_LARGEST, FP8_LARGEST).to(tl.float8e4nv)
    tl.store(cache + place, key, mask=inside)
    tl.store(cache + place + PAGE * DIM, value, mask=inside)
