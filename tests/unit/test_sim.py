"""The simulator: same decisions however it advances, nothing lost, what queueing theory says."""

from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.cluster.fleet import Fleet
from kvarn.cluster.policy import Finished
from kvarn.cluster.routing import Routing
from kvarn.core.model import GroupSpec
from kvarn.core.part import find
from kvarn.core.request import Request, SamplingParams
from kvarn.cost.shape import Estimate, StepShape
from kvarn.kv.manager import KVManager
from kvarn.schedule.control import Capacity, ControlPlane
from kvarn.sim.heap import NS, EventHeap
from kvarn.sim.instance import Instance
from kvarn.sim.run import Outcome, Tally
from kvarn.sim.simulation import Simulation


@dataclass
class Priced:
    """Prices steps by their rows and positions; counts what it was asked."""

    fixed: float = 0.01
    a_token: float = 1e-4
    a_position: float = 1e-6
    name: str = "toy"

    def step(self, shape: StepShape) -> Estimate:
        seconds = self.fixed + self.a_token * shape.n_tokens + self.a_position * shape.decode_sum
        return Estimate(linear=seconds, joules=100 * seconds)

    def idle_watts(self) -> float:
        return 10.0


def control(pages: int = 200, size: int = 4, budget: int = 64, max_seqs: int = 8) -> ControlPlane:
    prefix: Any = find("prefix", "hash")
    index = prefix(size, [None], find("evict", "lru")())
    scheduler: Any = find("scheduler", "continuous")()
    kv = KVManager([GroupSpec((0,), 1, 8)], [pages], size, index)
    return ControlPlane(scheduler, kv, Capacity(budget, max_seqs, pages * size, 10_000))


def simulate(
    requests: list[Request], n: int = 1, router: str = "round_robin", coasts: bool = True,
    cost: Any = None, overlap: bool = False, **shape: int,
) -> Outcome:  # fmt: skip
    tally = Tally(steps=[])
    cost = cost or Priced()
    instances = [Instance(str(i), control(**shape), cost, tally, coasts, overlap) for i in range(n)]
    part: Any = find("router", router)
    part = part(block=4) if router == "prefix_aware" else part()
    return Simulation(requests, instances, Routing(part, Fleet(n)), tally).run()


def request(i: int, at: float, prompt: list[int], n_out: int, n: int = 1) -> Request:
    params = SamplingParams(max_tokens=n_out, n=n, ignore_eos=True)
    return Request(str(i), prompt, params, arrival=at)


def poisson(n: int, rate: float, seed: int = 0, siblings: int = 1) -> list[Request]:
    rng, at, found = Random(seed), 0.0, []
    for i in range(n):
        at += rng.expovariate(rate)
        prompt = [7] * rng.randrange(9) + [i] * rng.randrange(1, 40)
        found.append(request(i, at, prompt, rng.randrange(1, 60), rng.randint(1, siblings)))
    return found


def facts(outcome: Outcome) -> Any:
    """Everything that is not the number of events: requests, energy, gaps."""
    return (
        outcome.records, outcome.gaps, outcome.end,
        [one.control.stats() for one in outcome.instances],
        [(one.busy, one.joules, one.unmeasured) for one in outcome.instances],
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([2.0, 20.0, 200.0]), st.integers(1, 3),
    st.sampled_from(["round_robin", "least_loaded", "prefix_aware"]), st.integers(30, 200),
    st.booleans(), st.integers(1, 3),
)  # fmt: skip
def test_steps_at_once_change_nothing(seed, rate, n, router, pages, overlap, siblings):
    requests = poisson(40, rate, seed, siblings)
    one_by_one = simulate(requests, n, router, coasts=False, pages=pages, overlap=overlap)
    at_once = simulate(requests, n, router, coasts=True, pages=pages, overlap=overlap)
    assert facts(one_by_one) == facts(at_once)
    for record in at_once.records:
        asked = requests[int(record.id)].sampling
        assert record.end is not None and record.n_out == asked.n * asked.max_tokens
        assert len(record.gaps) == asked.n * (asked.max_tokens - 1)
    for one in at_once.instances:
        assert one.control.check_integrity() == [] and not one.control.seqs


@pytest.mark.parametrize("coasts", [True, False])
def test_a_request_ends_with_the_last_of_its_sequences(coasts):
    """Who routes hears of it once, and so does who waits for it: all its tokens are there."""
    requests, tally, told, ended = poisson(30, 20.0, 3, siblings=3), Tally(), [], []

    class Listening(Routing):
        def handle(self, event, now):
            if isinstance(event, Finished):
                told.append(event.request)
            return super().handle(event, now)

    def after(name, now):
        ended.append(name)
        asked = requests[int(name)].sampling
        assert tally.records[name].n_out == asked.n * asked.max_tokens
        return []

    instances = [Instance("0", control(), Priced(), tally, coasts)]
    policy = Listening(find("router", "round_robin")(), Fleet(1))
    Simulation(requests, instances, policy, tally, after).run()
    assert sorted(told) == sorted(ended) == sorted(one.id for one in requests)


