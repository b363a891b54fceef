"""Drafts in simulation: plain decoding where none stand, theory's tokens where some do."""

from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from kvarn.bench.options import Fleet as Options
from kvarn.bench.options import Traffic, Workload
from kvarn.bench.sim import simulate
from kvarn.bench.sim_fleet import find_spec, price_list
from kvarn.bench.sim_load import find_trace
from kvarn.cluster.fleet import Fleet
from kvarn.cluster.routing import Routing
from kvarn.core.model import GroupSpec
from kvarn.core.part import find
from kvarn.core.request import Request, SamplingParams
from kvarn.cost.perturb import TERMS, Perturbed
from kvarn.cost.shape import CostModel, Estimate, StepShape
from kvarn.kv.manager import KVManager
from kvarn.schedule.control import Capacity, ControlPlane
from kvarn.sim.acceptance import Luck, Stated
from kvarn.sim.drafter import Clock, Drafter
from kvarn.sim.heap import COMPLETION, NS, Alarm
from kvarn.sim.instance import Instance
from kvarn.sim.run import Outcome, Tally
from kvarn.sim.simulation import Simulation
from kvarn.sim.speculating import Speculating
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.survival import Survival
from kvarn.speculate.speculation import Speculation
from kvarn.theory.speculation import expected_tokens, tokens_of_survival


class Second:
    """A step takes a second, and what it says for each row of the head."""

    name = "one second"

    def __init__(self, seconds: float = 1.0, logit: float = 0.0) -> None:
        self.seconds, self.logit = seconds, logit
        self.asked = list[StepShape]()

    def step(self, shape: StepShape) -> Estimate:
        self.asked.append(shape)
        return Estimate(linear=self.seconds + self.logit * shape.n_logits, joules=1.0)

    def idle_watts(self) -> float:
        return 0.0


class Rests(Fixed):
    """Wants no drafts."""

    def rests(self) -> bool:
        return True


def control(pages: int = 400, budget: int = 64, max_seqs: int = 8) -> ControlPlane:
    prefix: Any = find("prefix", "hash")
    index = prefix(4, [None], find("evict", "lru")())
    scheduler: Any = find("scheduler", "continuous")()
    kv = KVManager([GroupSpec((0,), 1, 8)], [pages], 4, index)
    return ControlPlane(scheduler, kv, Capacity(budget, max_seqs, pages * 4, 10_000))


def drafting(
    shares: tuple[float, ...], most: int, cost: CostModel | None = None, drafter: Any = None,
    length: Any = None, overlap: bool = False, late: CostModel | None = None, **shape: int,
) -> Speculating:  # fmt: skip
    clock, cost = Clock(), cost or Second()
    proposer = Drafter(Stated(shares), drafter, clock, Luck(1))
    speculation = Speculation(proposer, length or Fixed(), most, clock)
    return Speculating(
        "0", control(**shape), cost, Tally(steps=[]), overlap=overlap, speculation=speculation,
        drafter=proposer, late=late or cost,
    )  # fmt: skip


def run(instance: Instance, requests: list[Request]) -> Outcome:
    policy = Routing(find("router", "round_robin")(), Fleet(1))  # type: ignore[arg-type]
    tally = instance.watcher
    assert isinstance(tally, Tally)
    outcome = Simulation(requests, [instance], policy, tally).run()
    assert instance.control.check_integrity() == [] and not instance.control.seqs
    assert instance.control.kv.held(0) == 0
    return outcome


def request(i: int, at: float, n_in: int, n_out: int, n: int = 1) -> Request:
    params = SamplingParams(max_tokens=n_out, n=n, ignore_eos=True)
    return Request(str(i), [i] * n_in, params, arrival=at)


def mixed(count: int, rate: float, siblings: int = 1) -> list[Request]:
    chance, at, found = Random(3), 0.0, []
    for i in range(count):
        at += chance.expovariate(rate)
        n = chance.randint(1, siblings)
        found.append(request(i, at, chance.randrange(1, 40), chance.randrange(1, 60), n))
    return found


def facts(outcome: Outcome) -> Any:
    return outcome.records, outcome.gaps, outcome.end, outcome.instances[0].joules


@pytest.mark.parametrize("overlap", [False, True])
def test_a_control_that_rests_changes_nothing(overlap: bool) -> None:
    requests = mixed(40, 0.3, siblings=3)
    plain = Instance("0", control(pages=120), Second(), Tally(steps=[]), False, overlap)
    ours = drafting((0.7,), 3, length=Rests(), overlap=overlap, pages=120)
    assert facts(run(ours, requests)) == facts(run(plain, requests))


def test_drafts_that_never_stand_give_the_steps_of_plain_decoding() -> None:
    """Where the budget of a step has room for drafts beside all prompts."""
    requests = mixed(40, 0.3)
    plain = Instance("0", control(budget=512), Second(), Tally(steps=[]), False)
    ours = run(drafting((0.0,), 3, budget=512), requests)
    assert facts(ours) == facts(run(plain, requests))
    counts = ours.instances[0].control.counters
    assert counts.drafted_tokens > 0 and counts.accepted_tokens == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shares", [(0.7,), (0.5, 0.9, 0.2), (1.0,)])
def test_tokens_of_a_round_are_those_of_theory(shares: tuple[float, ...], overlap: bool) -> None:
    most, tokens = 3, 10_000
    instance = drafting(shares, most, overlap=overlap, pages=3_000)
    outcome = run(instance, [request(0, 0.0, 4, tokens)])
    reach, survival = 1.0, list[float]()
    for place in range(most):
        reach *= shares[min(place, len(shares) - 1)]
        survival.append(reach)
    expected = tokens_of_survival(survival)
    if len(shares) == 1:
        assert expected == pytest.approx(expected_tokens(shares[0], most))
    counts = instance.control.counters
    assert 1 + counts.accepted_tokens / counts.verify_steps == pytest.approx(expected, rel=0.02)
    assert outcome.records[0].n_out == tokens
    assert instance.control.steps < tokens / expected * 1.02 + 5


