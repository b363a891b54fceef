"""A simulated drafter that learns: the curve out of measured quarters, when updates are made."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvarn.bench import online_sim, sim
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.bench.sim_drafts import measured_curve
from kvarn.core.errors import ModelError
from kvarn.core.plan import Draft
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.sim.drafter import Clock
from kvarn.sim.learner import MOST, SHARE, Learner
from kvarn.sim.learnt import FROZEN, LEARNS, LONGER, Curve, Learnt, Subject, Turns, fitted
from kvarn.speculate.records import Record
from kvarn.speculate.train.versions import Versions

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
AB = Curve({"a": Subject((0.5,), (-0.1,), (0.3,)), "b": Subject((0.2,), (-0.1,), (0.2,))}, 4.0, 8.0,
           1.0, 0.0)  # fmt: skip


def seq(i: int, at: float = 0.0) -> Seq:
    return Seq(i, Request(str(i), [0], arrival=at), 0, [0], 0, (0, i))


def learner(mode: Any, interval: int = 4, seconds: float = 1.0, slows: float = 1.5) -> Learner:
    drafts = Learnt(AB, Turns(("a", "b"), 100.0))
    return Learner(drafts, Clock(), mode, interval, seconds, slows, Versions(window=8))


def judge(one: Learner, i: int, accepted: int, at: float = 0.0) -> None:
    """A sequence whose draft of eight tokens was judged, and that has ended."""
    one.hear([Record(i, 0, 1, Draft([0] * 8), [0] * (accepted + 1))])
    one.forget(seq(i, at))


def look(one: Learner, now: float, waits: bool = False, runs: bool = True) -> None:
    one.clock.now = now
    one.between_steps(waits, runs, now)


def test_a_curve_is_found_again() -> None:
    """Quarters made of a curve give its parameters; the end is the last quarter's mean."""
    tau, step, quarters = 5.0, 4.0, 4

    def mean(quarter: int, start: float, end: float) -> float:
        x = tau / step * (math.exp(-quarter * step / tau) - math.exp(-(quarter + 1) * step / tau))
        return end + (start - end) * x

    truth = {"first": (0.0, 0.1), "second": (-0.1, 0.2)}
    rows = [
        {
            "setting": setting, "phase": phase, "quarter": q + 1, "judged": [500, 0, 0],
            "acceptance": [0.4 + (mean(q, *truth[phase]) if setting == LEARNS else 0), None, None],
        }
        for phase in truth
        for q in range(quarters)
        for setting in (FROZEN, LEARNS)
    ]  # fmt: skip
    rows += [{**row, "setting": LONGER, "judged": [400, 200, 0], "acceptance": [0.4, 0.3, None]}
             for row in rows if row["setting"] == FROZEN]  # fmt: skip
    curve = fitted({
        "workload": {"phases": list(truth), "requests": 128}, "results": rows,
        "training": {LEARNS: {"published": 32, "seconds": 64.0}},
    })  # fmt: skip
    assert (curve.lessons, curve.seconds) == (8.0, 2.0)
    found = curve.subjects["second"]
    assert found.base == (0.4, 0.3)
    assert found.end == (pytest.approx(mean(3, -0.1, 0.2)),)
    assert found.start[0] == pytest.approx(-0.1, abs=0.02)
    assert curve.tau == pytest.approx(tau, rel=0.2) and curve.error < 0.01
    assert curve.subjects["first"].start == (0.0,)


def test_the_packaged_curve_is_that_of_the_result() -> None:
    measured = json.loads((RESULTS / "reproduce_online_spec.json").read_text())
    curve = measured_curve()
    assert curve == fitted(measured)
    last = {
        row["setting"]: row["acceptance"][0]
        for row in measured["results"]
        if (row["phase"], row["quarter"]) == ("spanish", 4)
    }
    spanish = curve.subjects["spanish"]
    assert spanish.end[0] == last[LEARNS] - last[FROZEN] > 0.2
    assert curve.error < 0.04


def test_knowledge_moves_to_what_is_learnt_and_away_from_the_rest() -> None:
    drafts = Learnt(AB, Turns(("a", "b"), 100.0))
    one, other = seq(0), seq(1, at=150.0)
    assert (drafts.share(one, 0), drafts.share(other, 3)) == (0.5, 0.2)
    for _ in range(30):
        drafts.knows = AB.moved(drafts.knows, ["a"] * 8)
    assert drafts.share(one, 0) == pytest.approx(0.8, abs=1e-3)
    assert drafts.share(other, 0) == pytest.approx(0.1, abs=1e-3)
    drafts.knows = AB.moved(drafts.knows, ["b"] * 8)
    assert drafts.share(one, 0) == pytest.approx(0.8 - 0.4 * (1 - math.exp(-1 / 4)), abs=1e-3)
    half = AB.moved(AB.moved({}, ["b"] * 4), ["b"] * 4)
    assert half["b"] == pytest.approx(AB.moved({}, ["b"] * 8)["b"])


