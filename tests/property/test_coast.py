"""Decode steps taken at once leave the same books as steps planned and applied one by one."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.model import GroupSpec
from kvarn.core.part import find
from kvarn.core.plan import StepPlan, StepResult
from kvarn.core.request import Request, SamplingParams
from kvarn.kv.manager import KVManager
from kvarn.schedule.coast import can_coast, coast, settle
from kvarn.schedule.control import Capacity, ControlPlane

SCHEDULERS = ["continuous", "orca", "prefill-first", "static"]


def make(scheduler: str, prefix: str, pages: int, size: int, budget: int) -> ControlPlane:
    group = GroupSpec((0,), 1, 8)
    index: Any = None
    if prefix != "none":
        index = find("prefix", prefix)(size, [None], find("evict", "lru")())  # type: ignore
    kv = KVManager([group], [pages], size, index)
    part: Any = find("scheduler", scheduler)()
    return ControlPlane(part, kv, Capacity(budget, 8, pages * size, 1000))


def token_of(seq: Any) -> int:
    return -1 - seq.id


def one_step(control: ControlPlane, now: float) -> StepPlan:
    plan = control.plan(now)
    tokens = [[token_of(control.seqs[s.seq])] if s.wants_logits else [] for s in plan.spans]
    control.apply(plan, StepResult(plan.step, tokens), now + 0.5)
    return plan


def books(control: ControlPlane) -> dict[str, Any]:
    """Everything that later decisions can depend on."""
    kv = control.kv
    return {
        "stats": control.stats(),
        "free": kv.free,
        "refs": kv.refs,
        "indexed": kv.indexed,
        "idle": [list(idle) for idle in kv._idle],
        "nodes": sorted(
            (repr(node.tokens), node.pages, node.users, node.hits, node.last_used)
            for node in (kv.index.nodes() if kv.index else [])
        ),
        "seqs": [
            (s.id, s.tokens, s.computed, s.pending, s.capacity, s.tables, s.published, s.status,
             s.planned_step, s.planned_from, s.preemptions)
            for s in control.seqs.values()
        ],
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCHEDULERS),
    st.sampled_from(["hash", "radix", "none"]),
    st.integers(1, 5),
    st.integers(20, 60),
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(0, 40), st.integers(1, 3)),
        max_size=12,
    ),
    st.integers(1, 9),
    st.integers(5, 60),
)
def test_coasting_leaves_the_same_books(scheduler, prefix, size, positions, asked, most, abort):
    pages = -(-positions // size) + 1
    slow, fast = (make(scheduler, prefix, pages, size, 16) for _ in range(2))
    coasted, at, waiting = 0, 0, sorted(enumerate(asked), key=lambda one: one[1][2])
    while waiting or slow.seqs:
        while waiting and waiting[0][1][2] <= at:
            i, (n_in, n_out, _, n_seqs) = waiting.pop(0)
            prompt = [7 if j < 6 else i for j in range(min(n_in, pages * size - 1))]
            n = min(n_out, pages * size - len(prompt))
            params = SamplingParams(max_tokens=n, n=n_seqs, ignore_eos=True)
            for control in (slow, fast):
                control.add(Request(str(i), prompt, params))
        if at >= abort and slow.seqs:  # the first of them leaves early, once
            gone, abort = next(iter(slow.seqs.values())).request.id, 1000
            for control in (slow, fast):
                control.abort(gone, float(at))
        steps = min(can_coast(fast), most)
        if waiting:
            steps = min(steps, waiting[0][1][2] - at)
        times = [float(at + i) for i in range(max(1, steps))]
        for now in times:
            plan = one_step(slow, now)
        if steps >= 1:
            seqs = coast(fast, steps, times.__getitem__, token_of)
            settle(fast, seqs, times[-1] + 0.5)
            coasted += steps
        else:
            one_step(fast, times[0])
        assert books(slow) == books(fast)
        at += len(times)
        if not plan.spans and slow.queues.waiting and not slow.queues.running:
            break  # the first in the queue will never fit
    assert slow.check_integrity() == fast.check_integrity() == []


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_long_decodes_are_taken_at_once(scheduler):
    control = make(scheduler, "hash", 100, 4, 64)
    for i in range(3):
        control.add(Request(str(i), [i] * 10, SamplingParams(max_tokens=50, ignore_eos=True)))
    one_step(control, 0.0)
    assert can_coast(control, 20) == 20
    assert can_coast(control) == 49
    seqs = coast(control, 49, float, token_of)
    assert [one.seq.n_output for one in settle(control, seqs, 49.0)] == [50] * 3
    assert not control.seqs


def test_what_may_not_coast():
    control = make("continuous", "hash", 6, 4, 64)
    assert can_coast(control) == 0  # nobody is there
    control.add(Request("0", [0] * 10, SamplingParams(max_tokens=50, ignore_eos=True)))
    assert can_coast(control) == 0  # a prompt
    one_step(control, 0.0)
    assert can_coast(control) == 13  # 14 tokens fit and one of them is there
    control.add(Request("1", [1] * 10, SamplingParams(max_tokens=5, ignore_eos=True)))
    assert can_coast(control) == 0  # somebody waits
