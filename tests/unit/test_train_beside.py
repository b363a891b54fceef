"""Training beside serving: arrivals, times per token, what counts, what the thread was doing."""

import argparse
import json
import math
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import train_beside as beside
import trainer_watch
import training_sections

from kvarn.speculate.train.worker import Background


def answer(arrived: float, first: float, last: float, tokens: int) -> beside.Answer:
    return beside.Answer(arrived, first, last, tokens)


def step(began: float, ended: float, size: int = 1, captured: bool = False) -> beside.Step:
    return beside.Step((began, ended), size, True, captured)


def job(*marks: float) -> trainer_watch.Watched:
    return trainer_watch.Watched(list(marks), True)


def test_arrivals_are_of_the_rate_and_the_same_for_a_seed():
    times = beside.arrivals(50.0, 100.0, 3)
    assert times == sorted(times) == beside.arrivals(50.0, 100.0, 3)
    assert times != beside.arrivals(50.0, 100.0, 4)
    assert times[0] > 0 and times[-1] < 100.0
    assert len(times) == pytest.approx(5000, rel=0.05)


def test_a_corrected_rate_is_that_of_an_engine_that_serves_all_at_once():
    seconds = 0.2  # of a request
    busy = 1 - math.exp(-3.0 * seconds)
    assert beside.corrected(3.0, busy, busy) == pytest.approx(3.0)
    assert 1 - math.exp(-beside.corrected(3.0, 0.6, busy) * seconds) == pytest.approx(0.6)
    assert beside.corrected(3.0, 0.6, 1.0) > 0
    assert math.isfinite(beside.corrected(3.0, 0.6, 0.0))


def test_time_per_token_is_of_the_tokens_behind_the_first():
    one = beside.Answer(1.0)
    for now, tokens in ((2.0, 1), (2.5, 3), (3.0, 1)):
        one.saw(now, tokens)
    assert (one.first, one.last, one.tokens) == (2.0, 3.0, 5)
    assert one.tpot == pytest.approx(0.25)


def test_shares_of_a_time():
    assert beside.meets((1, 2), [(0, 1.5)])
    assert not beside.meets((1, 2), [(0, 1), (2, 3)])
    assert beside.covered((0, 10), [(-1, 1), (4, 6), (9, 12)]) == pytest.approx(0.4)
    turn = beside.Turn((0, 10), [], [step(0, 5), step(5, 6)], {})
    assert turn.busy == pytest.approx(0.6)
    assert beside.in_steps(turn, [(4, 8), (9, 20)]) == pytest.approx(0.4)
    assert beside.in_steps(turn, []) is None


def test_percentiles_and_spread():
    assert beside.p95([100 - i for i in range(101)]) == pytest.approx(95)
    assert beside.p95([]) == 0
    assert beside.spread([2.0, 2.0, 3.0]) == pytest.approx(0.5)
    assert beside.spread([2.0]) is None


def test_what_is_short_early_or_beside_a_capture_does_not_count():
    answers = [
        answer(10.1, 10.2, 10.9, 9),  # in the warm-up
        answer(11.0, 11.1, 11.9, 9),
        answer(11.0, 11.1, 11.9, 7),  # too short
        answer(12.0, 12.1, 12.9, 9),  # a step captured
        answer(13.0, 13.1, 13.9, 9),
    ]
    steps = [step(11.0, 11.9), step(12.5, 12.6, captured=True), step(13.0, 13.1)]
    turn = beside.Turn((10.0, 14.0), answers, steps, {})
    assert list(beside.counting(turn, 0.5)) == [1, 4]
    short = beside.Turn((10.0, 14.0), [*answers[:4], answer(13.0, 13.1, 13.9, 3)], steps[:1], {})
    pairs = beside.paired(0, turn, short, [(12.0, 12.2)], 0.5)
    assert [(one.turn, one.beside) for one in pairs] == [(0, False)]
    assert list(beside.counting(short, 0.5)) == [1, 3]
    assert beside.paired(0, short, short, [(12.0, 12.2)], 0.5)[1].beside


