"""The suffix trees, in Python and compiled, against all runs of tokens, counted by brute force."""

import heapq
from collections import Counter
from collections.abc import Callable
from math import floor
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.speculate.propose import native_tree
from kvarn.speculate.propose.native_tree import NativeTree
from kvarn.speculate.propose.suffix_tree import Drafting, Found, SuffixTree

NEEDS_COMPILER = pytest.mark.skipif(
    not native_tree.available(), reason=f"no compiled suffix tree: {native_tree.reason()}"
)
BOTH = pytest.mark.parametrize("make", [SuffixTree, pytest.param(NativeTree, marks=NEEDS_COMPILER)])

ADD = st.tuples(st.just("add"), st.integers(0, 3), st.lists(st.integers(0, 2), max_size=9))
END = st.tuples(st.sampled_from(["remove", "close"]), st.integers(0, 3), st.just([]))
STREAM = st.lists(st.one_of(ADD, ADD, ADD, END), max_size=25)
Texts = list[tuple[int, ...]]
Make = Callable[[int], Any]  #: a tree, of a depth


def counts(texts: Texts, depth: int) -> Counter[tuple[int, ...]]:
    """Occurrences of every run of at most `depth` tokens."""
    found: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        for start in range(len(text)):
            for end in range(start + 1, min(len(text), start + depth) + 1):
                found[text[start:end]] += 1
    return found


def played(
    make: Make, stream: list[tuple[str, int, list[int]]], depth: int
) -> tuple[Any, dict[int, tuple[int, ...]]]:
    """The tree after a stream of changes, and the texts that should be in it."""
    tree, texts, names, closed, fresh = make(depth), {}, dict[int, int](), set(), 0
    for what, slot, tokens in stream:
        if what == "add":
            if slot not in names or names[slot] in closed:
                names[slot], fresh = fresh, fresh + 1
            key = names[slot]
            tree.extend(key, tokens)
            texts[key] = texts.get(key, ()) + tuple(tokens)
        elif slot in names and what == "close":
            tree.close(names[slot])
            closed.add(names[slot])
        elif slot in names:
            tree.remove(names[slot])
            del texts[names.pop(slot)]
    return tree, texts


def naive(
    seen: Counter[tuple[int, ...]], context: tuple[int, ...], depth: int, how: Drafting
) -> Found:
    """The best draft by counts alone; the longest match of equals."""
    best = Found()
    for matched in range(1, min(depth, len(context)) + 1):
        run = context[len(context) - matched :]
        if not seen[run]:
            break
        most = min(how.cap, floor(how.factor * matched + how.offset))
        found = grown(seen, run, most, how, depth)
        if found.tokens and found.score >= best.score:
            best = found
            best.matched = matched
    return best


def grown(
    seen: Counter[tuple[int, ...]], run: tuple[int, ...], most: int, how: Drafting, depth: int
) -> Found:
    found, heap, order = Found(), [], 0
    place = [(-1.0, 0, -2, 0.0, run)]
    while place and len(found.tokens) < most:
        negative, _, parent, sure, here = heapq.heappop(place) if not heap else heapq.heappop(heap)
        if parent != -2:
            found.add(here[-1], parent, sure, -negative)
        options = [
            (seen[(*here, t)], t) for t in range(3) if len(here) < depth and seen[(*here, t)]
        ]
        options.sort(key=lambda o: (-o[0], o[1]))
        for n, token in options if how.tree else options[:1]:
            sure = n / seen[here]
            if -negative * sure >= how.min_prob:
                order += 1
                entry = (negative * sure, order, len(found.tokens) - 1, sure, (*here, token))
                heapq.heappush(heap, entry)
        place = heap
    return found


@BOTH
@settings(max_examples=150, deadline=None)
@given(STREAM, st.integers(2, 7))
def test_counts_are_those_of_all_runs(
    make: Make, stream: list[tuple[str, int, list[int]]], depth: int
) -> None:
    tree, texts_by_key = played(make, stream, depth)
    texts = list(texts_by_key.values())
    seen = counts(texts, depth)
    assert {run: tree.count(run) for run in seen} == dict(seen)
    assert tree.tokens == sum(map(len, texts))
    assert tree.nodes() <= 2 * tree.tokens
    absent = [(*run, t) for run in list(seen) for t in range(3) if len(run) < depth]
    assert all(tree.count(run) == seen[run] for run in absent)


@BOTH
@settings(max_examples=150, deadline=None)
@given(
    STREAM,
    st.integers(3, 7),
    st.lists(st.integers(0, 2), min_size=1, max_size=9),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.booleans(),
)
def test_drafts_are_those_of_counts(
    make: Make,
    stream: list[tuple[str, int, list[int]]],
    depth: int,
    context: list[int],
    factor: float,
    tree_mode: bool,
) -> None:
    tree, texts = played(make, stream, depth)
    how = Drafting(6, factor, 0.5, 0.1, tree_mode)
    found = tree.speculate(context, how)
    wanted = naive(counts(list(texts.values()), depth), tuple(context), depth, how)
    assert found.score == pytest.approx(wanted.score)
    assert (found.tokens, found.parents) == (wanted.tokens, wanted.parents)
    assert found.confidence == pytest.approx(wanted.confidence)
    assert found.matched == wanted.matched


@BOTH
@settings(max_examples=60, deadline=None)
@given(STREAM)
def test_removing_all_leaves_nothing(make: Make, stream: list[tuple[str, int, list[int]]]) -> None:
    tree, texts = played(make, stream, 5)
    for key in texts:
        tree.remove(key)
    assert tree.nodes() == 0
    assert tree.tokens == 0


@BOTH
def test_what_cannot_be_is_refused(make: Make) -> None:
    tree = make(4)
    tree.extend(1, [5, 6])
    tree.close(1)
    with pytest.raises(ValueError, match="closed"):
        tree.extend(1, [7])
    with pytest.raises(KeyError):
        tree.remove(2)
    assert tree.count([5, 6]) == 1


@NEEDS_COMPILER
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([2, 3, 30, 3000]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.booleans(),
)
def test_both_trees_draft_the_same(
    seed: int, vocab: int, factor: float, min_prob: float, tree_mode: bool
) -> None:
    """Texts that repeat one another with errors, at full depth; equal to the last bit."""
    rng, trees = Random(seed), (SuffixTree(64), NativeTree(64))
    base, live = [rng.randrange(vocab) for _ in range(120)], dict[int, list[int]]()
    how = Drafting(32, factor, rng.choice([0.0, 0.5]), min_prob, tree_mode)
    for key in range(25):
        start = rng.randrange(100)
        text = [t if rng.random() > 0.1 else rng.randrange(vocab) for t in base[start:]]
        live[key] = text
        gone = rng.choice(list(live)) if rng.random() < 0.5 else None
        for tree in trees:
            for at in range(0, len(text), 7):
                tree.extend(key, text[at : at + 7])
            if gone is not None:
                tree.remove(gone)
        if gone is not None:
            del live[gone]
        context = text[: rng.randrange(1, len(text) + 1)]
        first, second = (tree.speculate(context, how) for tree in trees)
        assert first == second
        assert trees[0].nodes() == trees[1].nodes()
