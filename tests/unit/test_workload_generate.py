"""Generators, arrival processes, length fits and transformations keep what they promise."""

import math
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.workload import arrivals, lengths, transform
from kvarn.workload.chains import Chains
from kvarn.workload.generate import GENERATORS, by_name
from kvarn.workload.reuse import reuse
from kvarn.workload.stats import gap_cv
from kvarn.workload.tokens import block_tokens
from kvarn.workload.trace import Trace, TraceRequest


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_traces_are_in_normal_form_and_repeat_by_seed(name):
    trace = by_name(name, seed=3)
    assert by_name(name, seed=3) == trace != by_name(name, seed=4)
    assert trace.name == name and "seed=3" in trace.chain[0]
    assert len({one.id for one in trace}) == len(trace)
    assert [one.at for one in trace] == sorted(one.at for one in trace)
    before: dict[int, int] = {}  # chained: a block always follows the same block
    for one in trace:
        assert one.n_in >= 1 and one.n_out >= 1
        assert len(one.blocks) in (0, -(-one.n_in // trace.block_size))
        for earlier, block in pairwise((-1, *one.blocks)):
            assert before.setdefault(block, earlier) == earlier
    found = reuse(trace)
    assert found is None if name == "synthetic-poisson" else found.full > 0.05


@pytest.mark.parametrize("name", ["multi-turn", "agents"])
def test_a_turn_says_again_all_that_was_said(name):
    trace = by_name(name, max_len=20_000)
    known = {one.id: one for one in trace}
    assert max(one.turn for one in trace) > 3
    for one in trace:
        assert one.n_in + one.n_out <= 20_000
        if one.parent is None:
            assert (one.turn, one.think) == (0, 0.0)
            continue
        parent = known[one.parent]
        assert (one.session, one.turn) == (parent.session, parent.turn + 1)
        assert one.n_in > parent.n_in + parent.n_out
        assert one.at - parent.at == pytest.approx(one.think + 0.03 * parent.n_out)
        whole = parent.n_in // trace.block_size
        assert one.blocks[:whole] == parent.blocks[:whole]


def test_mean_numbers_of_turns_and_lengths_are_as_asked():
    trace = by_name("multi-turn", sessions=3000, turns=5.0, n_out=40, max_len=10**6, prefix=0)
    assert len(trace) / 3000 == pytest.approx(5, rel=0.06)
    assert sum(one.n_out for one in trace) / len(trace) == pytest.approx(40, rel=0.06)


def test_documents_of_groups_are_shared_whatever_the_order():
    options = {"document": 160, "document_cv": 0, "n_in": 16, "in_cv": 0, "groups": 3}
    for shuffled in (False, True):
        found = reuse(by_name("offline-groups", **options, per_group=4, shuffled=shuffled))
        assert found.full == pytest.approx(9 * 160 / (12 * 176))


def test_chunks_are_shared_only_in_equal_sequences():
    chains = Chains(4)
    ab = chains.blocks([("system", 4), ("a", 6), ("b", 6)])
    ba = chains.blocks([("system", 4), ("b", 6), ("a", 6)])
    ac = chains.blocks([("system", 4), ("a", 6), ("c", 6)])
    assert len(ab) == 4 and set(ab) & set(ba) == {ab[0]} and set(ab) & set(ac) == {*ab[:2]}
    trace = by_name("rag", n=50, chunks=4, k=4, exponent=60.0)
    assert {one.n_in > 256 + 4 * 512 for one in trace} == {True}


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=5),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=5),
    st.integers(1, 5),
)
def test_ids_are_equal_exactly_where_prefixes_are(left, right, size):
    def text(pieces):
        return [(name, j) for name, length in pieces for j in range(length)]

    chains = Chains(size)
    one, two, a, b = chains.blocks(left), chains.blocks(right), text(left), text(right)
    for k, (x, y) in enumerate(zip(one, two), 1):
        same = a[: k * size] == b[: k * size]
        assert same if x == y else True  # equal ids mean equal prefixes
        if [p for p in left if p[1]] == [p for p in right if p[1]]:
            assert x == y


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": -1}, "rate must be above 0"),
        ({"rate": math.nan}, "rate must be above 0"),
        ({"cv": 0}, "cv must be above 0"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 1.5}, "must be of type int"),
        ({"n_in": -4}, "mean must be above 0"),
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"exponent": -1.0}, "exponent of at least 0"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"ratee": 1}, "did you mean 'rate'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        by_name("shared-prefix", **options)


def test_impossible_sessions_and_names_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'synthetic-multi-turn'"):
        by_name("multi-turns")
    with pytest.raises(ConfigError, match="turns must be at least 1"):
        by_name("multi-turn", turns=0.5)
    with pytest.raises(ConfigError, match="no room for a turn"):
        by_name("agents", max_len=4096)
    with pytest.raises(ConfigError, match="k must be at most chunks"):
        by_name("rag", chunks=3, k=4)


