"""Proposers without a model: drafts are those of naive references, and memory is bounded."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.test_suffix_tree import BOTH, Make, counts, naive

from kvarn.core.config import EngineConfig
from kvarn.core.errors import ConfigError
from kvarn.core.plan import Draft
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.speculate import build
from kvarn.speculate.part import Ask, Verified
from kvarn.speculate.propose import native_tree
from kvarn.speculate.propose.mix import WEIGHT, Mix
from kvarn.speculate.propose.ngram import NGram
from kvarn.speculate.propose.suffix import Suffix, pruned
from kvarn.speculate.propose.suffix_tree import Drafting, Found, SuffixTree

PIECES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=15)
#: what a sequence says next, by slot; the last: whether it ends then
ROUNDS = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=5), st.booleans()),
    max_size=12,
)


class Control:
    """Stops no draft before `most` tokens."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most

    def goes_on(self, confidence: Sequence[float]) -> bool:
        return len(confidence) < self.most


GO: Any = Control()


def sequence(index: int, prompt: Sequence[int], salt: str = "") -> Seq:
    request = Request(str(index), list(prompt), cache_salt=salt)
    return Seq(index, request, 0, list(prompt), 10**6, (0, 0))


def drafted(proposer: Any, seq: Seq, most: int, control: Any = GO) -> list[int]:
    [draft] = proposer.propose([Ask(seq, most)], control)
    assert len(draft.tokens) == len(draft.confidence) <= most
    tokens: list[int] = draft.tokens
    return tokens


# n-grams