def test_the_interval_holds_the_ratio():
    pairs = [beside.Pair(0, 0.01 + i / 1e5, 1.1 * (0.01 + i / 1e5), False) for i in range(100)]
    row = beside.requests_row(pairs)
    assert row["ratio_p95"] == pytest.approx(1.1) == row["ratio_p50"]
    assert row["interval_p95"] == pytest.approx((1.1, 1.1))
    assert beside.requests_row([]) == {"requests": 0}


def test_steps_are_held_against_those_of_as_many_sequences():
    a = [step(0, 1.0, size=1)] * 30 + [step(0, 2.0, size=2)] * 30
    b = [step(0, 1.5, size=1)] * 20 + [step(0, 2.0, size=2)] * 60 + [step(0, 9.0, size=3)] * 60
    row = beside.steps_row(a, b)
    assert row["alike_mean"] == pytest.approx((1.5 * 20 + 60) / 80) == row["alike_median"]
    assert (row["alike_steps"], row["a_steps"], row["b_steps"]) == (80, 60, 140)
    assert beside.steps_row([], [])["alike_mean"] is None


def test_a_job_goes_on_for_the_batch_under_way():
    one = job(0, 1, 1, 5, 5, 9, 20, 24, 24, 25)  # paused from 9 to 20
    assert one.pieces == [(0, 1), (1, 5), (5, 9), (20, 24), (24, 25)]
    told = [(7.0, True), (19.0, False), (21.0, True), (22.0, False), (30.0, True), (31.0, False)]
    waits, outlives = trainer_watch.yields([one], told)  # the last wait was beside no job
    assert (waits.waited, waits.went_on, waits.pieces) == (12.0, 2.0, 1)
    assert (outlives.waited, outlives.went_on, outlives.pieces) == (1.0, 3.0, 1)
    (disobeys,) = trainer_watch.yields([one], [(3.0, True), (8.0, False)])
    assert (disobeys.went_on, disobeys.pieces) == (6.0, 2)


def test_the_thread_is_watched_from_outside():
    worker, done = Background(), threading.Event()
    trainer = SimpleNamespace(worker=worker, renew=lambda decoder, keep_kv: None)
    watch = trainer_watch.Watch(trainer)

    def work(go_on):
        while not done.is_set():
            assert go_on()
        return None

    worker.begin(work)
    worker.yields(False)  # nothing new
    worker.yields(True)
    done.set()
    assert watch.told[0][1]
    watch.rest()
    trainer.renew(None, True)
    worker.close()
    assert [busy for _, busy in watch.told] == [True, False]
    assert watch.jobs[0].over and len(watch.pieces) == len(watch.jobs[0].marks) // 2 >= 1
    assert len(watch.renewals) == 1
    assert all(one.pieces <= 1 for one in trainer_watch.yields(watch.jobs, watch.told))


@pytest.mark.parametrize("turns", [1, 3])
def test_the_page_says_what_was_found(turns):
    found, counts = beside.Found(), dict.fromkeys((*beside.STATS, *beside.TRAINED), 1.0)
    watch = SimpleNamespace(jobs=[job(0, 1, 1, 5, 5, 6)], told=[(2.0, True), (3.0, False)])
    watch.renewals, watch.pieces = [(6.0, 6.5)], watch.jobs[0].pieces
    sides = [SimpleNamespace(name="off", watch=None), SimpleNamespace(name="on", watch=watch)]
    for at in range(turns):
        answers = [answer(1.0, 2.0, 2.0 + i / 8, 9) for i in range(1, 9)]
        turn = beside.Turn((0.0, 10.0), answers, [step(1.0, 3.0)] * 40, counts)
        found.add(at, sides, [turn, turn], 0.5)
    said = argparse.Namespace(output=64, least=8)
    result = {
        "workload": vars(said), "rate": 2.5, "config": {"model": "m", "draft_tokens": 2}, **
        found.result(), "yielding": beside.yielding(watch), "trainer": {"failed": ""},
    }  # fmt: skip
    result["config"]["max_seqs"] = 16
    page = "\n".join(training_sections.train_beside(json.loads(json.dumps(result))))
    assert "| 1 | spanish | 8 |" in page
    assert "1.000 to 1.000" in page
    assert "at most 1, for 3e+03 ms" in page or "at most 1, for 3000 ms" in page
    assert ("0 % (spanish)" in page) == (turns > 2)
