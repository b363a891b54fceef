"""The smallest weight that min-p, top-k and top-p keep, without sorting: part of `sample`.

The search is for a distance from the row's largest logit: numbers >= 0, whose order is that of
their bits as integers, so that dividing an interval of integers again and again ends with the very
distance of a token. For top-k, only blocks are looked at that reach as far as the k-th largest
block. For top-p over a whole row, passes of `narrow` over all chunks come before, and `gather`
collects the tokens in doubt.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  #: tokens of a program
BLOCK = 128  #: tokens whose largest logit tells whether a search has to look at them
WAYS: tl.constexpr = tl.constexpr(8)
PASSES = 3  #: of `narrow`: each divides the distances by WAYS
SEGMENT = 256  #: tokens of a chunk that `gather` has room for
TILE = 1024  #: tokens a step of a search
COLDEST: tl.constexpr = tl.constexpr(1e-30)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
#: the bits of infinity as an integer; those of numbers >= 0 are ordered like the numbers
INFINITE_BITS: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def pace_of(temperature):
    """What takes a distance to the exponent of its weight, in base 2."""
    return LOG2E / tl.maximum(temperature, COLDEST)


@triton.jit
def peak_of(tops, row, chunks, BLOCK_C: tl.constexpr):
    """(largest logit of the row, whether it is a finite number)."""
    at = tl.arange(0, BLOCK_C)
    top = tl.load(tops + row * chunks + at, mask=at < chunks, other=float("-inf"))
    best = tl.max(top, 0)
    broken = tl.max((top != top).to(tl.int32), 0) > 0
    fine = (best > float("-inf")) & (best < INFINITY) & (not broken)
    return tl.where(fine, best, 0.0), fine


@triton.jit
def _place(
    index, spot, n, width, vocab, SOURCE: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr
):
    """Where the numbers `spot` of n are, and which of them there are."""
    there = spot < n
    if SOURCE == "blocks":  # `index` holds the ids of blocks
        at = tl.load(index + spot // BLOCK, mask=there, other=0) * BLOCK + spot % BLOCK
        there &= at < vocab
    elif SOURCE == "segments":  # the first `width` of every segment, `index` says how many it has
        at = spot // width * SEGMENT + spot % width
        there &= spot % width < tl.load(index + spot // width, mask=there, other=0)
    else:
        at = spot
    return at, there


@triton.jit
def _search(
    numbers, index, n, width, vocab, best, pace, min_p, target, low, high, SOURCE: tl.constexpr,
    MASS: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Smallest distance, as bits in (low, high], within which there are `target` of n numbers (or,
    with MASS, weights of the sum `target`); `high` where there are not.
    """
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
            place, there = _place(index, start + at, n, width, vocab, SOURCE, BLOCK, SEGMENT)
            number = tl.load(numbers + place, mask=there, other=float("-inf")).to(tl.float32)
            distance = best - number
            if MASS:
                weight = tl.exp2(-distance * pace)
                measure = tl.where(weight >= min_p, weight, 0.0)
            else:
                measure = tl.where(there, 1.0, 0.0)
            total += tl.where(distance <= limits, measure, 0.0)
            start += TILE
        short = tl.sum(total, 1) < target
        below = tl.max(tl.where(short, bounds, low), 0)
        high = tl.min(tl.where(short, high, bounds), 0)
        low = tl.minimum(below, high - 1)
    return high


