"""Hindsight programmes against brute force, and online policies against hindsight."""

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.theory.online import (
    FirstCome,
    GeometricSlices,
    LowerBoundFirst,
    Policy,
    ShortestFirst,
    adversary,
    adversary_best,
    play,
)
from kvarn.theory.schedule import (
    Job,
    best_goodput,
    best_latency,
    latency_bound,
    relaxed_bound,
    safe_horizon,
)
from kvarn.theory.volume import mean_busy_flow, srpt_flow


def held(jobs: Sequence[Job], starts: Sequence[int | None], t: int) -> int:
    """Positions held in round t, straight from the definition."""
    spans = [(j, p) for j, p in zip(jobs, starts) if p is not None]
    return sum(j.prompt + t - p for j, p in spans if p < t <= p + j.output)


def feasible(jobs: Sequence[Job], starts: Sequence[int | None], memory: int) -> bool:
    last = max((p + job.output for job, p in zip(jobs, starts) if p is not None), default=0)
    return all(held(jobs, starts, t) <= memory for t in range(1, last + 1))


def brute_latency(jobs: Sequence[Job], memory: int) -> int:
    """Least total latency over all vectors of starts, depth first with pruning."""
    end = safe_horizon(jobs)
    best = sum(end for _ in jobs) + 1

    def descend(starts: list[int], cost: int) -> None:
        nonlocal best
        if cost >= best or not feasible(jobs[: len(starts)], starts, memory):
            return
        if len(starts) == len(jobs):
            best = cost
            return
        job = jobs[len(starts)]
        for p in range(job.arrival, end - job.output + 1):
            descend([*starts, p], cost + p + job.output - job.arrival)

    descend([], 0)
    return best


def brute_goodput(jobs: Sequence[Job], deadlines: Sequence[int], memory: int) -> int:
    choices = [
        [None, *range(job.arrival, deadline - job.output + 1)]
        for job, deadline in zip(jobs, deadlines)
    ]
    return max(
        sum(p is not None for p in starts)
        for starts in itertools.product(*choices)
        if feasible(jobs, starts, memory)
    )


def draw(rng: random.Random, n: int, memory: int, last: int) -> list[Job]:
    jobs = []
    for _ in range(n):
        output = rng.randint(1, min(5, memory))
        jobs.append(Job(rng.randint(0, last), rng.randint(0, memory - output), output))
    return jobs


def test_programme_equals_brute_force() -> None:
    rng = random.Random(1)
    for k in range(40):
        memory = rng.randint(3, 10)
        jobs = draw(rng, rng.randint(1, 4 + k % 2), memory, 3)
        found = best_latency(jobs, memory)
        assert found.value == pytest.approx(brute_latency(jobs, memory))
        assert found.bound == pytest.approx(found.value)
        assert feasible(jobs, found.starts, memory)


def test_goodput_equals_brute_force() -> None:
    rng = random.Random(2)
    for _ in range(30):
        memory = rng.randint(3, 9)
        jobs = draw(rng, rng.randint(1, 5), memory, 2)
        deadlines = [job.arrival + job.output + rng.randint(-1, 2) for job in jobs]
        found = best_goodput(jobs, deadlines, memory)
        assert found.value == brute_goodput(jobs, deadlines, memory)
        assert found.bound == pytest.approx(found.value)
        assert feasible(jobs, found.starts, memory)


def test_bounds_are_ordered_on_200_instances() -> None:
    rng = random.Random(3)
    for k in range(200):
        memory = rng.randint(4, 14)
        jobs = draw(rng, rng.randint(1, 6), memory, 6 * (k % 2))
        cheap = latency_bound(jobs, memory)
        relaxed = best_latency(jobs, memory, integral=False).bound
        exact = best_latency(jobs, memory).value
        assert exact is not None
        assert relaxed_bound(jobs, memory) <= cheap + 1e-9
        assert relaxed_bound(jobs, memory) <= relaxed + 1e-6  # proven
        assert cheap <= relaxed + 1e-6  # proven for equal arrivals, seen on these
        assert relaxed <= exact + 1e-6


