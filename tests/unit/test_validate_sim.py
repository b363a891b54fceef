"""benchmarks/validate_sim.py: its figures are what it says."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "validate_sim.py"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(PATH.parent))
    spec = importlib.util.spec_from_file_location("validate_sim", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_times_of_requests(script):
    found = script.times([(0.0, 1.0, 3.0, 5), (1.0, 4.0, 5.0, 2)])
    assert found["ttft"]["mean"] == 2.0
    assert found["tpot"] == {"mean": 0.75, "p50": 0.75, "p99": 1.0}
    assert found["e2e"]["p50"] == 3.5
    assert found["throughput"]["mean"] == 7 / 5


def test_the_clocks_meet_at_the_least_delay(script):
    row = {"first_token_ts": 12.0, "last_token_ts": 13.0, "output_toks": 4}
    rows = [
        row | {"arrival_time": 100.0, "queued_ts": 10.5},
        row | {"arrival_time": 101.0, "queued_ts": 11.0},
    ]
    assert [at for at, *_ in sys.modules["public_runs"].measured_times(rows)] == [10.0, 11.0]


def test_errors_are_relative_and_signed(script):
    found = sys.modules["public_runs"].errors({"tpot": {"mean": 9.0}}, {"tpot": {"mean": 10.0}})
    assert found["tpot"]["mean"] == pytest.approx(-0.1)


def test_a_closed_loop_starts_with_a_burst_and_ends(script):
    first, after = script.closed_loop(4, 100, 50)
    later = []
    while more := after("any", 2.0):
        later += more
    assert len(first) == 4 and len(later) == 4 * (script.WAVES - 1)
    assert all(one.arrival == 0.0 for one in first)
    assert all(one.arrival == 2.0 for one in later)
    assert all(80 <= len(one.prompt) <= 100 for one in first + later)
    assert all(40 <= one.sampling.max_tokens <= 50 for one in first + later)


def test_a_point_that_needs_more_prefill_than_there_is_time_is_seen(script):
    class Second:
        def step(self, shape):
            return SimpleNamespace(seconds=1.0)

    row = {"isl": "8192", "osl": "100", "batch_size": "4", "silicon_tpot_ms": "10",
           "silicon_ttft_ms": "1110"}  # fmt: skip
    # 4 prompts in 2 s, a second each
    assert script.prefill_load(Second(), row) == pytest.approx(2.0)


def test_groups_hold_the_limits_against_medians(script):
    points = [
        {"model": "m", "device": "d", "tp": 1, "missing_ms": 0.0, "prefill_load": 0.5,
         "measured": {"ttft": 10.0, "tpot": 10.0}, "predicted": {"ttft": 15.0, "tpot": tpot}}
        for tpot in (9.0, 10.0, 30.0)
    ]  # fmt: skip
    row = script.groups(points)[0]
    assert row["tpot_median_error"] == pytest.approx(0.1) and row["tpot_within"]
    assert not row["ttft_within"]
