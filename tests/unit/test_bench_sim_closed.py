"""`kvarn sim` on generated traces, and turns that wait for the answer before them."""

import math
from types import SimpleNamespace

import pytest

from kvarn.bench.sim_load import ClosedLoop, generated
from kvarn.core.errors import ConfigError
from kvarn.workload.trace import Trace, TraceRequest


def trace_of(name: str, rate: float = math.inf) -> Trace:
    work = SimpleNamespace(num_prompts=40, seed=3)
    return generated(name, work, SimpleNamespace(request_rate=rate))


@pytest.mark.parametrize("name", ["synthetic-multi-turn", "synthetic-rag", "synthetic-agents"])
def test_generated_by_name(name):
    trace = trace_of(name, rate=2.0)
    assert trace.name == name
    parents = [one.parent for one in trace if one.parent]
    assert set(parents) <= {one.id for one in trace}
    assert len(trace) == 40 if name == "synthetic-rag" else parents
    assert "seed=3" in trace.chain[0] and "rate=2.0" in trace.chain[0]


def test_unknown_generator_names_the_nearest():
    with pytest.raises(ConfigError, match="synthetic-rag"):
        trace_of("synthetic-rg")


def test_a_turn_waits_for_the_answer_and_the_think_time():
    requests = (
        TraceRequest("a", 0.0, 4, 1),
        TraceRequest("b", 1.0, 8, 1, parent="a", think=5.0),
        TraceRequest("c", 2.0, 8, 1, parent="cut off"),
    )
    loop = ClosedLoop(Trace("t", requests))
    assert [(one.id, one.arrival) for one in loop.first()] == [("a", 0.0), ("c", 2.0)]
    assert [(one.id, one.arrival) for one in loop.after("a", 30.0)] == [("b", 35.0)]
    assert list(loop.after("b", 40.0)) == []