@triton.jit
def _mass(
    numbers, index, n, vocab, best, pace, min_p, high, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Sum of the weights of n numbers of blocks, within the distance whose bits are `high`."""
    limit = high.to(tl.float32, bitcast=True)
    total = tl.zeros([1, TILE], tl.float32)
    at = tl.arange(0, TILE)[None, :]
    start = 0
    while start < n:
        place, there = _place(index, start + at, n, 1, vocab, "blocks", BLOCK, 1)
        number = tl.load(numbers + place, mask=there, other=float("-inf")).to(tl.float32)
        distance = best - number
        weight = tl.exp2(-distance * pace)
        kept = (distance <= limit) & (weight >= min_p)
        total += tl.where(kept, weight, 0.0)
        start += TILE
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
def _bounds(low, high):
    """WAYS distances that divide (low, high] evenly; the last one is `high`."""
    way = tl.arange(0, WAYS)
    base = tl.maximum(low, 0.0)
    return tl.where(way == WAYS - 1, high, base + (high - base) * ((way + 1) / WAYS))


@triton.jit
def _bracket(
    masses, brackets, tops, bottoms, row, rows, chunks, vocab, best, pace, top_p,
    PASS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """After PASS passes of `narrow`: (low, high, mass within low, mass that top-p wants).

    Beyond the first `high`, a whole vocabulary of weights would not make up what is left out.
    """
    nth = tl.arange(0, BLOCK_C)
    if PASS == 0:
        bottom = tl.load(bottoms + row * chunks + nth, mask=nth < chunks, other=INFINITY)
        reach = tl.log2(vocab / (1.0 - top_p)) * 1.0001 / pace
        return -1.0, tl.minimum(best - tl.min(bottom, 0), reach), 0.0, 0.0
    else:
        before = brackets + ((PASS - 1) * rows + row) * 4
        low, high = tl.load(before), tl.load(before + 1)
        base, target = tl.load(before + 2), tl.load(before + 3)
        way = tl.arange(0, WAYS)
        spot = (((PASS - 1) * rows + row) * chunks + nth[:, None]) * WAYS + way[None, :]
        some = tl.load(masses + spot, mask=(nth < chunks)[:, None], other=0.0)
        mass = tl.sum(some, 0)
        if PASS == 1:  # whose last way had no limit
            target = top_p * tl.max(mass, 0)
        bounds = _bounds(low, high)
        short = (mass < target) & (way < WAYS - 1)
        base = tl.max(tl.where(short, mass, base), 0)
        below = tl.max(tl.where(short, bounds, low), 0)
        return below, tl.min(tl.where(short, high, bounds), 0), base, target


@triton.jit
def _seeks_mass(temperature, top_k, top_p, fine, vocab):
    """Whether top-p looks at a whole row, rather than at what top-k leaves."""
    return (temperature > 0) & fine & (top_p < 1) & ((top_k <= 0) | (top_k >= vocab))


@triton.jit(do_not_specialize=["rows"])
def narrow(
    logits, temperatures, top_ks, top_ps, min_ps, tops, bottoms, masses, brackets, vocab, row_step,
    chunks, rows, PASS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mass of a chunk within each of WAYS distances, which divide what the pass before found."""
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    temperature, top_p = tl.load(temperatures + row), tl.load(top_ps + row)
    best, fine = peak_of(tops, row, chunks, BLOCK_C)
    if _seeks_mass(temperature, tl.load(top_ks + row), top_p, fine, vocab):
        pace = pace_of(temperature)
        low, high, base, target = _bracket(
            masses, brackets, tops, bottoms, row, rows, chunks, vocab, best, pace, top_p, PASS,
            BLOCK_C,
        )  # fmt: skip
        if chunk == 0:
            mine = brackets + (PASS * rows + row) * 4
            tl.store(mine, low)
            tl.store(mine + 1, high)
            tl.store(mine + 2, base)
            tl.store(mine + 3, target)
        way = tl.arange(0, WAYS)
        limits = _bounds(low, high)
        if PASS == 0:
            limits = tl.where(way == WAYS - 1, INFINITY, limits)
        at = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
        number = tl.load(logits + row * row_step + at, mask=at < vocab, other=float("-inf"))
        distance = best - number.to(tl.float32)
        weight = tl.exp2(-distance * pace)
        weight = tl.where(weight >= tl.load(min_ps + row), weight, 0.0)
        mass = tl.sum(tl.where(distance <= limits[:, None], weight, 0.0), 1)
        tl.store(masses + ((PASS * rows + row) * chunks + chunk) * WAYS + way, mass)


@triton.jit(do_not_specialize=["rows"])
def gather(
    logits, temperatures, top_ks, top_ps, tops, bottoms, masses, brackets, segments, counts, vocab,
    row_step, chunks, rows, PASSES: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The numbers between the distances that the last pass found, in order, as far as they fit."""
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    temperature, top_p = tl.load(temperatures + row), tl.load(top_ps + row)
    best, fine = peak_of(tops, row, chunks, BLOCK_C)
    if _seeks_mass(temperature, tl.load(top_ks + row), top_p, fine, vocab):
        low, high, base, target = _bracket(
            masses, brackets, tops, bottoms, row, rows, chunks, vocab, best, pace_of(temperature),
            top_p, PASSES, BLOCK_C,
        )  # fmt: skip
        if chunk == 0:
            mine = brackets + (PASSES * rows + row) * 4
            tl.store(mine, low)
            tl.store(mine + 1, high)
            tl.store(mine + 2, base)
            tl.store(mine + 3, target)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        number = tl.load(logits + row * row_step + at, mask=at < vocab, other=float("-inf"))
        distance = best - number.to(tl.float32)
        mine = ((distance > low) & (distance <= high)).to(tl.int32)
        nth = tl.cumsum(mine, 0) - 1
        place = row * chunks + chunk
        tl.store(segments + place * SEGMENT + nth, number, mask=(mine > 0) & (nth < SEGMENT))
        tl.store(counts + place, tl.sum(mine, 0))


@triton.jit(do_not_specialize=["rows"])
def settle(
    logits, temperatures, top_ks, top_ps, min_ps, tops, block_tops, blocks, brackets, segments,
    counts, floors, vocab, row_step, rows, CHUNKS: tl.constexpr, PASSES: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program a row: `floors` [R], the smallest weight that min-p, top-k and top-p keep.

    Equal weights share their fate. For top-k, only blocks are looked at that reach as far as the
    k-th largest block; for top-p alone, only what `gather` found, if that is not too much.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    min_p = tl.load(min_ps + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    best, fine = peak_of(tops, row, CHUNKS, BLOCK_C)
    pace = pace_of(temperature)
    n: tl.constexpr = CHUNKS * (CHUNK // BLOCK)
    mine = block_tops + row * n
    index = blocks + row * n
    numbers = logits + row * row_step
    high = tl.full((), INFINITE_BITS, tl.int32)
    start = tl.full((), -1, tl.int32)
    if _seeks_mass(temperature, top_k, top_p, fine, vocab):
        found = brackets + (PASSES * rows + row) * 4
        low = tl.load(found)
        start = tl.where(low < 0, -1, low.to(tl.int32, bitcast=True))
        high = tl.load(found + 1).to(tl.int32, bitcast=True)
        target = tl.load(found + 3)
        nth = tl.arange(0, BLOCK_C)
        count = tl.load(counts + row * CHUNKS + nth, mask=nth < CHUNKS, other=0)
        width = tl.max(count, 0)
        if width <= SEGMENT:
            high = _search(
                segments + row * (CHUNKS * SEGMENT), counts + row * CHUNKS, CHUNKS * width, width,
                vocab, best, pace, min_p, target - tl.load(found + 2), start, high, "segments",
                True, BLOCK, SEGMENT, TILE,
            )  # fmt: skip
        else:
            n_live = _live(mine, index, n, best, high.to(tl.float32, bitcast=True), TILE) * BLOCK
            high = _search(
                numbers, index, n_live, 1, vocab, best, pace, min_p, target, start, high, "blocks",
                True, BLOCK, SEGMENT, TILE,
            )  # fmt: skip
    elif (temperature > 0) & fine & (top_k > 0) & (top_k < vocab):
        wanted = top_k.to(tl.float32)
        high = _search(
            mine, mine, n, 1, vocab, best, pace, min_p, wanted, start, high, "all", False, BLOCK,
            SEGMENT, TILE,
        )  # fmt: skip
        n_live = _live(mine, index, n, best, high.to(tl.float32, bitcast=True), TILE) * BLOCK
        high = _search(
            numbers, index, n_live, 1, vocab, best, pace, min_p, wanted, start, high, "blocks",
            False, BLOCK, SEGMENT, TILE,
        )  # fmt: skip
        if top_p < 1:
            mass = _mass(numbers, index, n_live, vocab, best, pace, min_p, high, BLOCK, TILE)
            high = _search(
                numbers, index, n_live, 1, vocab, best, pace, min_p, top_p * mass, start, high,
                "blocks", True, BLOCK, SEGMENT, TILE,
            )  # fmt: skip
    edge = high.to(tl.float32, bitcast=True)
    tl.store(floors + row, tl.maximum(min_p, tl.exp2(-edge * pace)))


def find_floors(
    logits: Tensor, wishes: tuple[Tensor, Tensor, Tensor], min_p: Tensor, tops: Tensor,
    bottoms: Tensor, block_tops: Tensor, floors: Tensor, block_c: int,
) -> None:  # fmt: skip
    """Write `floors` [R]; `wishes` are temperature, top_k and top_p.

    `tops` and `bottoms` [R, C] are the largest and smallest logits of the chunks, `block_tops`
    [R, C, CHUNK / BLOCK] the largest of blocks; `block_c` is a power of two >= C.
    """
    (rows, vocab), chunks = logits.shape, tops.shape[1]
    make, step = logits.new_empty, logits.stride(0)
    masses = make((PASSES, rows, chunks, WAYS.value), dtype=torch.float32)
    brackets = make((PASSES + 1, rows, 4), dtype=torch.float32)
    segments = make((rows, chunks, SEGMENT))
    counts = make((rows, chunks), dtype=torch.int32)
    blocks = make(block_tops.shape, dtype=torch.int32)
    for nth in range(PASSES):
        narrow[(chunks * rows,)](
            logits, *wishes, min_p, tops, bottoms, masses, brackets, vocab, step, chunks, rows,
            nth, CHUNK, block_c, num_warps=4,
        )  # fmt: skip
    gather[(chunks * rows,)](
        logits, *wishes, tops, bottoms, masses, brackets, segments, counts, vocab, step, chunks,
        rows, PASSES, CHUNK, SEGMENT, block_c, num_warps=4,
    )  # fmt: skip
    settle[(rows,)](
        logits, *wishes, min_p, tops, block_tops, blocks, brackets, segments, counts, floors,
        vocab, step, rows, chunks, PASSES, CHUNK, BLOCK, SEGMENT, block_c, TILE, num_warps=8,
    )  # fmt: skip
