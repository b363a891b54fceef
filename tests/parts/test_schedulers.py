"""What every scheduler must keep: the budget, the order of arrival, every request's end."""

import random

import pytest

from kvarn.core.model import GroupSpec
from kvarn.core.part import find, known
from kvarn.core.plan import StepPlan, StepResult
from kvarn.core.request import Request, SamplingParams
from kvarn.kv.evict.lru import LRU
from kvarn.kv.manager import KVManager
from kvarn.kv.prefix.hashed import HashChain
from kvarn.schedule.control import Capacity, ControlPlane

SCHEDULERS = sorted(name for kind, name in known() if kind == "scheduler")
BUDGET = 24


def make(scheduler: str, pages: int = 60) -> ControlPlane:
    kv = KVManager([GroupSpec((0,), 1, 8)], [pages], 4, HashChain(4, (None,), LRU()))
    return ControlPlane(find("scheduler", scheduler)(), kv, Capacity(BUDGET, 8, 160, 1000))  # type: ignore[arg-type]


def answer(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, [[7] if span.wants_logits else [] for span in plan.spans])


def request(i: int, prompt: int, outputs: int, priority: int = 0) -> Request:
    tokens = [(i * 31 + k) % 50 for k in range(prompt)]
    return Request(f"r{i}", tokens, SamplingParams(max_tokens=outputs), priority)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_request_ends_with_all_its_tokens(scheduler: str) -> None:
    chance = random.Random(3)
    control = make(scheduler)
    wanted = {}
    got: dict[str, int] = {}
    for i in range(60):
        outputs = chance.randint(1, 40)
        control.add(request(i, chance.randint(1, 60), outputs))
        wanted[f"r{i}"] = outputs
    for step in range(5000):
        plan = control.plan(float(step))
        assert plan.n_tokens <= BUDGET
        for progress in control.apply(plan, answer(plan), float(step)):
            name = progress.seq.request.id
            got[name] = got.get(name, 0) + len(progress.tokens)
        if not control.has_work:
            break
    assert got == wanted
    assert control.check_integrity() == []


@pytest.mark.parametrize("scheduler", ["continuous", "orca"])
def test_no_running_decode_is_left_out(scheduler: str) -> None:
    """Stall-free: a long prompt never costs a decode its place in a step."""
    control = make(scheduler, pages=200)
    for i in range(4):
        control.add(request(i, 4, 50))
    decoding: set[int] = set()
    for step in range(40):
        if step == 5:
            control.add(request(9, 150, 4))
        plan = control.plan(float(step))
        planned = {span.seq for span in plan.spans}
        assert decoding <= planned
        control.apply(plan, answer(plan), float(step))
        decoding = {s.id for s in control.queues.running if s.n_output > 0}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_first_come_first_served(scheduler: str) -> None:
    control = make(scheduler)
    for i in range(20):
        control.add(request(i, 20, 10))
    first: list[int] = []
    for step in range(2000):
        plan = control.plan(float(step))
        first += [start.seq for start in plan.starts if start.seq not in first]
        control.apply(plan, answer(plan), float(step))
        if not control.has_work:
            break
    assert first == sorted(first)


def test_orca_never_preempts() -> None:
    control = make("orca", pages=50)
    for i in range(30):
        control.add(request(i, 20, 60))
    for step in range(5000):
        plan = control.plan(float(step))
        control.apply(plan, answer(plan), float(step))
        if not control.has_work:
            break
    assert control.stats().preemptions == 0
    assert control.stats().finished == {"length": 30}


def test_preemption_takes_the_last_come() -> None:
    """Under pressure, later and less urgent sequences make room, and come back to finish."""
    control = make("continuous", pages=24)
    control.add(request(0, 8, 60, priority=1))
    control.add(request(1, 8, 60, priority=0))
    control.add(request(2, 8, 60, priority=0))
    preempted: set[int] = set()
    finished: list[str] = []
    for step in range(1000):
        plan = control.plan(float(step))
        preempted |= {seq.id for seq in control.queues.waiting if seq.preemptions}
        for progress in control.apply(plan, answer(plan), float(step)):
            if progress.finish:
                finished.append(progress.seq.request.id)
        if not control.has_work:
            break
    assert preempted and 1 not in preempted
    assert finished[0] == "r1"
    assert set(finished) == {"r0", "r1", "r2"}


def test_priorities_go_first() -> None:
    control = make("continuous")
    for i in range(12):
        control.add(request(i, 20, 5, priority=1))
    control.plan(0.0)
    control.add(request(99, 20, 5, priority=0))
    assert control.queues.waiting[0].request.id == "r99"


@pytest.mark.parametrize("n", [2, 8])
def test_forks_share_the_prompt(n: int) -> None:
    """n samples hold the prompt's pages once, plus a tail each; a fork computes one position."""
    control = make("continuous", pages=100)
    prompt = [(k * 7) % 50 for k in range(22)]  # five whole pages and a half
    control.add(Request("r", prompt, SamplingParams(max_tokens=2, n=n)))
    first = control.plan(0.0)
    assert [span.length for span in first.spans] == [22]
    control.apply(first, answer(first), 0.0)
    second = control.plan(1.0)
    forks = [span for span in second.spans if span.start == 21]
    assert len(forks) == n - 1 and all(span.length == 1 for span in forks)
    assert len(second.copies) == n - 1
    assert control.kv.held(0) <= 5 + n
