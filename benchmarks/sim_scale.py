"""How fast the simulator is: a thousand instances under 3,000 requests a second.

    python benchmarks/sim_scale.py TRACES_FOLDER [--minutes 1] [--json FILE]

Poisson arrivals with the lengths of Azure's 2023 conversation trace, `least_loaded`, one process.
`--minutes 60` is the whole hour; of a shorter slice the time of an hour is projected from the time
by request (of a minute, as of an hour, gaps between tokens are counted, of less they are kept).
Also the Mooncake conversation trace (an hour) on 16 instances with prefix caching.
Everything is counted: making the requests, the simulation, the result.
"""

import argparse
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


def timed(fleet: Fleet, path: Path, seconds: float | None = None) -> dict[str, Any]:
    """Simulate a trace (or `seconds` of arrivals with its lengths): wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    trace = open_trace(str(path)) if seconds is None else poisson(path, seconds)
    done = sim.measured(fleet, Workload(), Traffic(), trace)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "instances": fleet.instances, "router": fleet.router, "prefix": fleet.prefix,
        "requests": len(trace), "completed": done.result["completed"],
        "steps": done.result["steps"], "virtual_seconds": done.outcome.seconds,
        "wall_seconds": wall, "cpu_seconds": cpu, "requests_per_second": len(trace) / wall,
    }  # fmt: skip


def main() -> None:
    """Run both, write one result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    large = timed(LARGE, given.traces / AZURE, given.minutes * 60)
    by_request = 3600 * RATE / large["requests"] / 3600
    large |= {"minutes": given.minutes, "rate": RATE,
              "hour_in_wall_hours": large["wall_seconds"] * by_request,
              "hour_in_cpu_hours": large["cpu_seconds"] * by_request}  # fmt: skip
    print(large, flush=True)
    mooncake = timed(SMALL, given.traces / MOONCAKE)
    print(mooncake)
    result = record.header("sim_scale", {"traces": [AZURE, MOONCAKE]}, asdict(LARGE))
    record.write(result | {"large": large, "mooncake": mooncake}, given.json)


if __name__ == "__main__":
    main()