@pytest.mark.parametrize(
    ("name", "options", "rate", "cv"),
    [
        ("poisson", {"rate": 4.0}, 4, 1.0),
        ("gamma", {"rate": 4.0, "cv": 3.0}, 4, 3.0),
        ("fixed", {"rate": 4.0}, 4, 0.0),
        ("diurnal", {"rate": 4.0, "swing": 0.8, "period": 50.0}, 4, None),
        ("markov-modulated", {"rates": (0.0, 8.0), "stays": (1.0, 1.0)}, 4, None),
    ],
)
def test_arrivals_have_their_rate_and_spread(name, options, rate, cv):
    times = list(islice(arrivals.by_name(name, Random(2), **options), 20_000))
    assert times == sorted(times) and times[0] >= 0
    assert len(times) / times[-1] == pytest.approx(rate, rel=0.07)
    found = gap_cv(times)
    assert found > 1.1 if cv is None else found == pytest.approx(cv, rel=0.07, abs=1e-9)


def test_diurnal_arrivals_peak_a_quarter_of_the_period_after_the_phase():
    times = islice(arrivals.diurnal(Random(1), 5.0, 1.0, 100.0, 20.0), 20_000)
    by_quarter = [0, 0, 0, 0]
    for time in times:
        by_quarter[int(((time - 20) % 100) // 25)] += 1
    mean_rise = 2 / math.pi  # of a sine over its first half
    assert sum(by_quarter[:2]) / 20_000 == pytest.approx((1 + mean_rise) / 2, rel=0.03)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gamma", {"rate": 1.0, "cv": -1.0}, "cv must be above 0"),
        ("markov-modulated", {"rates": (1.0,), "stays": ()}, "one stay a rate"),
        ("markov-modulated", {"rates": (0.0, 0.0), "stays": (1.0, 1.0)}, "one above 0"),
        ("diurnal", {"rate": 1.0, "swing": 1.5}, r"\[0, 1\]"),
        ("poison", {"rate": 1.0}, "did you mean 'poisson'"),
        ("poisson", {"speed": 1.0}, "unexpected keyword"),
    ],
)
def test_impossible_arrivals_are_refused_at_once(name, options, message):
    with pytest.raises(ConfigError, match=message):
        arrivals.by_name(name, Random(0), **options)


def test_fits_give_back_what_they_were_fitted_to():
    rng = Random(5)
    truth = lengths.lognormal(1000, 0.8)
    seen = sorted(truth.sample(rng) for _ in range(20_000))
    fit = lengths.fit_lognormal(seen)
    assert (fit.mu, fit.sigma) == (pytest.approx(truth.mu, 0.01), pytest.approx(truth.sigma, 0.02))
    empirical = lengths.fit_empirical(seen)
    again = sorted(empirical.sample(rng) for _ in range(20_000))
    for share in (0.1, 0.5, 0.9):
        i = int(share * 20_000)
        assert again[i] == pytest.approx(seen[i], rel=0.05)
    assert seen[0] <= again[0] and again[-1] <= seen[-1]
    with pytest.raises(ConfigError, match="one length or more"):
        lengths.fit_lognormal([])


def test_distinct_ranks_follow_the_law_of_drawing_without_replacement():
    law, rng, first = lengths.Zipf(3, 2.0), Random(0), [0, 0, 0]
    for _ in range(20_000):
        ranks = law.distinct(3, rng)
        assert sorted(ranks) == [0, 1, 2]
        first[ranks[1]] += 1
    weights = [1, 1 / 4, 1 / 9]
    total = sum(weights)
    second = [
        sum(w / total * weights[i] / (total - w) for j, w in enumerate(weights) if j != i)
        for i in range(3)
    ]
    assert [n / 20_000 for n in first] == pytest.approx(second, abs=0.015)


def conversations() -> Trace:
    return by_name("multi-turn", sessions=80, rate=1.0, seed=1)


def test_time_warp_keeps_order_and_thinning_keeps_sessions_whole():
    trace = conversations()
    warped = transform.time_warp(trace, 4)
    assert [one.id for one in warped] == [one.id for one in trace]
    assert warped.span == pytest.approx(trace.span / 4)
    thinned = transform.thin(trace, 0.5, seed=1)
    kept = {one.session for one in thinned}
    assert 20 < len(kept) < 60
    assert [one for one in trace if one.session in kept] == list(thinned)
    assert thinned.chain == (*trace.chain, "thin(0.5, seed=1)")


