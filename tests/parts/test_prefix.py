"""Every prefix index against a brute-force oracle, every eviction policy against its promise."""

import random
from typing import Any

import pytest

from kvarn.core.part import find, known
from kvarn.kv.prefix import NO_PAGE, Node

PAGE = 4
INDEXES = sorted(name for kind, name in known() if kind == "prefix")
POLICIES = sorted(name for kind, name in known() if kind == "evict")


def make(index: str, policy: str = "lru", windows: tuple[int | None, ...] = (None,)) -> Any:
    return find("prefix", index)(PAGE, windows, find("evict", policy)())  # type: ignore[call-arg]


def insert(
    index: Any, tokens: list[int], first_page: int, now: float = 0.0, salt: str = ""
) -> Node:
    """Enter whole pages of `tokens` below what is there, and let go at once."""
    whole = len(tokens) // PAGE
    match = index.match(tokens, salt, whole)
    at = index.take(match, now)
    start = match.length
    if start < whole:
        pages = [list(range(first_page + start, first_page + whole)) for _ in index.windows]
        node = index.insert(at, tokens[start * PAGE : whole * PAGE], pages, now)
        assert node is not None
        if node is not at:
            index.pin(node)
            index.unpin(at, now)
            at = node
    index.unpin(at, now)
    return at  # type: ignore[no-any-return]


@pytest.mark.parametrize("index", INDEXES)
def test_match_equals_longest_common_prefix(index: str) -> None:
    chance = random.Random(1)
    tree = make(index)
    stored: list[list[int]] = []
    for i in range(200):
        tokens = [chance.randint(0, 1) for _ in range(chance.randint(1, 40))]
        longest = 0
        for other in stored:
            same = next((k for k, (a, b) in enumerate(zip(tokens, other)) if a != b), None)
            common = min(len(tokens), len(other)) if same is None else same
            longest = max(longest, common // PAGE)
        limit = chance.randint(0, 10)
        assert tree.match(tokens, "", limit).length == min(longest, limit)
        insert(tree, tokens, 1000 * i, float(i))
        stored.append(tokens)


@pytest.mark.parametrize("index", INDEXES)
def test_pages_belong_to_the_matched_tokens(index: str) -> None:
    tree = make(index)
    insert(tree, [1] * 12, 100)
    insert(tree, [1] * 8 + [2] * 8, 200)
    assert tree.match([1] * 12, "", 9).pages == [[100, 101, 102]]
    assert tree.match([1] * 8 + [2] * 8, "", 9).pages == [[100, 101, 202, 203]]


@pytest.mark.parametrize("index", INDEXES)
def test_salts_do_not_share(index: str) -> None:
    tree = make(index)
    insert(tree, [1] * 8, 0, salt="a")
    assert tree.match([1] * 8, "b", 2).length == 0
    assert tree.match([1] * 8, "a", 2).length == 2


@pytest.mark.parametrize("index", INDEXES)
def test_pinned_paths_survive_and_suffixes_go_first(index: str) -> None:
    tree = make(index)
    insert(tree, [1] * 16, 0, now=1.0)
    insert(tree, [1] * 8 + [2] * 8, 10, now=2.0)
    held = tree.take(tree.match([1] * 8, "", 2), 3.0)
    freed = tree.evict(100, 4.0)[0]
    assert sorted(freed) == [2, 3, 12, 13]
    assert freed.index(2) < freed.index(12)  # the path used longest ago goes first
    assert tree.match([1] * 16, "", 4).length == 2
    tree.unpin(held, 5.0)
    assert sorted(tree.evict(100, 6.0)[0]) == [0, 1]
    assert tree.nodes() == []


@pytest.mark.parametrize("index", INDEXES)
def test_eviction_takes_no_more_than_asked(index: str) -> None:
    tree = make(index)
    insert(tree, [1] * 40, 0)
    assert sorted(tree.evict(3, 1.0)[0]) == [7, 8, 9]
    assert tree.match([1] * 40, "", 10).length == 7


@pytest.mark.parametrize("index", INDEXES)
def test_windows_need_their_last_pages_only(index: str) -> None:
    tree = make(index, windows=(None, 6))
    insert(tree, [1] * 16, 0)
    tree.forget(1, 1)
    match = tree.match([1] * 16, "", 4)
    assert match.length == 4
    assert match.pages[1][1] == NO_PAGE
    # a match that ends at page 2 or 3 would need page 1 of the window group
    assert tree.match([1] * 12, "", 3).length == 1
    assert tree.match([1] * 8, "", 2).length == 1


@pytest.mark.parametrize("index", INDEXES)
def test_lfu_keeps_what_is_hit(index: str) -> None:
    """A prefix with hits survives newer ones without, under lfu; under lru it does not."""
    survivors = {}
    for policy in ("lru", "lfu"):
        tree = make(index, policy)
        insert(tree, [1] * 8, 0, now=1.0)
        for now in (2.0, 3.0):
            tree.unpin(tree.take(tree.match([1] * 8, "", 2), now), now)
        insert(tree, [2] * 8, 10, now=4.0)
        tree.evict(2, 5.0)
        survivors[policy] = tree.match([1] * 8, "", 2).length
    assert survivors == {"lru": 0, "lfu": 2}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("index", INDEXES)
def test_everything_can_be_evicted(index: str, policy: str) -> None:
    chance = random.Random(2)
    tree = make(index, policy, (None, 10))
    for i in range(100):
        insert(tree, [chance.randint(0, 1) for _ in range(30)], 100 * i, float(i))
    held = sum(len(node.tokens) // PAGE for node in tree.nodes())
    assert len(tree.evict(10_000, 200.0)[0]) == held
    assert tree.nodes() == []
