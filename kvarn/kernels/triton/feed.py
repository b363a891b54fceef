"""Input ids of a step on the device: from the host, or the tokens that the step before sampled.

What the device remembers of each row is `last` [n_rows, columns]: its newest token, and behind that
what was drafted to follow. A token that the host does not know is -1, or -2 for the first drafted
one, and so on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def token_of(said, rows, last, columns, at, inside):
    """The id of row `at`; 0 for idle rows, and where nothing could be sampled."""
    token = tl.load(said + at, mask=inside, other=0)
    row = tl.load(rows + at, mask=inside, other=-1)
    there = row * columns - 1 - token
    sampled = tl.load(last + there, mask=inside & (token < 0) & (row >= 0), other=0)
    return tl.maximum(tl.where(token < 0, sampled, token), 0)


@triton.jit(do_not_specialize=["n"])
def feed_block(said, rows, last, columns, ids, n, BLOCK: tl.constexpr):
    """One program for BLOCK rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    token = token_of(said, rows, last, columns, at, inside)
    tl.store(ids + at, token.to(ids.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def keep_block(last, columns, rows, tokens, n, BLOCK: tl.constexpr):
    """One program for BLOCK rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    row = tl.load(rows + at, mask=inside, other=-1)
    token = tl.load(tokens + at, mask=inside, other=0)
    token = tl.maximum(token, 0).to(last.dtype.element_ty)
    tl.store(last + row * columns, token, mask=inside & (row >= 0))


def feed(said: Tensor, rows: Tensor, last: Tensor) -> Tensor:
    """Ids [T] int64: `said` [T], or where it is negative what `last` has; idle rows (-1) get 0."""
    ids = torch.empty(said.shape, dtype=torch.int64, device=said.device)
    n = len(said)
    if n:
        grid = (triton.cdiv(n, BLOCK),)
        feed_block[grid](said, rows, last, last.shape[1], ids, n, BLOCK, num_warps=2)
    return ids


def keep(last: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """last[rows, 0] = tokens, for the rows that are not idle (-1); no token (-1) becomes 0.

    A row may occur once.
    """
    n = len(rows)
    if n:
        grid = (triton.cdiv(n, BLOCK),)
        keep_block[grid](last, last.shape[1], rows, tokens, n, BLOCK, num_warps=2)
