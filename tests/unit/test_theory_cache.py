"""Cache bounds against every possible policy on tiny traces, and against LRU."""

import gzip
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.theory.cache import belady_hits, unlimited_hits


def chains(words: Sequence[Sequence[int]]) -> list[list[int]]:
    """Content ids of texts: one id for every distinct prefix."""
    ids: dict[tuple[int, ...], int] = {}
    return [
        [ids.setdefault(tuple(word[: k + 1]), len(ids)) for k in range(len(word))] for word in words
    ]


def brute_hits(prompts: list[list[int]], capacity: int, size: dict[int, int]) -> int:
    """The most hit tokens over all sequences of cache contents; hits are whole prefixes."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for prompt in prompts:
        after: dict[frozenset[int], int] = {}
        for state, hits in best.items():
            prefix = list(itertools.takewhile(lambda b, s=state: b in s, prompt))
            gained = hits + sum(size[b] for b in prefix)
            pool = sorted(state | set(prompt))
            for n in range(len(pool) + 1):
                for kept in itertools.combinations(pool, n):
                    if sum(size[b] for b in kept) <= capacity:
                        key = frozenset(kept)
                        after[key] = max(after.get(key, 0), gained)
        best = after
    return max(best.values())


def lru_hits(prompts: list[list[int]], blocks: int, block_size: int) -> int:
    """Least recently used, deepest first within a prompt, as an engine does it."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for prompt in prompts:
        hits += sum(1 for _ in itertools.takewhile(cache.__contains__, prompt))
        for block in reversed(prompt):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > blocks:
            cache.popitem(last=False)
    return hits * block_size


words = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1, max_size=5).map(
    chains
)


@settings(max_examples=60, deadline=None)
@given(words, st.integers(0, 4))
def test_equal_sizes_are_exact(prompts: list[list[int]], blocks: int) -> None:
    size = {block: 4 for prompt in prompts for block in prompt}
    best = brute_hits(prompts, 4 * blocks, size)
    assert belady_hits(prompts, 4 * blocks + 3, block_size=4).hit == best


@settings(max_examples=60, deadline=None)
@given(words, st.integers(0, 9), st.data())
def test_sizes_bound_every_policy(
    prompts: list[list[int]], capacity: int, data: st.DataObject
) -> None:
    size = {b: data.draw(st.integers(1, 4)) for b in {b for p in prompts for b in p}}
    bound = belady_hits(prompts, capacity, block_size=9, sizes=size)
    assert brute_hits(prompts, capacity, size) <= bound.hit
    assert bound.hit <= unlimited_hits(prompts, block_size=9, sizes=size).hit
    assert bound.total == sum(size[b] for p in prompts for b in p)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=40).map(chains),
    st.integers(0, 30),
)
def test_lru_is_below_belady_is_below_unlimited(prompts: list[list[int]], blocks: int) -> None:
    best = belady_hits(prompts, 16 * blocks, block_size=16)
    every = unlimited_hits(prompts, block_size=16)
    assert lru_hits(prompts, blocks, 16) <= best.hit <= every.hit
    assert belady_hits(prompts, 16 * 1000, block_size=16) == every
    assert belady_hits(prompts, 16 * (blocks + 1), block_size=16).hit >= best.hit
    assert 0 <= best.rate <= 1


def test_loop_where_lru_gets_nothing() -> None:
    prompts = [[k % 4] for k in range(40)]
    assert lru_hits(prompts, 3, 1) == 0
    assert belady_hits(prompts, 3, block_size=1).hit == 27  # 3 of 4, but for the first sights


TRACES = Path(os.environ.get("KVARN_TRACES", Path(__file__).parents[3] / "shared" / "traces"))
MOONCAKE = TRACES / "mooncake_conversation_trace.jsonl.gz"


@pytest.mark.skipif(not MOONCAKE.exists(), reason="needs the Mooncake trace")
def test_mooncake_reuse() -> None:
    with gzip.open(MOONCAKE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    prompts = [row["hash_ids"] for row in rows]
    every = unlimited_hits(prompts, block_size=512)
    distinct = len({block for prompt in prompts for block in prompt})
    assert every.hit == every.total - 512 * distinct
    assert every.rate == pytest.approx(0.366, abs=5e-4)  # of blocks: the README of the traces
    for blocks in (200, 2000, 20000):
        best = belady_hits(prompts, 512 * blocks, block_size=512).hit
        assert lru_hits(prompts, blocks, 512) <= best <= every.hit
    assert lru_hits(prompts, 200, 512) < belady_hits(prompts, 512 * 200, block_size=512).hit


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="block size is 0"):
        unlimited_hits([[1]], block_size=0)
    with pytest.raises(ConfigError, match="names a block twice"):
        belady_hits([[1, 1]], 4, block_size=1)
    with pytest.raises(ConfigError, match="capacity is -1"):
        belady_hits([[1]], -1, block_size=1)
    with pytest.raises(ConfigError, match="block 1 has 0 tokens"):
        unlimited_hits([[1]], block_size=1, sizes={1: 0})
    assert unlimited_hits([], block_size=1).rate == 0
