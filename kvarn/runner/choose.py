"""Choosing a token from a row of numbers: the largest, or a draw after top-k, top-p and min-p.

Every function treats a row by itself, in an order of operations that does not depend on the other
rows, so that a row's token is the same in any batch. Work on a whole vocabulary is done in a few
vectorised passes over blocks of it: a plain argmax or fp64 cumsum of 50,000 numbers takes many
times longer than reading them, and a sort a hundred times.
"""

import math

import torch
from torch import Tensor

from kvarn.kernels import native

FIRST_CANDIDATES = 64
GROWTH = 8


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest id among the largest of each row, and its value: [R, V] -> [R], [R]. NaN wins."""
    kernel = native.kernel("argmax", logits)
    if kernel is not None and logits.is_contiguous():
        ids, best = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
        kernel(logits.data_ptr(), *logits.shape, ids.data_ptr(), best.data_ptr())
        return ids, best
    block = math.gcd(logits.shape[1], 64)
    if block < 8:
        ids = logits.argmax(-1)
        return ids, logits.gather(1, ids[:, None])[:, 0]
    blocks = logits.reshape(len(logits), -1, block)
    tops = blocks.amax(-1)
    at = tops.argmax(-1)
    row = torch.arange(len(at), device=at.device)
    return at * block + blocks[row, at].argmax(-1), tops[row, at]


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sampling in the order of token ids: the first id whose cumulated share exceeds u.

    `weights` [R, V] are not negative and not all 0, `u` [R] fp64 in [0, 1). A token of weight 0 is
    never drawn.
    """
    block = _sum_block(weights.shape[1])
    bounds = _bounds(weights, block)
    at, rest = _invert(bounds, u * bounds[:, -1])
    if block == 1:
        return at
    inside = weights.reshape(len(weights), -1, block)[torch.arange(len(at), device=at.device), at]
    return at * block + _invert(inside.cumsum(-1, dtype=torch.float64), rest)[0]


def _sum_block(vocab: int) -> int:
    block = math.gcd(vocab, 256)
    return block if block >= 16 else 1


def _bounds(weights: Tensor, block: int) -> Tensor:
    """Cumulated sums of blocks, fp64 [R, V / block]; the last one is the total."""
    if block == 1:
        return weights.cumsum(-1, dtype=torch.float64)
    return weights.reshape(len(weights), -1, block).sum(-1).cumsum(-1, dtype=torch.float64)


def _invert(bounds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose bound exceeds the target [R], and how far the target reaches into it.

    Rounding may bring a target up to the last bound; the number just below that one stays inside.
    """
    last = bounds[:, -1]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    at = torch.searchsorted(bounds, target[:, None], right=True)
    before = torch.where(at > 0, bounds.gather(1, (at - 1).clamp_(min=0)), 0.0)
    return at[:, 0], (target - before[:, 0]).clamp_(min=0.0)


def lowest_kept(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Smallest weight that survives top-k and then top-p, by row: [R, V], [R], [R] -> [R].

    `top_k` 0 and `top_p` 1 are off. Top-p keeps the fewest largest weights whose sum reaches the
    share `top_p` of what top-k left. Equal weights share their fate: a tie at the edge is kept
    whole. Only the largest weights are looked at, more of them for the rows that need more.
    """
    vocab = weights.shape[1]
    lowest = torch.zeros(len(weights), dtype=weights.dtype, device=weights.device)
    total = _bounds(weights, _sum_block(vocab))[:, -1]
    pending = torch.arange(len(weights), device=weights.device)
    count = min(FIRST_CANDIDATES, vocab)
    while len(pending):
        # the first round takes all rows as they are; later ones copy the few that are left
        rows = weights if len(pending) == len(weights) else weights[pending]
        largest = _largest(rows, count)
        found, done = _edge(largest, top_k[pending], top_p[pending], total[pending], vocab)
        lowest[pending] = found
        pending = pending[~done]
        count = min(count * GROWTH, vocab)
    return lowest


def _largest(weights: Tensor, count: int) -> Tensor:
    """The `count` largest of each row in falling order: [R, V] -> [R, count].

    The n largest numbers lie in the n blocks with the largest maxima, so that only these are
    searched where that is a small part of the row.
    """
    block = math.gcd(weights.shape[1], 64)
    if count * block * 4 > weights.shape[1]:
        return weights.topk(count, dim=-1).values
    blocks = weights.reshape(len(weights), -1, block)
    at = blocks.amax(-1).topk(count, dim=-1, sorted=False).indices
    at += torch.arange(len(at), device=at.device)[:, None] * blocks.shape[1]
    inside = blocks.reshape(-1, block).index_select(0, at.flatten())
    return inside.reshape(len(weights), -1).topk(count, dim=-1).values


def _edge(
    largest: Tensor, top_k: Tensor, top_p: Tensor, total: Tensor, vocab: int
) -> tuple[Tensor, Tensor]:
    """The smallest kept weight, and whether the `largest` [R, C] were enough to tell it."""
    count = largest.shape[1]
    end = largest[:, -1]
    exhausted = (end == 0) | (count == vocab)
    has_k, has_p = (top_k > 0) & (top_k < vocab), top_p < 1
    kth = largest.gather(1, (top_k.clamp(1, count) - 1)[:, None])[:, 0]
    kth = torch.where(has_k, kth, 0.0)
    sums = largest.cumsum(-1, dtype=torch.float64)
    kept = (largest >= kth[:, None]).sum(-1, keepdim=True)
    mass = torch.where(has_k, sums.gather(1, kept - 1)[:, 0], total)
    reached = sums >= (top_p * mass)[:, None]
    edge = largest.gather(1, reached.int().argmax(-1, keepdim=True))[:, 0]
    edge = torch.where(has_p & reached[:, -1], edge, 0.0)
    know_k = ~has_k | (top_k <= count)
    # the mass that top-k leaves is known once the ties of its last token are all in sight
    know_mass = ~has_k | (end < kth)
    know_p = ~has_p | (know_mass & reached[:, -1])
    return torch.maximum(kth, edge), exhausted | (know_k & know_p)