def test_superposed_sessions_are_whole_and_share_with_their_copy_only():
    trace = conversations()
    dense = transform.superpose(trace, 2.5, seed=2)
    assert len({one.id for one in dense}) == len(dense)
    assert [one.at for one in dense] == sorted(one.at for one in dense)
    by_id = {one.id: one for one in dense}
    copy = [one for one in dense if one.id.endswith("+1")]
    assert len(copy) == len(trace) < len([one for one in dense if "+2" not in one.id])
    assert 20 < len({one.session for one in dense if one.id.endswith("+2")}) < 60
    originals = {one.id: one for one in trace}
    for one in dense:
        origin = originals[one.id.partition("+")[0]]
        assert one.n_in == origin.n_in
        if one.parent:
            gap = origin.at - originals[origin.parent].at
            assert one.at - by_id[one.parent].at == pytest.approx(gap)
    blocks = [
        {b for one in dense if one.id.partition("+")[2] == which for b in one.blocks}
        for which in ("", "1", "2")
    ]
    assert not blocks[0] & blocks[1] and not blocks[1] & blocks[2] and not blocks[0] & blocks[2]


def test_a_window_starts_anew_and_loses_parents_outside():
    trace = conversations()
    part = transform.window(trace, 20, 60)
    assert 0 < len(part) < len(trace) and 0 <= part.requests[0].at <= part.requests[-1].at < 40
    ids = {one.id for one in part}
    assert all(one.parent is None or one.parent in ids for one in part)
    assert len(transform.limit(trace, 7)) == 7


@given(st.integers(2, 3000), st.integers(1, 5000), st.integers(1, 5000))
def test_truncated_lengths_fit(max_len, n_in, n_out):
    blocks = tuple(range(-(-n_in // 512)))
    request = TraceRequest("a", 0, n_in, n_out, blocks)
    (one,) = transform.truncate(Trace("x", (request,)), max_len)
    assert 1 <= one.n_in <= n_in and 1 <= one.n_out <= n_out
    assert one.n_in + one.n_out == min(max_len, n_in + n_out)
    assert one.blocks == blocks[: -(-one.n_in // 512)]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 40)), min_size=2, max_size=5))
def test_split_blocks_share_where_the_large_ones_do(pairs):
    requests = tuple(
        TraceRequest(str(i), 0, n, 1, tuple(range(b * 10, b * 10 + -(-n // 16))))
        for i, (b, n) in enumerate(pairs)
    )
    trace = Trace("x", requests, 16)
    fine = transform.split_blocks(trace, 4)
    assert fine.block_size == 4
    for one, small in zip(trace, fine):
        assert len(small.blocks) == -(-one.n_in // 4)
        for other, less in zip(trace, fine):
            n = min(one.n_in, other.n_in)
            equal = block_tokens(one, 16)[:n] == block_tokens(other, 16)[:n]
            assert (block_tokens(small, 4)[:n] == block_tokens(less, 4)[:n]) == equal
    with pytest.raises(ConfigError, match="divisor of 16"):
        transform.split_blocks(trace, 5)


def test_arrivals_move_sessions_whole():
    trace = transform.with_arrivals(conversations(), "fixed", rate=0.5)
    firsts = [one.at for one in trace if one.parent is None]
    assert firsts == pytest.approx([2.0 * i for i in range(80)])
    assert trace.chain[-1] == "with_arrivals(fixed, rate=0.5, seed=0)"
    by_id = {one.id: one for one in trace}
    for one in trace:
        if one.parent:
            parent = by_id[one.parent]
            assert one.at - parent.at == pytest.approx(one.think + 0.03 * parent.n_out)


def test_prefixes_are_attached_to_a_share_of_requests_without_contents():
    bare = Trace("x", tuple(TraceRequest(str(i), i, 100, 5) for i in range(500)))
    added = transform.attach_prefixes(bare, 0.6, 3, tokens=1024)
    assert {one.n_in for one in added} == {100, 1124}
    assert sum(bool(one.blocks) for one in added) / 500 == pytest.approx(0.6, abs=0.06)
    assert len({one.blocks for one in added}) == 4
    with pytest.raises(ConfigError, match="knows its contents"):
        transform.attach_prefixes(added, 0.5, 2)


def test_sessions_are_found_by_their_prefixes():
    rows = [(1, 2), (9, 8), (1, 2, 3, 4), (9, 8, 7), (1, 2, 3, 4, 5)]
    trace = Trace("x", tuple(TraceRequest(str(i), i, len(b), 1, b) for i, b in enumerate(rows)), 1)
    found = [(one.session, one.turn, one.parent) for one in transform.link_sessions(trace)]
    assert found == [("0", 0, None), ("1", 0, None), ("0", 1, "0"), ("1", 1, "1"), ("0", 2, "2")]


@pytest.mark.parametrize(
    "change",
    [
        lambda trace: transform.time_warp(trace, -1),
        lambda trace: transform.time_warp(trace, math.nan),
        lambda trace: transform.thin(trace, 0),
        lambda trace: transform.superpose(trace, 0.5),
        lambda trace: transform.limit(trace, 0),
        lambda trace: transform.window(trace, 5, 5),
        lambda trace: transform.truncate(trace, 1),
        lambda trace: transform.with_arrivals(trace, "poisson", rate=-3.0),
    ],
)
def test_impossible_transformations_are_refused(change):
    with pytest.raises(ConfigError, match=r"above 0|in \(0, 1\]|at least|start < end"):
        change(conversations())
