"""The suffix tree against all runs of tokens, counted by brute force."""

import heapq
from collections import Counter
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.speculate.propose.suffix_tree import Drafting, Found, SuffixTree

ADD = st.tuples(st.just("add"), st.integers(0, 3), st.lists(st.integers(0, 2), max_size=9))
END = st.tuples(st.sampled_from(["remove", "close"]), st.integers(0, 3), st.just([]))
STREAM = st.lists(st.one_of(ADD, ADD, ADD, END), max_size=25)
Texts = list[tuple[int, ...]]


def counts(texts: Texts, depth: int) -> Counter[tuple[int, ...]]:
    """Occurrences of every run of at most `depth` tokens."""
    found: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        for start in range(len(text)):
            for end in range(start + 1, min(len(text), start + depth) + 1):
                found[text[start:end]] += 1
    return found


def played(stream: list[tuple[str, int, list[int]]], depth: int) -> tuple[SuffixTree, Texts]:
    """The tree after a stream of changes, and the texts that should be in it."""
    tree, texts, names, closed, fresh = SuffixTree(depth), {}, dict[int, int](), set(), 0
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
    return tree, list(texts.values())


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


@settings(max_examples=150, deadline=None)
@given(STREAM, st.integers(2, 7))
def test_counts_are_those_of_all_runs(stream: list[tuple[str, int, list[int]]], depth: int) -> None:
    tree, texts = played(stream, depth)
    seen = counts(texts, depth)
    assert {run: tree.count(run) for run in seen} == dict(seen)
    assert tree.tokens == sum(map(len, texts))
    assert tree.nodes() <= 2 * tree.tokens
    absent = [(*run, t) for run in list(seen) for t in range(3) if len(run) < depth]
    assert all(tree.count(run) == seen[run] for run in absent)


@settings(max_examples=150, deadline=None)
@given(
    STREAM,
    st.integers(3, 7),
    st.lists(st.integers(0, 2), min_size=1, max_size=9),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.booleans(),
)
def test_drafts_are_those_of_counts(
    stream: list[tuple[str, int, list[int]]],
    depth: int,
    context: list[int],
    factor: float,
    tree_mode: bool,
) -> None:
    tree, texts = played(stream, depth)
    how = Drafting(6, factor, 0.5, 0.1, tree_mode)
    found = tree.speculate(context, how)
    wanted = naive(counts(texts, depth), tuple(context), depth, how)
    assert found.score == pytest.approx(wanted.score)
    assert (found.tokens, found.parents) == (wanted.tokens, wanted.parents)
    assert found.confidence == pytest.approx(wanted.confidence)
    assert found.matched == wanted.matched


@settings(max_examples=60, deadline=None)
@given(STREAM)
def test_removing_all_leaves_nothing(stream: list[tuple[str, int, list[int]]]) -> None:
    tree, _ = played(stream, 5)
    for key in list(tree._texts):
        tree.remove(key)
    assert tree.nodes() == 0
    assert tree.tokens == 0
