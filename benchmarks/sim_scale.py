"""How fast the simulator is: a thousand instances under 3,000 requests a second.

    python benchmarks/sim_scale.py TRACES_FOLDER [--minutes 1] [--json FILE]

Poisson arrivals with the lengths of Azure's 2023 conversation trace: `least_loaded` in one process,
and `round_robin` in two.
`--minutes 60` is the whole hour; of a shorter slice the time of an hour is projected from the time
by request (of a minute, as of an hour, gaps between tokens are counted, of less they are kept).
Also the Mooncake conversation trace (an hour) on 16 instances with prefix caching.
Everything is counted: making the requests, the simulation, the result.
"""

import argparse
import multiprocessing
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

from kvarn.bench import record, sim
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.workload.load import open_trace
from kvarn.workload.trace import Trace

MOONCAKE = "mooncake_conversation_trace.jsonl.gz"
AZURE = "AzureLLMInferenceTrace_2023_conv.csv.gz"
LARGE = Fleet(instances=1000, router="least_loaded", page_size=64, prefix="none", round_context=32)
SMALL = Fleet(instances=16, router="prefix_aware")
RATE = 3000.0  #: [requests/s]


def poisson(path: Path, seconds: float) -> Trace:
    """Requests for so long, with lengths drawn from a recorded trace."""
    lengths, rng, at, requests = open_trace(str(path)).requests, Random(0), 0.0, []
    while (at := at + rng.expovariate(RATE)) < seconds:
        requests.append(replace(rng.choice(lengths), id=str(len(requests)), at=at))
    return Trace("synthetic-poisson", tuple(requests), chain=(f"lengths of {path.name}",))


def timed(fleet: Fleet, path: Path, seconds: float | None = None, jobs: int = 1) -> dict[str, Any]:
    """Simulate a trace (or `seconds` of arrivals with its lengths): wall and processor seconds."""
    wall, cpu = time.perf_counter(), processor()
    trace = open_trace(str(path)) if seconds is None else poisson(path, seconds)
    done = sim.measured(fleet, Workload(), Traffic(jobs=jobs), trace)
    wall, cpu = time.perf_counter() - wall, processor() - cpu
    return {
        "jobs": jobs,
        "instances": fleet.instances, "router": fleet.router, "prefix": fleet.prefix,
        "requests": len(trace), "completed": done.result["completed"],
        "steps": done.result["steps"], "virtual_seconds": done.outcome.seconds,
        "wall_seconds": wall, "cpu_seconds": cpu, "requests_per_second": len(trace) / wall,
    }  # fmt: skip


def processor() -> float:
    """Seconds that this process and those it started have taken of processors."""
    while multiprocessing.active_children():  # waits for those that are done
        time.sleep(0.01)
    took = os.times()
    return took.user + took.system + took.children_user + took.children_system


def of_an_hour(found: dict[str, Any], minutes: float) -> dict[str, Any]:
    """What an hour of such arrivals takes, by the time of a request."""
    by_request = 3600 * RATE / found["requests"] / 3600
    return found | {
        "minutes": minutes, "rate": RATE,
        "hour_in_wall_hours": found["wall_seconds"] * by_request,
        "hour_in_cpu_hours": found["cpu_seconds"] * by_request,
    }  # fmt: skip


def main() -> None:
    """Run both, write one result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    large, shared = (
        of_an_hour(timed(fleet, given.traces / AZURE, given.minutes * 60, jobs), given.minutes)
        for fleet, jobs in ((LARGE, 1), (replace(LARGE, router="round_robin"), 2))
    )
    print(large, shared, flush=True)
    mooncake = timed(SMALL, given.traces / MOONCAKE)
    print(mooncake)
    result = record.header("sim_scale", {"traces": [AZURE, MOONCAKE]}, asdict(LARGE))
    found = {"large": large, "shared": shared, "mooncake": mooncake}
    record.write(result | found, given.json)


if __name__ == "__main__":
    main()