def test_short_horizon_still_bounds() -> None:
    jobs = [Job(0, 3, 4), Job(0, 3, 4), Job(0, 2, 5)]
    exact = best_latency(jobs, 8)
    assert exact.value == 4 + 8 + 13  # no two fit together
    short = best_latency(jobs, 8, horizon=2)
    assert short.value is None and short.bound <= exact.value


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=8),
    st.integers(1, 5),
)
def test_fluid_machine(work: list[tuple[int, int]], speed: int) -> None:
    flow = srpt_flow(work, speed)
    assert mean_busy_flow(work, speed) <= flow + 1e-9
    assert flow >= sum(volume for _, volume in work) / speed - 1e-9
    now, in_order = 0.0, 0.0
    for release, volume in sorted(work):  # first come first served is one schedule
        now = max(now, release) + volume / speed
        in_order += now - release
    assert flow <= in_order + 1e-9
    if len({release for release, _ in work}) == 1:
        assert mean_busy_flow(work, speed) == pytest.approx(flow)


def policies(jobs: Sequence[Job], memory: int) -> list[Policy]:
    outputs = [job.output for job in jobs]
    caps = [memory - job.prompt for job in jobs]
    return [
        FirstCome(outputs),
        ShortestFirst(outputs),
        ShortestFirst(caps),
        LowerBoundFirst([1] * len(jobs)),
        GeometricSlices(),
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 12), st.integers(6, 40))
def test_policies_keep_memory_and_bounds(seed: int, n: int, last: int, memory: int) -> None:
    jobs = draw(random.Random(seed), n, memory, last)
    for policy in policies(jobs, memory):
        done = play(jobs, memory, policy)
        assert done.peak <= memory
        assert done.total_latency >= latency_bound(jobs, memory) - 1e-9
        assert all(end >= job.arrival + job.output for end, job in zip(done.ends, jobs))


@pytest.mark.parametrize("last", [0, 30])
def test_shortest_first_is_near_hindsight(last: int) -> None:
    """n = 50, uniform outputs; the ratio to the relaxation is at least that to the optimum."""
    ratios = []
    for seed in range(4):
        rng = random.Random(seed)
        jobs = [Job(rng.randint(0, last), rng.randint(1, 5), rng.randint(1, 20)) for _ in range(50)]
        done = play(jobs, 200, ShortestFirst([job.output for job in jobs]))
        horizon = max(done.ends) + 5
        bound = best_latency(jobs, 200, integral=False, horizon=horizon, seconds=20).bound
        ratios.append(done.total_latency / bound)
    assert min(ratios) >= 1
    assert sum(ratios) / len(ratios) <= 1.1


def test_adversary_needs_kill_and_restart() -> None:
    for memory in (64, 256, 1024):
        jobs, best = adversary(memory), adversary_best(memory)
        outputs = [job.output for job in jobs]
        for policy in (FirstCome(outputs), ShortestFirst(outputs)):
            assert play(jobs, memory, policy).total_latency / best >= memory**0.5 / 4
        restarted = play(jobs, memory, GeometricSlices())
        assert restarted.kills > 0
        assert restarted.total_latency / best <= 2
    assert best_latency(adversary(64), 64).value == adversary_best(64)


def test_known_outputs_beat_blind_policies_on_a_batch() -> None:
    rng = random.Random(5)
    jobs = [Job(0, 4, rng.randint(1, 60)) for _ in range(40)]
    known = play(jobs, 128, ShortestFirst([job.output for job in jobs])).total_latency
    least = play(jobs, 128, LowerBoundFirst([1] * 40)).total_latency
    most = play(jobs, 128, ShortestFirst([124] * 40)).total_latency
    assert known < least < most  # A_min beats A_max when intervals are wide


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="grows to 12 positions"):
        latency_bound([Job(0, 8, 4)], 11)
    with pytest.raises(ConfigError, match="output >= 1"):
        best_latency([Job(0, 1, 0)], 11)
    with pytest.raises(ConfigError, match="as many deadlines"):
        best_goodput([Job(0, 1, 1)], [], 4)
    with pytest.raises(ConfigError, match="square"):
        adversary(63)
    with pytest.raises(ConfigError, match="last arrival"):
        best_latency([Job(9, 1, 1)], 4, horizon=3)


def test_play_refuses_bad_policies() -> None:
    class Idle(FirstCome):
        def start(self, view: object) -> list[int]:
            return []

    class Greedy(FirstCome):
        def start(self, view: object) -> list[int]:
            return list(view.waiting)

    jobs = [Job(0, 3, 2), Job(0, 3, 2)]
    with pytest.raises(ConfigError, match="starts nothing"):
        play(jobs, 6, Idle([2, 2]))
    with pytest.raises(ConfigError, match="holds 8 of 6"):
        play(jobs, 6, Greedy([2, 2]))
