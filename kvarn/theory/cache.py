"""Upper bounds on prefix-cache hits, for requests given as chains of content ids.

An id names a block together with all before it, so whoever reads a block reads its whole prefix.
Requests are served in the order given; between two of them the cache holds at most `capacity`
tokens, and it holds only what earlier requests computed. Several caches with a router in front of
them hold no more than one cache of their joint capacity, so the bounds cover clusters as well.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvarn.core.errors import ConfigError

Chain = Sequence[int]  #: content ids of a prompt, from its start


@dataclass(slots=True, frozen=True)
class Hits:
    """Prompt tokens found in a cache, at best."""

    hit: float  #: [tokens]
    total: int  #: tokens of all prompts

    @property
    def rate(self) -> float:
        """Share of prompt tokens that hit, 0 for no tokens."""
        return self.hit / self.total if self.total else 0.0


def unlimited_hits(
    prompts: Sequence[Chain], *, block_size: int, sizes: Mapping[int, int] | None = None
) -> Hits:
    """Hits of a cache that never evicts: all but the first sight of every block.

    A bound in any order of service, since each distinct block is computed at least once.
    """
    size = _sizes(prompts, block_size, sizes)
    total = sum(size[block] for prompt in prompts for block in prompt)
    return Hits(total - sum(size.values()), total)


def belady_hits(
    prompts: Sequence[Chain],
    capacity: int,
    *,
    block_size: int,
    sizes: Mapping[int, int] | None = None,
) -> Hits:
    """The most hits that any eviction and admission policy gets with `capacity` tokens.

    Furthest next use goes first (Belady 1966), new blocks included (admission is free to refuse).
    Between two uses a block takes its tokens of every gap; a choice of such intervals that never
    exceeds the capacity is a schedule, and furthest-end-first packs the most of equal intervals.

    Equal sizes: exact. The prefix of a block is used no later than the block, so with ties broken
    towards the shorter prefix whole prefixes are kept, and hits are hits of prefixes.
    `sizes` (tokens by id; `block_size` for the rest): an upper bound. Every token is its own
    interval with the gain of one token, so blocks may be kept in part; no integral choice of
    blocks does better in tokens. (For hits counted in objects see FOO, arXiv 1711.03709.)
    """
    if capacity < 0:
        raise ConfigError(f"the capacity is {capacity} tokens; give 0 or more")
    size = _sizes(prompts, block_size, sizes)
    if sizes is None:
        capacity -= capacity % block_size
    ahead = _next_uses(prompts)
    kept: dict[int, int] = {}  # block -> tokens of it in the cache
    order: list[tuple[int, int, int]] = []  # (-next use, -depth, block): the first goes first
    until: dict[int, int] = {}  # block -> next use, to tell stale entries of `order`
    hit, total, used = 0, 0, 0
    for now, prompt in enumerate(prompts):
        for depth, block in enumerate(prompt):
            held = kept.pop(block, 0)
            hit += held
            total += size[block]
            used -= held
            later = ahead[now][depth]
            until[block] = later
            if later < len(prompts):
                kept[block] = size[block]
                used += size[block]
                heapq.heappush(order, (-later, -depth, block))
        while used > capacity:
            late, _, block = order[0]
            if block not in kept or until[block] != -late:
                heapq.heappop(order)
                continue
            gone = min(kept[block], used - capacity)
            used -= gone
            kept[block] -= gone
            if not kept[block]:
                del kept[block]
                heapq.heappop(order)
    return Hits(hit, total)


def _next_uses(prompts: Sequence[Chain]) -> list[list[int]]:
    """For every block of every prompt the next request that reads it; len(prompts) for none."""
    seen: dict[int, int] = {}
    ahead: list[list[int]] = []
    for now in range(len(prompts) - 1, -1, -1):
        ahead.append([seen.get(block, len(prompts)) for block in prompts[now]])
        seen.update((block, now) for block in prompts[now])
    return ahead[::-1]


def _sizes(
    prompts: Sequence[Chain], block_size: int, sizes: Mapping[int, int] | None
) -> dict[int, int]:
    """Tokens of every block that occurs; refuses sizes below 1 and chains with a block twice."""
    if block_size < 1:
        raise ConfigError(f"the block size is {block_size} tokens; give 1 or more")
    given = sizes or {}
    size: dict[int, int] = {}
    for row, prompt in enumerate(prompts):
        if len(set(prompt)) != len(prompt):
            raise ConfigError(f"prompt {row} names a block twice; ids must stand for prefixes")
        for block in prompt:
            size[block] = given.get(block, block_size)
            if size[block] < 1:
                raise ConfigError(f"block {block} has {size[block]} tokens; give 1 or more")
    return size