def looked_up(tokens: list[int], most: int, window: int) -> tuple[list[int], int]:
    """What follows the latest earlier match of the longest run that has one, and its length."""
    for n in (4, 3, 2):
        oldest = max(n, len(tokens) - window)
        for end in range(len(tokens) - 1, oldest - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                return tokens[end : end + most], n
    return [], 0


@settings(max_examples=200, deadline=None)
@given(PIECES, st.integers(1, 9), st.sampled_from([4, 7, 10**6]))
def test_ngram_is_a_search_of_the_whole_text(
    pieces: list[list[int]], most: int, window: int
) -> None:
    proposer, seq = NGram(window=window), sequence(1, [0])
    for piece in pieces:
        seq.tokens += piece
        wanted, n = looked_up(seq.tokens, most, window)
        [draft] = proposer.propose([Ask(seq, most)], GO)
        assert draft.tokens == wanted
        assert draft.confidence == [proposer.rate(n) for _ in wanted]
    rebuilt = NGram(window=window)
    drafted(rebuilt, seq, most)
    assert rebuilt.entries() == proposer.entries() <= 3 * window
    proposer.forget(seq)
    assert proposer.entries() == 0


def test_ngram_trusts_what_was_right() -> None:
    proposer, seq = NGram(), sequence(1, [1, 2, 3, 4, 9, 1, 2, 3, 4])
    assert drafted(proposer, seq, 3) == [9, 1, 2]
    before = {n: proposer.rate(n) for n in (2, 3, 4)}
    proposer.observe([Verified(1, 3, 3), Verified(2, 3, 0)])  # nothing is known of sequence 2
    assert proposer.rate(4) > before[4]
    assert [proposer.rate(n) for n in (2, 3)] == [before[2], before[3]]
    proposer.observe([Verified(1, 3, 0)] * 9)
    assert proposer.rate(4) < before[4]
    assert drafted(proposer, seq, 3, Control(1)) == [9]


@pytest.mark.parametrize("options", [{"n_min": 0}, {"n_min": 5}, {"window": 3}])
def test_ngram_refuses_nonsense(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="n-gram"):
        NGram(**options)


# suffix trees


def best(texts: list[tuple[int, ...]], context: list[int], most: int, tree: bool) -> Found:
    """The draft by counts of all runs of these texts."""
    how = Drafting(most, tree=tree)
    return naive(counts(texts, 6), tuple(context), 6, how)


@BOTH
@settings(max_examples=80, deadline=None)
@given(ROUNDS, st.integers(1, 8), st.booleans())
def test_suffix_drafts_are_those_of_counts(
    make: Make, rounds: list[tuple[int, list[int], bool]], most: int, tree: bool
) -> None:
    """Of the request's own text, and of all outputs of its tenant, whichever expects more."""
    proposer, live, ended = Suffix(Drafting(tree=tree), 6, tree=make), dict[int, Seq](), list[Seq]()
    for number, (slot, tokens, ends) in enumerate(rounds):
        seq = live.setdefault(slot, sequence(number, [slot, 1, 0], salt="ab"[slot % 2]))
        seq.tokens += tokens
        asks = [Ask(one, most) for one in live.values()]
        for ask, draft in zip(asks, proposer.propose(asks, GO), strict=True):
            tenant = ask.seq.request.cache_salt
            outputs = [
                tuple(one.tokens[one.prompt_len :])
                for one in [*ended, *live.values()]
                if one.request.cache_salt == tenant
            ]
            own = best([tuple(ask.seq.tokens)], ask.seq.tokens, most, tree)
            other = best(outputs, ask.seq.tokens, most, tree)
            wanted = max(own, other, key=lambda found: (found.score, found.matched))
            assert draft.tokens == wanted.tokens
            assert draft.parents == (wanted.parents if tree else None)
            assert draft.confidence == wanted.confidence
            assert draft.score == pytest.approx(wanted.score)
        if ends:
            proposer.forget(seq)
            ended.append(live.pop(slot))


@BOTH
def test_suffix_memory_is_bounded_and_tenants_are_apart(make: Make) -> None:
    rng, proposer = Random(3), Suffix(max_tokens=300, tree=make)
    text, first = list(range(100, 140)), sequence(1, [1], "a")
    first.tokens += text
    proposer.forget(first)
    assert drafted(proposer, sequence(2, text[:9], "b"), 8) == []
    assert drafted(proposer, sequence(3, text[:9], "a"), 8) == text[9:17]
    for index in range(10, 70):
        seq = sequence(index, [1], rng.choice("abc"))
        seq.tokens += [rng.randrange(50) for _ in range(rng.randrange(1, 90))]
        drafted(proposer, seq, 4)
        if rng.random() < 0.7:
            proposer.forget(seq)
        assert proposer.tokens <= 300
        assert proposer.tokens == sum(tree.tokens for tree in proposer._outputs.trees.values())
    assert drafted(proposer, sequence(99, text[:9], "a"), 8) == []  # the oldest went first


def test_every_path_of_a_tree_ends_where_the_control_says() -> None:
    """What is left: the tokens with fewer than `most` before them, each behind its parent."""
    chance = Random(2)
    for _ in range(200):
        n = chance.randint(0, 12)
        parents = [chance.randint(-1, i - 1) for i in range(n)]
        found = Found(list(range(n)), parents, [chance.random() for _ in range(n)])
        ways: list[list[int]] = []
        for i, parent in enumerate(parents):
            ways.append([*(ways[parent] if parent >= 0 else []), i])
        for most in (0, 1, 2, 3):
            control: Any = Control(most)
            left = pruned(found, control)
            assert left.tokens == [i for i in range(n) if len(ways[i]) <= most]
            assert left.confidence == [found.confidence[i] for i in left.tokens]
            for i, parent in zip(left.tokens, left.parents or [], strict=True):
                assert (left.tokens[parent] if parent >= 0 else -1) == parents[i]


@BOTH
def test_suffix_reads_long_prompts_in_turns(make: Make) -> None:
    proposer, seq = Suffix(catch_up=16, tree=make), sequence(1, [*range(20), *range(19)])
    assert drafted(proposer, seq, 4) == []
    assert drafted(proposer, seq, 4) == []
    assert drafted(proposer, seq, 4) == [19, 0, 1, 2]


def test_the_tree_in_python_stands_in_where_nothing_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = EngineConfig(speculate="suffix")
    for choice, compiled in (("auto", native_tree.available()), ("off", False)):
        monkeypatch.setenv("KVARN_NATIVE", choice)
        native_tree._outcome.cache_clear()
        try:
            proposer: Any = build.build_speculation(config, None).proposer
            assert (proposer._tree is not SuffixTree) == compiled
            assert build.suffix_trees()["how"] == ("compiled" if compiled else "in Python")
            assert build.suffix_trees()["why"] == native_tree.reason()
        finally:
            native_tree._outcome.cache_clear()


# the mix


class Sure:
    """Drafts one token for each sequence, as sure as it is told."""

    def __init__(self, token: int) -> None:
        self.token, self.sure = token, dict[int, float]()
        self.seen: list[int] = []
        self.forgotten: list[int] = []

    def propose(self, asks: Sequence[Ask], control: Any) -> list[Draft]:
        return [Draft([self.token], None, [self.sure.get(ask.seq.id, 0.5)]) for ask in asks]

    def behind(self, seq: Seq) -> int:
        return self.token

    def observe(self, records: Sequence[Verified]) -> None:
        self.seen = [record.seq for record in records]

    def forget(self, seq: Seq) -> None:
        self.forgotten.append(seq.id)


MIXED = st.lists(
    st.dictionaries(st.integers(0, 3), st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1),
    max_size=15,
)


@settings(max_examples=100, deadline=None)
@given(MIXED)
def test_mix_takes_the_draft_that_expects_more(
    rounds: list[dict[int, tuple[float, int]]],
) -> None:
    free, other = Sure(7), Sure(8)
    mix, typical = Mix(free, other), 0.4
    mix.typical = typical
    for round_ in rounds:
        free.sure = {seq: sure for seq, (sure, _) in round_.items()}
        drafts = mix.propose([Ask(sequence(seq, [1]), 3) for seq in round_], GO)
        wanted = {seq: 7 if sure > typical else 8 for seq, (sure, _) in round_.items()}
        assert [draft.tokens for draft in drafts] == [[token] for token in wanted.values()]
        mix.observe([Verified(seq, 4, stood) for seq, (_, stood) in round_.items()])
        assert free.seen == [seq for seq in round_ if wanted[seq] == 7]
        assert other.seen == [seq for seq in round_ if wanted[seq] == 8]
        for seq in other.seen:
            typical += WEIGHT * (round_[seq][1] - typical)
        assert mix.typical == typical
    assert mix.behind(sequence(2, [1])) == 8
    mix.forget(sequence(2, [1]))
    assert free.forgotten == other.forgotten == [2]


@pytest.mark.parametrize("proposer", [NGram(), Suffix(catch_up=40)], ids=("ngram", "suffix"))
def test_what_is_to_be_read_of_a_sequence(proposer: Any) -> None:
    """All of it at first; a suffix tree reads a long prompt in several rounds."""
    seq = sequence(1, list(range(50)))
    assert proposer.behind(seq) == 50
    proposer.propose([Ask(seq, 4)], GO)
    assert proposer.behind(seq) == (1 if isinstance(proposer, NGram) else 10)
    proposer.propose([Ask(seq, 4)], GO)
    assert proposer.behind(seq) <= 1
    seq.tokens += [7, 8]
    assert 2 <= proposer.behind(seq) <= 3
    proposer.forget(seq)
    assert proposer.behind(seq) == 52


def test_mix_takes_what_there_is_where_the_other_is_behind() -> None:
    class Behind(Sure):
        def propose(self, asks: Sequence[Ask], control: Any) -> list[Draft]:
            return [Draft() for _ in asks]

    free, other = Sure(7), Behind(8)
    mix = Mix(free, other)
    [draft] = mix.propose([Ask(sequence(1, [1]), 3)], GO)
    assert draft.tokens == [7] and draft.score < mix.typical
    mix.observe([Verified(1, 1, 0)])
    assert (free.seen, other.seen, mix.typical) == ([1], [], 1.0)


def test_mix_takes_two_proposers() -> None:
    one = Sure(1)
    with pytest.raises(ConfigError, match="two proposers"):
        Mix(one, one)
