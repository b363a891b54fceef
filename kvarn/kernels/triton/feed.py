"""Input ids of a step on the device: from the host, or the tokens that the step before sampled."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
WIDEST = 2048  #: columns of an embedding that one program copies


@triton.jit
def _token(said, rows, last, at, inside):
    """The id of row `at`; 0 for idle rows, and where nothing could be sampled."""
    token = tl.load(said + at, mask=inside, other=0)
    row = tl.load(rows + at, mask=inside, other=-1)
    sampled = tl.load(last + row, mask=inside & (token < 0) & (row >= 0), other=0)
    return tl.maximum(tl.where(token < 0, sampled, token), 0)


@triton.jit(do_not_specialize=["n"])
def feed_block(said, rows, last, ids, n, BLOCK: tl.constexpr):
    """One program for BLOCK rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    token = _token(said, rows, last, at, inside)
    tl.store(ids + at, token.to(ids.dtype.element_ty), mask=inside)


@triton.jit
def embed_row(said, rows, last, embed, out, scale, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program for BLOCK columns of a row."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < DIM
    token = _token(said, rows, last, row, True)
    numbers = tl.load(embed + token.to(tl.int64) * DIM + at, mask=inside, other=0.0)
    numbers = (numbers.to(tl.float32) * scale).to(numbers.dtype)
    tl.store(out + row.to(tl.int64) * DIM + at, numbers, mask=inside)


@triton.jit(do_not_specialize=["n"])
def keep_block(last, rows, tokens, n, BLOCK: tl.constexpr):
    """One program for BLOCK rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    row = tl.load(rows + at, mask=inside, other=-1)
    token = tl.load(tokens + at, mask=inside, other=0)
    tl.store(last + row, tl.maximum(token, 0).to(last.dtype.element_ty), mask=inside & (row >= 0))


def feed(said: Tensor, rows: Tensor, last: Tensor) -> Tensor:
    """Ids [T] int64: `said` [T], or where it is negative `last[rows]`; idle rows (-1) get 0."""
    ids = torch.empty(said.shape, dtype=torch.int64, device=said.device)
    n = len(said)
    if n:
        feed_block[(triton.cdiv(n, BLOCK),)](said, rows, last, ids, n, BLOCK, num_warps=2)
    return ids


def feed_embed(
    said: Tensor, rows: Tensor, last: Tensor, embed: Tensor, scale: float = 1.0
) -> Tensor:
    """Rows `feed(said, rows, last)` of `embed` [vocab, hidden] times `scale`: [T, hidden]."""
    dim = embed.shape[1]
    out = torch.empty((len(said), dim), dtype=embed.dtype, device=embed.device)
    block = min(triton.next_power_of_2(dim), WIDEST)
    if len(said):
        embed_row[(len(said), triton.cdiv(dim, block))](
            said, rows, last, embed, out, scale, dim, block, num_warps=4
        )
    return out


def keep(last: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """last[rows] = tokens, for the rows that are not idle (-1); no token (-1) becomes 0.

    A row may occur once.
    """
    n = len(rows)
    if n:
        keep_block[(triton.cdiv(n, BLOCK),)](last, rows, tokens, n, BLOCK, num_warps=2)
