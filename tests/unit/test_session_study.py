"""Sessions in a simulated queue: the knee, the crossover, and what the engine's cache does."""

from dataclasses import replace

import pytest

from kvarn.bench import experiments, reproduce, session_study
from kvarn.bench.session_engine import engine_rate
from kvarn.core.errors import ConfigError
from kvarn.cost.session import Workload
from kvarn.cost.session_steps import SessionSteps
from kvarn.cost.shape import StepShape
from kvarn.sim.sessions import Service, Sessions, simulate

LOAD = Workload(context=4000, answer=100, turns=3, think=2.0)
MODEL = session_study.with_room(session_study.YI, 4, LOAD)


def test_one_user_is_served_as_the_formula_says():
    alone = simulate(MODEL, LOAD, 1, Service(4))
    assert alone.missed == 0
    assert alone.per_hour == pytest.approx(MODEL.throughput(LOAD, 1), rel=0.01)


def test_device_time_adds_up_to_what_was_served():
    busy = replace(LOAD, think=0.0)
    sessions = Sessions(MODEL, busy, 7, Service(3))
    sessions.run(5)
    found = sessions.run(50)
    assert sum(found.spent.values()) == pytest.approx(found.seconds, rel=0.05)
    assert found.spent["prefill"] == pytest.approx(50 * MODEL.prefill(4000), rel=0.1)


@pytest.mark.parametrize("back", ["swap", "recompute"])
def test_nobody_comes_back_until_more_users_are_there_than_fit(back):
    missed = [simulate(MODEL, LOAD, users, Service(4, back)).missed for users in range(1, 7)]
    assert missed[:4] == [0, 0, 0, 0]
    assert missed[4] > 0.5 and missed[5] > 0.5


def test_thought_that_varies_lets_some_users_stay():
    even = simulate(MODEL, LOAD, 5, Service(4))
    uneven = simulate(MODEL, LOAD, 5, Service(4, random_think=True))
    assert 0 < uneven.missed < even.missed


@pytest.mark.parametrize("context", [4_000, 50_000])
def test_swapping_beats_recomputing_where_the_formula_says(context):
    row = session_study.crossover(session_study.YI, context)
    assert row["error"] == pytest.approx(0, abs=0.1)


def test_every_technique_helps_what_the_taxonomy_says():
    for row in session_study.techniques(session_study.YI):
        assert row["said"] == row["simulated"], row["technique"]


def test_the_worked_example_is_within_five_percent():
    for row in session_study.worked_example():
        assert round(row["ours"], 1) == row["published"] or row["ours"] == pytest.approx(
            row["published"], rel=0.05
        )


def test_the_engine_finds_prompts_while_they_fit_and_none_after():
    load = Workload(context=4000, answer=100, turns=3, think=2.0)
    there, gone = (engine_rate(MODEL, load, users, 4) for users in (3, 6))
    assert there["engine_missed"] == 0 and gone["engine_missed"] > 0.9
    queue = simulate(MODEL, load, 3, Service(4)).per_hour
    assert there["engine_simulated"] == pytest.approx(queue, rel=0.1)


def test_steps_are_priced_as_the_formulas():
    steps = SessionSteps(MODEL)
    halves = [steps.step(StepShape(((2000, context),))).seconds for context in (2000, 4000)]
    assert sum(halves) == pytest.approx(MODEL.prefill(4000))
    pair = steps.step(StepShape((), 2, 2 * 4000, 4000, 2))
    assert pair.seconds == pytest.approx(MODEL.decode(4000, 2))


def test_every_experiment_can_be_found():
    assert set(experiments.TEXTS) <= set(reproduce.EXPERIMENTS)
    assert set(reproduce.EXPERIMENTS) <= {*experiments.TEXTS, *experiments.MODULES}
    for name in (*experiments.TEXTS, *experiments.MODULES):
        found = experiments.find(name)
        assert callable(found.run) and callable(found.lines) and found.model


def test_bad_input_says_what_would_work():
    with pytest.raises(ConfigError, match="at least one user"):
        Service(0)
    with pytest.raises(ConfigError, match="users must be at least 1"):
        Sessions(MODEL, LOAD, 0, Service(1))
    with pytest.raises(ConfigError, match="deployment-challenges"):
        experiments.find("deployment-challenge")
