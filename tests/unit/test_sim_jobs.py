"""Shares of a fleet in processes of their own: the result of one process."""

from dataclasses import replace

import pytest

from kvarn.bench import sim
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.core.errors import ConfigError

FLEET = Fleet(instances=5, router="round_robin", pages=400)
WORK = Workload(num_prompts=120, input_len=200, output_len=40, range_ratio=0.8)
TRAFFIC = Traffic(request_rate=60.0, detailed=True)


@pytest.mark.parametrize(
    ("fleet", "jobs"),
    [
        (FLEET, 2),
        (FLEET, 3),
        (replace(FLEET, overlap="off", round_context=32, prefix="none"), 2),
        (replace(FLEET, max_queue=1, max_seqs=2), 2),  # some are refused
        (replace(FLEET, instances=2), 4),  # two shares have no instance
    ],
)
def test_the_result_is_that_of_one_process(fleet: Fleet, jobs: int) -> None:
    one, several = (sim.run(fleet, WORK, replace(TRAFFIC, jobs=n)).result for n in (1, jobs))
    for result in (one, several):
        for name in ("wall_seconds", "date"):
            result.pop(name, None)
        result["config"].pop("jobs", None)
    assert one == several
    assert one["completed"] > 0 and (one["failed"] > 0) == (fleet.max_queue == 1)


@pytest.mark.parametrize(
    ("fleet", "traffic", "words"),
    [
        (replace(FLEET, router="least_loaded"), TRAFFIC, "router=least_loaded looks at all"),
        (FLEET, replace(TRAFFIC, perfetto="steps.json"), "perfetto needs them together"),
        (FLEET, replace(TRAFFIC, jobs=0), "at least 1"),
    ],
)
def test_shares_that_see_each_other_are_refused(fleet: Fleet, traffic: Traffic, words: str) -> None:
    traffic = traffic if traffic.jobs == 0 else replace(traffic, jobs=2)
    with pytest.raises(ConfigError, match=words):
        sim.run(fleet, WORK, traffic)


def test_an_error_in_a_share_is_raised() -> None:
    with pytest.raises(ConfigError, match="unknown source"):
        sim.run(replace(FLEET, cost="nothing"), WORK, replace(TRAFFIC, jobs=2))
