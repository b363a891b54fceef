"""Next tokens on the device, without sorting a vocabulary and without a word to the host.

The order of operations is that of `kvarn.runner.sampler`: temperature, min-p, top-k, top-p, then
the inverse of the cumulated distribution in the order of token ids. A row is cut into chunks of
2,048 tokens. `survey` takes the largest logit and the sum of weights of every chunk in one read;
`choose` finds the chunk and then the token inside. Where a row of the step filters,
`kvarn.kernels.triton.threshold` finds the smallest weight that is kept, and `weigh` sums what is
kept of every chunk.

All sums have a fixed order that no other row has a part in, so a row's token is the same in any
batch; they are in fp32 (cumulated in fp64), where the sampler of the CPU has fp64.

Distances: d = largest logit - logit >= 0; weights: w = exp(-d / temperature).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.triton.threshold import (
    BLOCK,
    CHUNK,
    INFINITY,
    find_floors,
    pace_of,
    peak_of,
)

NOWHERE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
GAMMA: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2: tl.constexpr = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(x):
    """SplitMix64's finaliser of a uint64."""
    x = (x ^ (x >> 30)) * tl.full((), MIX_1, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), MIX_2, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _uniform(key, position):
    """One number in [0, 1), fp64, as `kvarn.runner.uniform` has it."""
    gamma = tl.full((), GAMMA, tl.uint64)
    state = _mix(key.to(tl.uint64, bitcast=True) + gamma)
    step = (position.to(tl.int64) + 1).to(tl.uint64, bitcast=True)
    bits = _mix(state + gamma * step)
    return (bits >> 11).to(tl.int64, bitcast=True).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def survey(
    logits, temperatures, tops, ids, sums, block_tops, bottoms, vocab, row_step, chunks,
    FILTERED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest logit (NaN wins), its lowest id, and sum of exp((l - largest) / temperature).

    FILTERED: also the largest of every block, and the smallest that is not -inf.
    """
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    BLOCKS: tl.constexpr = CHUNK // BLOCK
    nth = tl.arange(0, BLOCKS)
    at = chunk * CHUNK + nth[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    numbers = tl.load(logits + row * row_step + at, mask=at < vocab, other=float("-inf"))
    numbers = numbers.to(tl.float32)
    broken = tl.max(tl.max((numbers != numbers).to(tl.int32), 1), 0) > 0
    highest = tl.max(numbers, 1)
    top = tl.max(highest, 0)
    place = row * chunks + chunk
    if FILTERED:
        tl.store(block_tops + place * BLOCKS + nth, highest)
        finite = tl.where(numbers > float("-inf"), numbers, INFINITY)
        tl.store(bottoms + place, tl.min(tl.min(finite, 1), 0))
    first = tl.min(tl.min(tl.where(numbers == top, at, NOWHERE), 1), 0)
    tl.store(tops + place, tl.where(broken, float("nan"), top))
    tl.store(ids + place, first)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        pivot = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2((numbers - pivot) * pace_of(temperature))
        tl.store(sums + place, tl.sum(tl.sum(weights, 1), 0))


@triton.jit
def weigh(
    logits, temperatures, floors, tops, sums, vocab, row_step, chunks, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums of `survey` again, of what is kept, where something is left out."""
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    temperature = tl.load(temperatures + row)
    floor = tl.load(floors + row)
    if (temperature > 0) & (floor > 0):
        best, _ = peak_of(tops, row, chunks, BLOCK_C)
        pace = pace_of(temperature)
        place = row * chunks + chunk
        top = tl.load(tops + place)
        if tl.exp2((top - best) * pace) >= floor:
            at = chunk * CHUNK + tl.arange(0, CHUNK)
            numbers = tl.load(logits + row * row_step + at, mask=at < vocab, other=float("-inf"))
            numbers = numbers.to(tl.float32)
            kept = tl.exp2((numbers - best) * pace) >= floor
            weights = tl.where(kept, tl.exp2((numbers - top) * pace), 0.0)
            tl.store(sums + place, tl.sum(weights, 0))
        else:
            tl.store(sums + place, 0.0)


@triton.jit
def choose(
    logits, temperatures, floors, keys, lengths, tops, ids, sums, tokens, vocab, row_step, chunks,
    FILTERED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program a row: the chunk, then the token, whose cumulated weight exceeds u."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    best, fine = peak_of(tops, row, chunks, BLOCK_C)
    nth = tl.arange(0, BLOCK_C)
    there = nth < chunks
    top = tl.load(tops + row * chunks + nth, mask=there, other=float("-inf"))
    token = -1
    if fine & (temperature > 0):
        pace = pace_of(temperature)
        u = _uniform(tl.load(keys + row), tl.load(lengths + row))
        scale = tl.exp2((top - best) * pace).to(tl.float64)
        part = tl.load(sums + row * chunks + nth, mask=there, other=0.0) * scale
        bounds = tl.cumsum(part, 0)
        target = u * tl.max(bounds, 0)
        last = tl.max(tl.where(part > 0, nth, 0), 0)
        chunk = tl.min(tl.where((bounds > target) & (part > 0), nth, last), 0)
        before = tl.sum(tl.where(nth == chunk - 1, bounds, 0.0), 0)
        rest = (target - before) / tl.sum(tl.where(nth == chunk, scale, 0.0), 0)
        peak = tl.load(tops + row * chunks + chunk)
        at = tl.arange(0, CHUNK)
        spot = chunk * CHUNK + at
        numbers = tl.load(logits + row * row_step + spot, mask=spot < vocab, other=float("-inf"))
        numbers = numbers.to(tl.float32)
        weights = tl.exp2((numbers - peak) * pace)
        if FILTERED:
            kept = tl.exp2((numbers - best) * pace) >= tl.load(floors + row)
            weights = tl.where(kept, weights, 0.0)
        reached = (tl.cumsum(weights.to(tl.float64), 0) > rest) & (weights > 0)
        last = tl.max(tl.where(weights > 0, at, 0), 0)
        token = chunk * CHUNK + tl.min(tl.where(reached, at, last), 0)
    elif fine:
        first = tl.load(ids + row * chunks + nth, mask=there, other=0)
        token = tl.min(tl.where(there & (top == best), first, NOWHERE), 0)
    tl.store(tokens + row, token)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, key: Tensor,
    length: Tensor, *, filtered: bool,
) -> Tensor:  # fmt: skip
    """Tokens [R] int32 of `logits` [R, V] (any float dtype); -1 where the largest is not finite.

    By row: `temperature` fp32 (0: the lowest id among the largest logits), `top_k` int32 (0: off),
    `top_p` fp32 (1: off), `min_p` fp32 (0: off), `key` int64 (the bits of the sequence's key),
    `length` int32 or int64 (the position that `kvarn.runner.uniform` takes). `filtered` tells that
    some row has top-k, top-p or min-p; without it they are not looked at.
    """
    rows, vocab = logits.shape
    make, step = logits.new_empty, logits.stride(0)
    tokens = make(rows, dtype=torch.int32)
    if not rows:
        return tokens
    chunks: int = triton.cdiv(vocab, CHUNK)
    block_c = max(triton.next_power_of_2(chunks), 32)
    # each by itself: kernels are compiled for addresses that are multiples of 16, and for others
    tops, sums = (make((rows, chunks), dtype=torch.float32) for _ in range(2))
    ids = make((rows, chunks), dtype=torch.int32)
    floors = make(rows, dtype=torch.float32)
    few = rows if filtered else 0  # of what only filters need
    block_tops = make((few, chunks, CHUNK // BLOCK), dtype=torch.float32)
    bottoms = make((few, chunks), dtype=torch.float32)
    survey[(chunks * rows,)](
        logits, temperature, tops, ids, sums, block_tops, bottoms, vocab, step, chunks, filtered,
        CHUNK, BLOCK, num_warps=4,
    )  # fmt: skip
    if filtered:
        wishes = (temperature, top_k, top_p)
        find_floors(logits, wishes, min_p, tops, bottoms, block_tops, floors, block_c)
        weigh[(chunks * rows,)](
            logits, temperature, floors, tops, sums, vocab, step, chunks, CHUNK, block_c,
            num_warps=4,
        )  # fmt: skip
    choose[(rows,)](
        logits, temperature, floors, key, length, tops, ids, sums, tokens, vocab, step, chunks,
        filtered, CHUNK, block_c, num_warps=4,
    )  # fmt: skip
    return tokens