def test_between_steps_all_wait() -> None:
    one = learner("inline")
    for i in range(3):
        judge(one, i, 4)
    look(one, 10.0)
    assert one.clock.now == 10.0 and one.stats().lessons == 3
    judge(one, 3, 4)
    look(one, 11.0, waits=True)
    assert one.clock.now == 11.0, "nothing is learnt while requests queue"
    look(one, 12.0)
    assert one.clock.now == 13.0 and one.slowdown == 1.0
    look(one, 13.0)
    assert one.versions.published == 1 and one.drafts.knows["a"] > 0


def test_in_a_thread_steps_are_slower_for_as_long_as_it_takes() -> None:
    one = learner("on")
    for i in range(4):
        judge(one, i, 4)
    look(one, 10.0)
    assert one.clock.now == 10.0 and one.slowdown == 1.5
    look(one, 10.6, waits=True)
    assert one.slowdown == 1.0, "it yields"
    look(one, 20.0)
    assert one.slowdown == 1.5 and one.versions.published == 0
    look(one, 20.5)
    assert one.slowdown == 1.0 and one.versions.published == 1 and one.worked == 1.0
    for i in range(4, 8):
        judge(one, i, 4)
    look(one, 20.5 + 1 / SHARE - 1.1)
    assert one.slowdown == 1.0, "it rests"
    look(one, 20.5 + 1 / SHARE - 0.9)
    assert one.slowdown == 1.5


def test_idle_learning_goes_on_while_no_request_runs() -> None:
    one = learner("idle")
    for i in range(4):
        judge(one, i, 4)
    look(one, 10.0)
    look(one, 15.0)
    assert one.worked == 0.0
    look(one, 16.0, runs=False)
    look(one, 16.4)
    look(one, 20.0, runs=False)
    assert one.worked == pytest.approx(0.4) and one.versions.published == 0
    look(one, 21.0)
    assert one.worked == pytest.approx(1.0) and one.versions.published == 1


def test_an_update_learns_from_the_last_requests_only() -> None:
    one = learner("inline", interval=100)
    for i in range(100):
        judge(one, i, 4, at=150.0 if i >= 100 - MOST else 0.0)
    look(one, 200.0)
    look(one, 201.0)
    assert one.drafts.knows["a"] == 0.0
    assert one.drafts.knows["b"] == pytest.approx(1 - math.exp(-MOST / 8 / 4))


def test_a_version_that_does_far_worse_goes_back() -> None:
    one = learner("inline")
    for i in range(4):
        judge(one, i, 7)
    look(one, 1.0)
    look(one, 2.0)
    assert one.stats().version == 1
    for i in range(4, 16):
        judge(one, i, 0)
    look(one, 3.0, waits=True)
    assert one.stats().rolled_back == 1 and one.drafts.knows == {}


FLEET = Fleet(
    model="llama-3.1-8b", speculate="draft", draft_cost=0.1, draft_length="fixed", draft_tokens=2,
    acceptance="measured", subjects="spanish", train_drafter="inline", train_seconds=0.01,
    instances=2,
)  # fmt: skip
WORK = Workload(num_prompts=160, input_len=40, output_len=50)
TRAFFIC = Traffic(request_rate=20.0, percentiles=(100.0,))


def test_a_fleet_learns_what_it_is_asked() -> None:
    taught = sim.run(FLEET, WORK, TRAFFIC).result
    frozen = sim.run(replace(FLEET, train_drafter="off"), WORK, TRAFFIC).result
    assert taught["completed"] == frozen["completed"] == 160
    assert taught["acceptance"] > 1.2 * frozen["acceptance"]
    assert taught["updates"] > 5 and taught["paused_s"] == pytest.approx(taught["training_s"])
    assert frozen["updates"] == 0 == frozen["paused_s"]
    slow = sim.run(replace(FLEET, train_seconds=0.3), WORK, TRAFFIC).result
    assert slow["p100_itl_ms"] > 300 > taught["p100_itl_ms"]
    shared = sim.run(FLEET, WORK, replace(TRAFFIC, jobs=2)).result
    for name in ("wall_seconds", "date"):
        taught.pop(name), shared.pop(name)
    assert shared == taught


def test_the_experiment_tells_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_sim, "WORK", replace(online_sim.WORK, num_prompts=6, output_len=4))
    monkeypatch.setattr(online_sim, "LOADS", (1.0,))
    monkeypatch.setattr(online_sim, "rate_of", lambda *_: 5.0)
    result = online_sim.run("llama-3.1-8b")
    assert len(result["results"]) == len(online_sim.settings()) + len(online_sim.some())
    rows = online_sim.grid(result, "request_goodput", 1.0)
    assert len(rows) == 4 and all(len(row) == 1 + len(online_sim.INTERVALS) for row in rows)
    assert len(online_sim.lines(result)) > 20
    with pytest.raises(ModelError):
        online_sim.run("nobody")
