"""`kvarn sim`: what a fleet would do, in virtual time, under the names of `bench serve`'s results.

The fleet is described by data only (`sim_fleet`): a named shape or a config.json, a device, a cost
model.
"""

import time
from dataclasses import dataclass
from typing import Any

from kvarn.bench import sim_jobs
from kvarn.bench.checks import check_fleet, check_traffic
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.bench.sim_fleet import (
    find_spec,
    instances_of,
    make_router,
    price_list,
    tally_of,
    uncollected,
)
from kvarn.bench.sim_load import ClosedLoop, find_trace, requests_of
from kvarn.bench.sim_report import report
from kvarn.cluster import fleet
from kvarn.cluster.routing import Routing
from kvarn.core.model import ModelSpec
from kvarn.cost.shape import CostModel
from kvarn.sim.run import Outcome
from kvarn.sim.simulation import Simulation
from kvarn.workload.trace import Trace


@dataclass(slots=True)
class Simulated:
    """A result as `bench serve` writes it, and what it came from."""

    result: dict[str, Any]
    outcome: Outcome
    trace: Trace


def run(fleet_: Fleet, work: Workload, traffic: Traffic) -> Simulated:
    """Simulate a fleet under the load that the options describe."""
    check_fleet(fleet_)
    check_traffic(traffic)
    return measured(fleet_, work, traffic, find_trace(work, traffic))


def measured(fleet_: Fleet, work: Workload, traffic: Traffic, trace: Trace) -> Simulated:
    """Simulate a fleet under `trace`, and report it."""
    spec = find_spec(fleet_.model)
    began = time.perf_counter()
    sim_jobs.check(fleet_, traffic)
    with uncollected():
        if traffic.jobs > 1:
            outcome = sim_jobs.simulate(fleet_, spec, trace, traffic.jobs)
        else:
            outcome = simulate(
                fleet_, spec, trace, keep_steps=traffic.perfetto is not None,
                closed_loop=traffic.closed_loop, keep_pages=traffic.plots is not None,
            )  # fmt: skip
        result = report(fleet_, work, traffic, trace, outcome)
    result["wall_seconds"] = time.perf_counter() - began
    return Simulated(result, outcome, trace)


def simulate(
    fleet_: Fleet, spec: ModelSpec, trace: Trace, keep_steps: bool = False,
    cost: CostModel | None = None, closed_loop: bool = False, keep_pages: bool = False,
) -> Outcome:  # fmt: skip
    """Run a trace through the fleet, priced by its own cost model or by `cost`."""
    check_fleet(fleet_)
    cost = cost or price_list(fleet_, spec)
    tally = tally_of(trace)
    tally.steps, tally.page_use = [] if keep_steps else None, {} if keep_pages else None
    instances = instances_of(fleet_, spec, trace, cost, tally)
    policy = Routing(make_router(fleet_, trace), fleet.Fleet(fleet_.instances))
    if closed_loop:
        loop = ClosedLoop(trace)
        simulation = Simulation(loop.first(), instances, policy, tally, loop.after)
    else:
        simulation = Simulation(requests_of(trace), instances, policy, tally)
    with uncollected():
        return simulation.run()
