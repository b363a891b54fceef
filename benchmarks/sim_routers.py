"""Routers on the Mooncake conversation trace, and how fast the simulator is.

    python benchmarks/sim_routers.py TRACES_FOLDER [--bars] [--json FILE]

16 instances of an 8B model on H100s with prefix caching, the trace at its own speed and twice as
fast; then 1,000 instances under Poisson arrivals with the lengths of Azure's 2023 conversation
trace at 3,000 requests a second, for a few virtual seconds. Wall times are of one process.

With --bars, error bars on the routers' ratios instead: 30 wrong time models, as wide as the errors
of held-out steps on an H100, that every router meets on the first requests of the trace and fewer
instances (93 simulations of all of it take two hours).
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

from kvarn.bench import error_bars, record, sim
from kvarn.bench.bounds import distances
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.workload.load import open_trace
from kvarn.workload.trace import Trace

ROUTERS = ("round_robin", "least_loaded", "prefix_aware")
SPEEDS = (1.0, 2.0)
MOONCAKE = "mooncake_conversation_trace.jsonl.gz"
AZURE = "AzureLLMInferenceTrace_2023_conv.csv.gz"
LARGE = Fleet(instances=1000, router="least_loaded", page_size=64, prefix="none", round_context=32)
FEW = Fleet(instances=4, round_context=32)  #: of the error bars
FIRST, DRAWS = 1500, error_bars.Draws(n=30, seed=0)  #: requests and draws of the error bars
SECONDS, RATE = 20.0, 3000.0  #: of the large run, in virtual time
KEPT = (
    "completed", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "prefix_hit_rate", "preemptions",
    "energy_j", "utilisation", "steps", "wall_seconds",
)  # fmt: skip


def routed(path: Path, router: str, speed: float) -> dict[str, Any]:
    """One router at one speed of the trace, with its distance to the bounds."""
    fleet = Fleet(instances=16, router=router)
    done = sim.run(fleet, Workload(speed=speed), Traffic(trace=str(path)))
    row = {"router": router, "speed": speed} | {key: done.result[key] for key in KEPT}
    bounds = distances(fleet, done.result, done.outcome, done.trace)
    return row | {"e2e_over_bound": bounds["mean_e2e"]["ratio"],
                  "best_hit_rate": bounds["hit_rate"]["bound"]}  # fmt: skip


def bars(path: Path) -> dict[str, Any]:
    """What is left of the routers' ratios when times are wrong."""
    traffic = Traffic(trace=str(path), limit=FIRST)
    found = error_bars.run(
        FEW, Workload(), traffic, f"router={','.join(ROUTERS)}", DRAWS,
        lambda done, total: print(f"{done} of {total}", flush=True),
    )  # fmt: skip
    for row in error_bars.rows(found):
        print(row)
    return found


def large(path: Path) -> dict[str, Any]:
    """A thousand instances for some seconds: what a request costs the simulator."""
    lengths, rng, at, requests = open_trace(str(path)).requests, Random(0), 0.0, []
    while (at := at + rng.expovariate(RATE)) < SECONDS:
        requests.append(replace(rng.choice(lengths), id=str(len(requests)), at=at))
    trace = Trace("synthetic-poisson", tuple(requests), chain=(f"lengths of {path.name}",))
    done = sim.measured(LARGE, Workload(), Traffic(), trace)
    wall = done.result["wall_seconds"]
    return {
        "instances": LARGE.instances, "rate": RATE, "requests": len(requests),
        "virtual_seconds": done.outcome.seconds, "wall_seconds": wall,
        "wall_us_per_request": 1e6 * wall / len(requests),
        "hour_in_hours": wall / len(requests) * RATE,  # wall hours for 3,600 s of arrivals
        "completed": done.result["completed"],
    }  # fmt: skip


def main() -> None:
    """Run everything, print as it goes, write one result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    if given.bars:
        record.write(bars(given.traces / MOONCAKE), given.json)
        return
    rows = []
    for speed in SPEEDS:
        for router in ROUTERS:
            rows.append(routed(given.traces / MOONCAKE, router, speed))
            print(rows[-1], flush=True)
    big = large(given.traces / AZURE)
    print(big)
    result = record.header("sim_routers", {"trace": MOONCAKE}, asdict(Fleet(instances=16)))
    record.write(result | {"results": rows, "large": big}, given.json)


if __name__ == "__main__":
    main()
