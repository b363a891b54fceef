"""One simulation on several processor cores, with the result of one, to the last digit.

Where the router asks nobody's state (`round_robin`), what an instance does follows from its own
requests alone. So of J processes the j-th simulates the instances whose number is j modulo J, with
the requests whose turn it is to go there, and what came of them all is put together.
"""

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

from kvarn.bench import sim_fleet as made
from kvarn.bench.options import Fleet, Traffic
from kvarn.bench.sim_load import requests_of
from kvarn.cluster import fleet
from kvarn.cluster.router import Choice
from kvarn.cluster.router.round_robin import RoundRobin
from kvarn.cluster.routing import Routing
from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.core.request import Request
from kvarn.schedule.control import Counters
from kvarn.sim.instance import Instance
from kvarn.sim.learner import Learner
from kvarn.sim.run import Outcome, Record, Tally
from kvarn.sim.simulation import Simulation
from kvarn.sim.speculating import Speculating
from kvarn.workload.trace import Trace


@dataclass(slots=True)
class Totals:
    """What came of one instance."""

    busy: int
    joules: float
    unmeasured: float
    steps: int
    counters: Counters
    paused: int = 0  #: for updates of a drafter [ns]
    learner: Learner | None = None


@dataclass(slots=True)
class Share:
    """What came of one process's instances, by number, and of their requests, in order."""

    instances: dict[int, Totals]
    records: list[Record]
    gaps: Counter[int]
    end: int  #: [ns]


class Turns(RoundRobin):
    """The turns of some of the requests."""

    def __init__(self, turns: Iterator[int]) -> None:
        super().__init__()
        self._turns = turns

    def choose(self, request: Request, fleet: fleet.Fleet, now: float) -> Choice:
        """See `RoundRobin`."""
        self._next = next(self._turns)
        return super().choose(request, fleet, now)


def check(fleet_: Fleet, traffic: Traffic) -> None:
    """Raise `ConfigError` where shares of the instances would see each other."""
    if traffic.jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {traffic.jobs}")
    if traffic.jobs == 1:
        return
    whole = f"jobs={traffic.jobs} simulates shares of the instances apart"
    if fleet_.router != "round_robin":
        raise ConfigError(
            f"{whole}, and router={fleet_.router} looks at all of them: use router=round_robin or "
            f"jobs=1"
        )
    for name in ("closed_loop", "perfetto", "plots"):
        if getattr(traffic, name):
            raise ConfigError(f"{whole}, and {name} needs them together: leave one of the two out")
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError(f"{whole}, in forked processes, which this system has not: use jobs=1")


def simulate(fleet_: Fleet, spec: ModelSpec, trace: Trace, jobs: int) -> Outcome:
    """Run a trace through the fleet in `jobs` processes."""
    fork, shares, pipes = multiprocessing.get_context("fork"), list[Share](), list[Connection]()
    for job in range(jobs):
        ours, theirs = fork.Pipe(duplex=False)
        fork.Process(target=_work, args=(theirs, fleet_, spec, trace, job, jobs)).start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        found = pipe.recv()
        if isinstance(found, Exception):
            raise found
        shares.append(found)
    return _joined(fleet_, spec, trace, shares)


def _work(
    pipe: Connection, fleet_: Fleet, spec: ModelSpec, trace: Trace, job: int, jobs: int
) -> None:
    try:
        pipe.send(_share(fleet_, spec, trace, job, jobs))
    except Exception as error:
        pipe.send(error)


def _share(fleet_: Fleet, spec: ModelSpec, trace: Trace, job: int, jobs: int) -> Share:
    """What job number `job` simulates."""
    size = fleet_.instances
    mine = [i for i in range(len(trace)) if i % size % jobs == job]
    tally = made.tally_of(trace)
    instances = made.instances_of(fleet_, spec, trace, made.price_list(fleet_, spec), tally)
    policy = Routing(Turns(i % size for i in mine), fleet.Fleet(size))
    requests = requests_of(trace, (trace.requests[i] for i in mine))
    with made.uncollected():
        outcome = Simulation(requests, instances, policy, tally).run()
    totals = {i: _totals(one) for i, one in enumerate(instances) if i % jobs == job}
    return Share(totals, outcome.records, outcome.gaps, outcome.end)


def _totals(one: Instance) -> Totals:
    found = Totals(one.busy, one.joules, one.unmeasured, one.control.steps, one.control.counters)
    if isinstance(one, Speculating):
        found.paused, found.learner = one.paused, one.learner
    return found


def _joined(fleet_: Fleet, spec: ModelSpec, trace: Trace, shares: list[Share]) -> Outcome:
    """As if one process had simulated it all."""
    size, jobs = fleet_.instances, len(shares)
    instances = made.instances_of(fleet_, spec, trace, made.price_list(fleet_, spec), Tally())
    gaps = Counter[int]()
    for share in shares:
        gaps.update(share.gaps)
        for i, totals in share.instances.items():
            one = instances[i]
            one.busy, one.joules, one.unmeasured = totals.busy, totals.joules, totals.unmeasured
            one.control.steps, one.control.counters = totals.steps, totals.counters
            if isinstance(one, Speculating):
                one.paused, one.learner = totals.paused, totals.learner
    records = [iter(share.records) for share in shares]
    order = [next(records[i % size % jobs]) for i in range(len(trace))]
    return Outcome(order, gaps, None, instances, max(share.end for share in shares))