@pytest.mark.parametrize("coasts", [True, False])
def test_siblings_have_gaps_of_their_own(coasts):
    cost = Priced(fixed=1.0, a_token=0.0, a_position=0.0)
    outcome = simulate([request(0, 0.0, [1] * 10, 4, n=2)], cost=cost, coasts=coasts)
    (record,) = outcome.records  # the second sibling is forked one step later
    assert list(record.gaps) == [1.0] * 6 and outcome.gaps == {1_000_000: 6}
    assert (record.first, record.last, record.n_out) == (NS, 5 * NS, 8)


def test_the_overlapped_loop_plans_little_more_than_prompts(monkeypatch):
    """Ends, first tokens and arrivals break runs of decodes, but need no plan of their own."""
    planned, plan = [], ControlPlane.plan
    monkeypatch.setattr(ControlPlane, "plan", lambda *a: planned.append(a) or plan(*a))
    requests = [request(i, i * 0.7, [i] * 10, 200) for i in range(50)]
    outcome = simulate(requests, size=64, overlap=True, max_seqs=64)
    assert 50 <= len(planned) < 75
    assert outcome.instances[0].control.stats().steps > 50 * len(planned)


def test_steps_at_once_are_far_fewer():
    requests = [request(i, 0.0, [i] * 10, 500) for i in range(4)]
    slow = simulate(requests, coasts=False, pages=600)
    fast = simulate(requests, pages=600)
    assert facts(slow) == facts(fast)
    assert len(fast.steps) * 20 < len(slow.steps)


@pytest.mark.parametrize("coasts", [True, False])
def test_overlap_lets_who_comes_wait_for_one_step_more(coasts):
    cost = Priced(fixed=1.0, a_token=0.0, a_position=0.0)
    requests = [request(0, 0.0, [1] * 10, 20), request(1, 2.5, [2] * 10, 3)]
    plain = simulate(requests, cost=cost, coasts=coasts)
    ahead = simulate(requests, cost=cost, coasts=coasts, overlap=True)
    assert [one.first / NS for one in plain.records] == [1.0, 4.0]
    assert [one.first / NS for one in ahead.records] == [1.0, 5.0]
    assert plain.records[0].end == ahead.records[0].end == 20 * NS


def test_energy_adds_up():
    outcome = simulate(poisson(50, 5.0), n=2)
    busy = [one.busy / NS for one in outcome.instances]
    idle = [outcome.seconds - seconds for seconds in busy]
    assert outcome.joules == pytest.approx(sum(100 * b for b in busy) + sum(10 * i for i in idle))


def test_one_server_of_fixed_service_waits_as_pollaczek_and_khinchine_say():
    """M/D/1: one sequence at a time, each one step of 10 ms, at 70 % load."""
    service, load, n = 0.01, 0.7, 60_000
    rng, at, requests = Random(1), 0.0, []
    for i in range(n):
        at += rng.expovariate(load / service)
        requests.append(request(i, at, [i], 1))
    cost = Priced(fixed=service, a_token=0.0, a_position=0.0)
    outcome = simulate(requests, cost=cost, max_seqs=1)
    waits = [(r.end - r.arrival) / NS - service for r in outcome.records]
    expected = load * service / (2 * (1 - load))
    assert sum(waits) / n == pytest.approx(expected, rel=0.03)


def test_what_never_fits_ends_with_an_error_and_harms_nobody():
    requests = [request(0, 0.0, [1] * 500, 4), request(1, 0.1, [2] * 10, 4)]
    outcome = simulate(requests, pages=20, budget=600)
    assert "no room for 500 tokens" in outcome.records[0].error
    assert outcome.records[0].end is None and outcome.records[1].end is not None


def test_prefix_aware_finds_what_round_robin_spreads():
    requests = []
    for i in range(120):
        prompt = [1000 + i % 7] * 40 + [i] * 8
        requests.append(request(i, i * 0.05, prompt, 4))
    hits = {
        router: sum(r.cached for r in simulate(requests, 4, router, pages=60).records)
        for router in ("round_robin", "least_loaded", "prefix_aware")
    }
    assert hits["prefix_aware"] > 1.2 * max(hits["round_robin"], hits["least_loaded"])


def test_every_decision_says_why():
    outcome = simulate(poisson(10, 50.0), 2, "least_loaded")
    assert all(record.why.startswith("fewest open") for record in outcome.records)


def test_the_clock_never_runs_backwards():
    heap = EventHeap()
    heap.push(5, 0, "a")
    assert heap.pop() == "a" and heap.now == 5
    with pytest.raises(ValueError, match="before the clock"):
        heap.push(4, 0, "b")