def test_an_answer_ends_where_it_must() -> None:
    """Nothing is drafted behind the last token that is wanted, nor counted."""
    for n_out in range(1, 9):
        (record,) = run(drafting((1.0,), 4), [request(0, 0.0, 4, n_out)]).records
        assert record.n_out == n_out
        assert len(record.gaps) == -(-(n_out - 1) // 5)  # the prompt's step, then fives


def test_preemption_and_scarce_pages_leak_nothing() -> None:
    requests = mixed(60, 5.0, siblings=2)
    for share in (0.3, 0.9):
        instance = drafting((share,), 4, pages=40, drafter=Second(0.1), length=Survival())
        outcome = run(instance, requests)
        assert instance.control.counters.preemptions > 0
        assert all(
            one.n_out == asked.sampling.n * (asked.sampling.max_tokens or 0)
            for one, asked in zip(outcome.records, requests, strict=True)
        )
        assert not instance.speculation._drafts and not instance.drafter._read


def test_one_seed_gives_one_result_and_another_another() -> None:
    requests = mixed(20, 0.5)
    one, two = (facts(run(drafting((0.6,), 3), requests)) for _ in range(2))
    assert one == two
    other = drafting((0.6,), 3)
    other.drafter.luck = Luck(2)
    assert facts(run(other, requests)) != one


def test_what_drafting_and_judging_take_is_paid() -> None:
    """Passes: the first reads the prompt, each has a row a sequence; the head judges each draft."""
    small, cost = Second(0.125), Second(1.0, logit=0.25)
    instance = drafting((1.0,), 3, cost, small)
    outcome = run(instance, [request(0, 0.0, 10, 9)])
    # the prompt, then four tokens each: 3 passes, and 4 rows of the head
    assert outcome.end == round((1.25 + 2 * (3 * 0.125 + 1.0 + 4 * 0.25)) * NS)
    assert [(s.chunks, s.decode_sum) for s in small.asked] == [
        (((11, 11),), 0), ((), 12), ((), 13),  # the prompt and the first token, then rows
        (((2, 15),), 0), ((), 16), ((), 17),  # of a whole success the last token is read late
    ]  # fmt: skip
    assert instance.joules == 3 + 6
    free = run(drafting((1.0,), 3, Second(1.0, logit=0.25)), [request(0, 0.0, 10, 9)])
    assert free.end == round((1.25 + 2 * 2.0) * NS)


def test_what_follows_drafts_is_not_planned_ahead() -> None:
    ours = drafting((1.0,), 3, overlap=True, late=Second(1.5))
    assert run(ours, [request(0, 0.0, 10, 9)]).end == round((1.0 + 2 * 1.5) * NS)
    rests = drafting((1.0,), 3, overlap=True, late=Second(1.5), length=Rests())
    assert run(rests, [request(0, 0.0, 10, 9)]).end == 9 * NS


def test_survival_gives_drafts_up_that_do_not_pay() -> None:
    requests = [request(i, 0.0, 4, 600) for i in range(4)]
    plain = run(Instance("0", control(), Second(), Tally(), True), requests).end
    poor = run(drafting((0.1,), 4, drafter=Second(0.3), length=Survival()), requests)
    good = run(drafting((0.9,), 4, drafter=Second(0.1), length=Survival()), requests)
    assert poor.end < 1.04 * plain
    assert good.end < 0.6 * plain


def test_an_aborted_request_is_forgotten() -> None:
    instance = drafting((0.5,), 3)
    tally = instance.watcher
    assert isinstance(tally, Tally)
    policy = Routing(find("router", "round_robin")(), Fleet(1))  # type: ignore[arg-type]
    requests = [request(0, 0.0, 4, 500), request(1, 0.0, 4, 20)]
    simulation = Simulation(requests, [instance], policy, tally)
    simulation.heap.push(5 * NS, COMPLETION, Alarm(lambda: simulation.abort("0")))
    outcome = simulation.run()
    assert [one.error for one in outcome.records] == ["aborted", ""]
    assert not instance.drafter._read and not instance.drafter.luck._keys


def test_luck_is_even_and_of_the_position_alone() -> None:
    asked = request(0, 0.0, 4, 10)
    seq = control().add(asked)[0]
    luck = Luck(5)
    drawn = [luck.at(seq, i) for i in range(4000)]
    assert sum(drawn) / 4000 == pytest.approx(0.5, abs=0.02)
    assert sum(a < 0.5 and b < 0.5 for a, b in pairwise(drawn)) / 4000 == (
        pytest.approx(0.25, abs=0.03)
    )
    again = control().add(replace(asked, arrival=3.0))[0]
    assert Luck(5).at(again, 17) == drawn[17] != Luck(6).at(again, 17)


def test_prices_that_are_wrong_on_purpose_are_so_for_drafts_too() -> None:
    """Every term twice as long: the same decisions, in twice the time."""
    fleet = Options(
        speculate="draft", draft_model="llama-3.2-1b", acceptance="0.7", draft_length="fixed"
    )
    spec = find_spec(fleet.model)
    trace = find_trace(Workload(num_prompts=4, input_len=30, output_len=20), Traffic())
    cost = price_list(fleet, spec)
    right, wrong = (
        simulate(fleet, spec, trace, cost=one)
        for one in (cost, Perturbed(cost, dict.fromkeys(TERMS, 2.0)))
    )
    assert wrong.seconds == pytest.approx(2 * right.seconds, rel=1e-6)
