"""Next tokens on the device, without sorting a vocabulary and without a word to the host.

The order of operations is that of `kvarn.runner.sampler`: temperature, min-p, top-k, top-p, then
the inverse of the cumulated distribution in the order of token ids. A row is cut into chunks of
2,048 tokens. `survey` takes the largest logit and the sum of weights of every chunk in one read;
`choose` finds the chunk and then the token inside. Where a row of the step filters, `settle` looks
for the smallest weight that is kept, and `weigh` sums what is kept of every chunk.

All sums have a fixed order that no other row has a part in, so a row's token is the same in any
batch; they are in fp32 (cumulated in fp64), where the sampler of the CPU has fp64.

Distances: d = largest logit - logit >= 0; weights: w = exp(-d / temperature).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048
BLOCK = 128  #: tokens whose largest logit tells whether a search has to look at them
WAYS: tl.constexpr = tl.constexpr(8)
TILE = 4096  #: tokens a step of a search
COLDEST: tl.constexpr = tl.constexpr(1e-30)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
#: the bits of infinity as an integer; those of numbers >= 0 are ordered like the numbers
INFINITE_BITS: tl.constexpr = tl.constexpr(0x7F800000)
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
def _pace(temperature):
    """What takes a distance to the exponent of its weight, in base 2."""
    return LOG2E / tl.maximum(temperature, COLDEST)


@triton.jit
def _peak(tops, row, chunks, BLOCK_C: tl.constexpr):
    """(largest logit of the row, whether it is a finite number)."""
    at = tl.arange(0, BLOCK_C)
    top = tl.load(tops + row * chunks + at, mask=at < chunks, other=float("-inf"))
    best = tl.max(top, 0)
    broken = tl.max((top != top).to(tl.int32), 0) > 0
    fine = (best > float("-inf")) & (best < INFINITY) & (not broken)
    return tl.where(fine, best, 0.0), fine


@triton.jit
def survey(
    logits, temperatures, tops, ids, sums, block_tops, vocab, row_step,
    BLOCKS_TOO: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest logit (NaN wins), its lowest id, and sum of exp((l - largest) / temperature)."""
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    BLOCKS: tl.constexpr = CHUNK // BLOCK
    nth = tl.arange(0, BLOCKS)
    at = chunk * CHUNK + nth[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    numbers = tl.load(logits + row * row_step + at, mask=at < vocab, other=float("-inf"))
    numbers = numbers.to(tl.float32)
    broken = tl.max(tl.max((numbers != numbers).to(tl.int32), 1), 0) > 0
    highest = tl.max(numbers, 1)
    top = tl.max(highest, 0)
    place = row * chunks + chunk
    if BLOCKS_TOO:
        tl.store(block_tops + place * BLOCKS + nth, highest)
    first = tl.min(tl.min(tl.where(numbers == top, at, NOWHERE), 1), 0)
    tl.store(tops + place, tl.where(broken, float("nan"), top))
    tl.store(ids + place, first)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        pivot = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2((numbers - pivot) * _pace(temperature))
        tl.store(sums + place, tl.sum(tl.sum(weights, 1), 0))


@triton.jit
def _search(
    numbers, blocks, n, vocab, best, pace, min_p, target, low, high, LISTED: tl.constexpr,
    MASS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Smallest distance, as bits in (low, high], within which there are `target` numbers (or, with
    MASS, weights of the sum `target`); `high` where there are not.

    Looks at `n` numbers, or where LISTED at n blocks of BLOCK numbers, whose ids are in `blocks`.
    """
    STEP: tl.constexpr = TILE // BLOCK if LISTED else TILE
    way = tl.arange(0, WAYS)
    at = tl.arange(0, TILE)[None, :]
    while high - low > 1:
        # the last way is `high` itself
        step = tl.maximum((high - low) // WAYS, 1)
        bounds = tl.where(way == WAYS - 1, high, tl.minimum(low + step * (way + 1), high))
        limits = bounds.to(tl.float32, bitcast=True)[:, None]
        total = tl.zeros([WAYS, TILE], tl.float32)
        start = 0
        while start < n:
            if LISTED:
                nth = start + at // BLOCK
                there = nth < n
                spot = tl.load(blocks + nth, mask=there, other=0) * BLOCK + at % BLOCK
                there &= spot < vocab
            else:
                spot = start + at
                there = spot < n
            number = tl.load(numbers + spot, mask=there, other=float("-inf")).to(tl.float32)
            distance = best - number
            if MASS:
                weight = tl.exp2(-distance * pace)
                measure = tl.where(weight >= min_p, weight, 0.0)
            else:
                measure = tl.where(there, 1.0, 0.0)
            total += tl.where(distance <= limits, measure, 0.0)
            start += STEP
        short = tl.sum(total, 1) < target
        below = tl.max(tl.where(short, bounds, low), 0)
        high = tl.min(tl.where(short, high, bounds), 0)
        low = tl.minimum(below, high - 1)
    return high


@triton.jit
def _mass(
    numbers, blocks, n, vocab, best, pace, min_p, high, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Sum of the weights within the distance whose bits are `high`, in n `blocks`."""
    limit = high.to(tl.float32, bitcast=True)
    total = tl.zeros([1, TILE], tl.float32)
    at = tl.arange(0, TILE)[None, :]
    start = 0
    while start < n:
        nth = start + at // BLOCK
        spot = tl.load(blocks + nth, mask=nth < n, other=0) * BLOCK + at % BLOCK
        number = tl.load(numbers + spot, mask=(nth < n) & (spot < vocab), other=float("-inf"))
        distance = best - number.to(tl.float32)
        weight = tl.exp2(-distance * pace)
        kept = (distance <= limit) & (weight >= min_p)
        total += tl.where(kept, weight, 0.0)
        start += TILE // BLOCK
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def _live(tops, blocks, n, best, limit, TILE: tl.constexpr):
    """Ids of the blocks that reach into the distance `limit`, in order, to `blocks`; how many."""
    found = tl.full((), 0, tl.int32)
    for start in range(0, n, TILE):
        at = start + tl.arange(0, TILE)
        top = tl.load(tops + at, mask=at < n, other=float("-inf"))
        live = ((best - top <= limit) & (at < n)).to(tl.int32)
        tl.store(blocks + found + tl.cumsum(live, 0) - 1, at, mask=live > 0)
        found += tl.sum(live, 0)
    tl.debug_barrier()  # other threads read what was written
    return found


@triton.jit
def _total(tops, sums, row, chunks, best, pace, BLOCK_C: tl.constexpr):
    """Sum of the weights of a whole row, from the survey."""
    at = tl.arange(0, BLOCK_C)
    top = tl.load(tops + row * chunks + at, mask=at < chunks, other=float("-inf"))
    part = tl.load(sums + row * chunks + at, mask=at < chunks, other=0.0)
    return tl.sum(part * tl.exp2((top - best) * pace), 0)


@triton.jit
def settle(
    logits, temperatures, top_ks, top_ps, min_ps, tops, sums, block_tops, blocks, floors, vocab,
    row_step, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program a row: `floors` [R], the smallest weight that min-p, top-k and top-p keep.

    Equal weights share their fate. Only blocks that reach into the distance that can matter are
    looked at: for top-k, that of the k-th largest block; for top-p, that beyond which a whole
    vocabulary of weights would not make up what may be left out.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    min_p = tl.load(min_ps + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    has_k = (top_k > 0) & (top_k < vocab)
    best, fine = _peak(tops, row, CHUNKS, BLOCK_C)
    pace = _pace(temperature)
    floor = min_p
    if (temperature > 0) & fine & (has_k | (top_p < 1)):
        n: tl.constexpr = CHUNKS * (CHUNK // BLOCK)
        mine = block_tops + row * n
        list_of = blocks + row * n
        numbers = logits + row * row_step
        high = tl.full((), INFINITE_BITS, tl.int32)
        start = tl.full((), -1, tl.int32)
        wanted = top_k.to(tl.float32)
        if has_k:
            high = _search(
                mine, mine, n, vocab, best, pace, min_p, wanted, start, high, False, False, BLOCK,
                TILE,
            )  # fmt: skip
        else:
            reach = tl.log2(vocab / (1.0 - top_p)) * 1.0001
            reach = tl.where(min_p > 0, tl.maximum(reach, -tl.log2(min_p) * 1.0001), reach)
            high = (reach / pace).to(tl.int32, bitcast=True)
        n_live = _live(mine, list_of, n, best, high.to(tl.float32, bitcast=True), TILE)
        if has_k:
            high = _search(
                numbers, list_of, n_live, vocab, best, pace, min_p, wanted, start, high, True,
                False, BLOCK, TILE,
            )  # fmt: skip
        if top_p < 1:
            if has_k | (min_p > 0):
                mass = _mass(numbers, list_of, n_live, vocab, best, pace, min_p, high, BLOCK, TILE)
            else:
                mass = _total(tops, sums, row, CHUNKS, best, pace, BLOCK_C)
            high = _search(
                numbers, list_of, n_live, vocab, best, pace, min_p, top_p * mass, start, high, True,
                True, BLOCK, TILE,
            )  # fmt: skip
        edge = high.to(tl.float32, bitcast=True)
        floor = tl.maximum(min_p, tl.exp2(-edge * pace))
    tl.store(floors + row, floor)


@triton.jit
def weigh(
    logits, temperatures, floors, tops, sums, vocab, row_step, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums of `survey` again, of what is kept, where something is left out."""
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + row)
    floor = tl.load(floors + row)
    if (temperature > 0) & (floor > 0):
        best, _ = _peak(tops, row, chunks, BLOCK_C)
        pace = _pace(temperature)
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
    best, fine = _peak(tops, row, chunks, BLOCK_C)
    nth = tl.arange(0, BLOCK_C)
    there = nth < chunks
    top = tl.load(tops + row * chunks + nth, mask=there, other=float("-inf"))
    token = -1
    if fine & (temperature > 0):
        pace = _pace(temperature)
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
    make = logits.new_empty
    tokens = make(rows, dtype=torch.int32)
    if not rows:
        return tokens
    chunks: int = triton.cdiv(vocab, CHUNK)
    block_c = max(triton.next_power_of_2(chunks), 32)
    tops, sums = make((2, rows, chunks), dtype=torch.float32).unbind(0)
    ids = make((rows, chunks), dtype=torch.int32)
    n_blocks = rows * chunks * (CHUNK // BLOCK) if filtered else 0
    block_tops = make(n_blocks, dtype=torch.float32)
    floors = make(rows, dtype=torch.float32)
    step = logits.stride(0)
    survey[(chunks, rows)](
        logits, temperature, tops, ids, sums, block_tops, vocab, step, filtered, CHUNK, BLOCK,
        num_warps=4,
    )  # fmt: skip
    if filtered:
        blocks = make(n_blocks, dtype=torch.int32)
        settle[(rows,)](
            logits, temperature, top_k, top_p, min_p, tops, sums, block_tops, blocks, floors,
            vocab, step, chunks, CHUNK, BLOCK, block_c, TILE, num_warps=16,
        )  # fmt: skip
        weigh[(chunks, rows)](
            logits, temperature, floors, tops, sums, vocab, step, CHUNK, BLOCK, block_c,
            num_warps=4,
        )  # fmt: skip
    choose[(rows,)](
        logits, temperature, floors, key, length, tops, ids, sums, tokens, vocab, step, chunks,
        filtered, CHUNK, block_c, num_warps=4,
    )  # fmt: skip
    return tokens
