"""How much of the prompts a prefix cache could give back: unlimited, and LRU of every size.

Only full blocks are reusable: an engine caches a page when every position of it is known. Ids are
chained, so a known block means a known prefix.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from kvarn.core.errors import ConfigError
from kvarn.workload.trace import Trace, TraceRequest


@dataclass(slots=True, frozen=True)
class Reuse:
    """Hits of a cache that never evicts, and how many blocks it keeps for nothing."""

    blocks: float  #: share of the listed blocks seen before, the partial last ones included
    tokens: float  #: share of the prompt tokens in them
    full: float  #: share of the prompt tokens in full blocks seen before: what an engine can reuse
    once: float  #: share of the distinct blocks that occur a single time


def reuse(trace: Trace) -> Reuse | None:
    """Reuse with unlimited memory; None where the trace knows no contents.

    Published figures count a partial last block as seen when its id was: `blocks` and `tokens` do
    too, so that they can be compared; `full` does not.
    """
    counts: Counter[int] = Counter()
    listed = hits = hit_tokens = full_tokens = prompt = 0
    for one in trace:
        prompt += one.n_in
        listed += len(one.blocks)
        for j, block in enumerate(one.blocks):
            if counts[block]:
                size = min(trace.block_size, one.n_in - j * trace.block_size)
                hits += 1
                hit_tokens += size
                full_tokens += size if size == trace.block_size else 0
        counts.update(one.blocks)
    if not listed:
        return None
    once = sum(n == 1 for n in counts.values()) / len(counts)
    return Reuse(hits / listed, hit_tokens / prompt, full_tokens / prompt, once)


@dataclass(slots=True, frozen=True)
class LruCurve:
    """Hits of an LRU prefix cache by capacity, for one cache that serves in order of arrival."""

    distances: list[int]  #: capacities at which hits are added, rising [blocks]
    hits: list[int]  #: blocks that hit at each of those capacities, cumulative
    block_size: int  #: [tokens]
    prompt: int  #: tokens of all prompts

    def hit_rate(self, capacity: int) -> float:
        """Share of the prompt tokens found with room for `capacity` blocks."""
        if capacity < 0:
            raise ConfigError(f"the capacity is {capacity} blocks; give 0 or more")
        i = bisect_right(self.distances, capacity)
        return self.hits[i - 1] * self.block_size / self.prompt if i else 0.0

    @property
    def unlimited(self) -> float:
        """Share found by a cache that never evicts."""
        return self.hits[-1] * self.block_size / self.prompt if self.hits else 0.0


def lru_curve(trace: Trace) -> LruCurve:
    """Every capacity in one pass, by stack distances (Mattson et al. 1970) in O(n log n).

    A request is looked up as a whole; then its full blocks become the most recent, the start of
    the prompt last, so that what LRU keeps is always a set of whole prefixes.
    """
    total = sum(len(one.blocks) for one in trace)
    live = Fenwick(total)  # 1 at the last touch of each block
    touched: dict[int, int] = {}
    found: Counter[int] = Counter()
    now = 0
    for one in trace:
        blocks = full_blocks(one, trace.block_size)
        for block in blocks:
            if block in touched:
                found[len(touched) - live.below(touched[block])] += 1
        for block in reversed(blocks):
            if block in touched:
                live.add(touched[block], -1)
            live.add(now, 1)
            touched[block] = now
            now += 1
    distances = sorted(found)
    hits = list(accumulate(found[distance] for distance in distances))
    return LruCurve(distances, hits, trace.block_size, sum(one.n_in for one in trace))


def full_blocks(request: TraceRequest, block_size: int) -> tuple[int, ...]:
    """The blocks whose every position belongs to the prompt."""
    return request.blocks[: request.n_in // block_size]


class Fenwick:
    """Prefix sums of `n` numbers that change, in O(log n) (Fenwick 1994)."""

    def __init__(self, n: int) -> None:
        self._sums = [0] * (n + 1)

    def add(self, i: int, value: int) -> None:
        """Add to number `i`."""
        for k in self._above(i + 1):
            self._sums[k] += value

    def below(self, i: int) -> int:
        """Sum of the numbers before `i`."""
        total = 0
        while i:
            total += self._sums[i]
            i &= i - 1
        return total

    def _above(self, k: int) -> Iterator[int]:
        while k < len(self._sums):
            yield k
            k += k & -k
