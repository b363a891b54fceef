"""Does the simulator predict this machine? Trust protocol T2 (steps) and T3 (whole runs).

    python benchmarks/validate_cpu.py [--json FILE]

SmolLM2 on the CPU serves random requests in real time, and writes step logs. A cost model is fitted
to the logs of some runs; steps of other runs, and the times of their requests, are predicted with
it and the engine's own number of pages. Every rate is served `REPEATS` times: what they differ by
among themselves is the least that an error means. The machine must be quiet.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

from kvarn.bench import record, sim
from kvarn.bench.options import Fleet
from kvarn.bench.stats import percentile
from kvarn.core.config import resolve
from kvarn.core.request import Request, SamplingParams
from kvarn.cost.fitted import errors, fit, regime
from kvarn.cost.shape import StepShape, shape_of
from kvarn.engine.engine import Engine
from kvarn.engine.garbage import paced
from kvarn.sim.heap import NS
from kvarn.sim.replay import records
from kvarn.workload.trace import Trace, TraceRequest

OPTIONS = {"model": "smollm2-135m", "pages": 1200, "max_len": 512, "max_seqs": 32}
REQUESTS, REPEATS = 100, 3
LOADS = (0.5, 0.9, 1.1)  #: of the rate at which the engine is just busy
IDLE = 0.005  #: a longer pause between steps is waiting for requests [s]
Row = dict[str, float]


def make_trace(rate: float, seed: int) -> Trace:
    """Requests that share nothing; `rate` 0: all at once."""
    rng, at, requests = Random(seed), 0.0, []
    for i in range(REQUESTS):
        at += rng.expovariate(rate) if rate else 0.0
        n_in, n_out = rng.randrange(16, 256), rng.randrange(8, 64)
        requests.append(TraceRequest(f"{seed}.{i}", at, n_in, n_out))
    return Trace("synthetic-cpu", tuple(requests), 16, (f"rate {rate:g}, seed {seed}",))


def serve(trace: Trace, log: str) -> list[Row]:
    """The trace in real time; TTFT, TPOT and E2E by request [s]. The steps go to `log`."""
    engine, rng = Engine(resolve(OPTIONS | {"step_log": log})), Random(trace.chain[0])
    due, start, found = list(trace), engine.clock(), dict[str, Row]()
    with paced():
        while due or engine.has_work:
            now = engine.clock()
            while due and start + due[0].at <= now:
                one = due.pop(0)
                prompt = [rng.randrange(300, 40000) for _ in range(one.n_in)]
                params = SamplingParams(max_tokens=one.n_out, ignore_eos=True, temperature=0)
                engine.add(Request(one.id, prompt, params, arrival=start + one.at))
            if not engine.has_work:
                time.sleep(max(0.0, start + due[0].at - engine.clock()))
            for output in engine.step():
                if output.finish is not None:
                    first, total = output.timings.first_token, output.timings.total
                    each = (total - first) / max(1, output.n_output - 1)
                    end = engine.clock() - start
                    found[output.request_id] = {
                        "ttft": first, "tpot": each, "e2e": total, "end": end,
                    }  # fmt: skip
    engine.close()
    return [found[one.id] for one in trace]


def steps_of(log: str) -> Iterator[tuple[StepShape, float]]:
    """Steps of a log with their wall time: from one plan to the next, waiting left out."""
    plan, applied, after = None, 0.0, list[float]()
    rows = []
    for one in records(log):
        if one["call"] == "plan":
            if plan is not None and one["now"] - applied < IDLE:
                after.append(one["now"] - applied)
            plan = one
        elif one["call"] == "apply" and plan is not None and plan["plan"]["spans"]:
            spans = plan["plan"]["spans"]
            shape = shape_of((start, length, wants) for _, start, length, _, wants in spans)
            applied = one["now"]
            rows.append((shape, applied - plan["now"]))
    pause = median(after)
    return ((shape, seconds + pause) for shape, seconds in rows[3:])  # the first warm up


def predict(trace: Trace, cost: Any) -> list[Row]:
    """The same requests in virtual time, with the engine's limits and pages."""
    config = resolve(OPTIONS).config
    fleet = Fleet(
        model=config.model, device="CPU", pages=config.pages, page_size=config.page_size,
        max_len=config.max_len, max_seqs=config.max_seqs, budget=512,
    )  # fmt: skip
    outcome = sim.simulate(fleet, sim.find_spec(config.model), trace, cost=cost)
    rows = []
    for one in outcome.records:
        assert one.end is not None and one.first is not None
        rows.append(
            {
                "ttft": (one.first - one.arrival) / NS, "e2e": (one.end - one.arrival) / NS,
                "tpot": (one.end - one.first) / NS / max(1, one.n_out - 1), "end": one.end / NS,
            }
        )  # fmt: skip
    return rows


def summary(rows: list[Row]) -> Row:
    """What T3 compares."""
    ttft = sorted(row["ttft"] for row in rows)
    return {
        "mean_ttft": fmean(ttft), "p99_ttft": percentile(ttft, 99),
        "mean_tpot": fmean(row["tpot"] for row in rows),
        "throughput": len(rows) / max(row["end"] for row in rows),
    }  # fmt: skip


def main() -> None:
    """Fit on two runs, predict nine others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = validate(Path(folder))
    header = record.header("sim_cpu", {"requests": REQUESTS, "repeats": REPEATS}, OPTIONS)
    record.write(header | result, given.json)


def validate(folder: Path) -> dict[str, Any]:
    """Both protocols."""
    burst = str(folder / "burst.jsonl")
    saturation = summary(serve(make_trace(0.0, 1), burst))["throughput"]
    steady = str(folder / "steady.jsonl")
    serve(make_trace(0.7 * saturation, 2), steady)
    cost = fit([*steps_of(burst), *steps_of(steady)])
    runs, pairs = [], list[Any]()
    for load in LOADS:
        trace = make_trace(load * saturation, 10 + round(10 * load))
        real = []
        for repeat in range(REPEATS):
            log = str(folder / f"{load}.{repeat}.jsonl")
            real.append(summary(serve(trace, log)))
            pairs += [(shape, seconds) for shape, seconds in steps_of(log)]
        guess = summary(predict(trace, cost))
        for name, value in guess.items():
            seen = [one[name] for one in real]
            runs.append(
                {
                    "load": load, "measure": name, "predicted": value, "measured": fmean(seen),
                    "error": value / fmean(seen) - 1,
                    "spread": (max(seen) - min(seen)) / fmean(seen),
                }
            )  # fmt: skip
            print(runs[-1], flush=True)
    kinds = sorted({regime(shape) for shape, _ in pairs})
    judged = {
        kind: asdict(errors([(cost.step(s), t) for s, t in pairs if regime(s) == kind]))
        for kind in kinds
    }
    judged["all"] = asdict(errors([(cost.step(shape), seconds) for shape, seconds in pairs]))
    print(judged)
    return {"saturation": saturation, "steps": judged, "results": runs}


if __name__ == "__main__":
    main()
