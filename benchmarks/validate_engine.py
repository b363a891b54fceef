"""Does the simulator predict this machine? Trust protocol T2 (steps) and T3 (whole runs).

    python benchmarks/validate_engine.py cpu|h100|h200 [--pool slack|thrashing] [--json FILE]

An engine serves random requests in real time and writes a step log. A cost model is fitted to the
steps of some runs; steps of other runs, and the times of their requests, are predicted with it and
the engine's own number of pages, below and beyond saturation, with room for the KV of every
sequence and without. Training runs are taken in turn with judged ones, so that a machine whose
speed drifts is judged at the speed it was learnt at. Every load is served `REPEATS` times: what
the repeats differ by among themselves is the least that an error means. The machine must be quiet.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import msgspec

from kvarn.bench import record, sim
from kvarn.bench.options import Fleet
from kvarn.bench.stats import percentile
from kvarn.core.config import resolve
from kvarn.core.request import Request, SamplingParams
from kvarn.cost.fitted import Errors, Step, errors, fit, regime
from kvarn.cost.shape import CostModel, Estimate, shape_of
from kvarn.engine.engine import Engine
from kvarn.engine.garbage import paced
from kvarn.sim.heap import NS
from kvarn.workload.trace import Trace, TraceRequest

REPEATS = 5
LOADS = (0.5, 0.9, 1.1, 1.5)  #: of the rate at which the engine is just busy
IDLE = 0.005  #: a longer pause between steps is waiting for requests [s]
AROUND = 50  #: steps on either side that tell the machine's speed at the moment
Row = dict[str, float]
Guess = tuple[Estimate, float, str]  #: a step's predicted and measured time [s], its regime


@dataclass(slots=True, frozen=True)
class Setup:
    """A machine and what it serves."""

    device: str  #: of the simulated fleet; only names it, for times are fitted
    options: dict[str, Any]  #: of the engine
    requests: int  #: of a run
    inputs: tuple[int, int]  #: shortest and longest prompt [tokens]
    outputs: tuple[int, int]  #: shortest and longest answer [tokens]
    scarce: int  #: pages with which sequences are preempted


#: without overlap a log's steps follow each other, so that their times need no guess
SETUPS = {
    "cpu": Setup(
        "CPU", {"model": "smollm2-135m", "pages": 1200, "max_len": 512, "max_seqs": 32},
        60, (16, 256), (8, 64), 160,
    ),
    "h100": Setup(
        "H100",
        {
            "model": "llama-3.1-8b", "load": "random", "max_len": 4096, "max_seqs": 64,
            "device": "cuda", "overlap": "off",
        },
        60, (64, 2048), (16, 256), 2000,
    ),
}  # fmt: skip
SETUPS["h200"] = replace(SETUPS["h100"], device="H200", scarce=500)


def make_trace(setup: Setup, rate: float, seed: int) -> Trace:
    """Requests that share nothing; `rate` 0: all at once."""
    rng, at, requests = Random(seed), 0.0, []
    for i in range(setup.requests):
        at += rng.expovariate(rate) if rate else 0.0
        n_in, n_out = rng.randrange(*setup.inputs), rng.randrange(*setup.outputs)
        requests.append(TraceRequest(f"{seed}.{i}", at, n_in, n_out))
    return Trace("synthetic", tuple(requests), 16, (f"rate {rate:g}, seed {seed}",))


def requests_of(trace: Trace) -> list[Request]:
    """With their words, which take a loop of Python to make: not one that serves."""
    rng, found = Random(trace.chain[0]), list[Request]()
    for one in trace:
        prompt = [rng.randrange(300, 40000) for _ in range(one.n_in)]
        params = SamplingParams(max_tokens=one.n_out, ignore_eos=True, temperature=0)
        found.append(Request(one.id, prompt, params, arrival=one.at))
    return found


class Served:
    """An engine, and how far its log has been read."""

    def __init__(self, options: dict[str, Any], log: Path) -> None:
        self.log, self.read = str(log), 0  # [bytes]
        self.engine = Engine(resolve(options | {"step_log": self.log}))

    def serve(self, trace: Trace) -> tuple[Row, list[Step]]:
        """The trace in real time; what T3 compares, and the steps with their wall times."""
        engine, due, rows = self.engine, requests_of(trace), list[Row]()
        before, start = engine.stats().preemptions, engine.clock()
        with paced():
            while due or engine.has_work:
                now = engine.clock()
                while due and start + due[0].arrival <= now:
                    one = due.pop(0)
                    engine.add(replace(one, arrival=start + one.arrival))
                if not engine.has_work:
                    time.sleep(max(0.0, start + due[0].arrival - engine.clock()))
                for output in engine.step():
                    if output.finish is not None:
                        first, total = output.timings.first_token, output.timings.total
                        each = (total - first) / max(1, output.n_output - 1)
                        end = engine.clock() - start
                        rows.append({"ttft": first, "tpot": each, "e2e": total, "end": end})
        engine.reset_prefix_cache()
        found = summary(rows) | {"preemptions": engine.stats().preemptions - before}
        return found, self._steps()

    def _steps(self) -> list[Step]:
        """Steps since the last call: from one plan to the next, waiting left out."""
        with open(self.log, "rb") as file:
            file.seek(self.read)
            lines = file.readlines()
            self.read = file.tell()
        return list(steps_of([msgspec.json.decode(line) for line in lines]))


def steps_of(log: list[dict[str, Any]]) -> Iterator[Step]:
    """Steps of a log that computed something; the pause after one counts as the mean pause."""
    plan, applied, after, rows = None, 0.0, list[float](), list[Step]()
    for one in log:
        if one["call"] == "plan":
            if plan is not None and one["now"] - applied < IDLE:
                after.append(one["now"] - applied)
            plan = one
        elif one["call"] == "apply" and plan is not None and plan["plan"]["spans"]:
            spans = plan["plan"]["spans"]
            shape = shape_of((start, length, wants) for _, start, length, _, wants in spans)
            applied = one["now"]
            rows.append((shape, applied - plan["now"]))
    pause = fmean(after)
    return ((shape, seconds + pause) for shape, seconds in rows[3:])  # the first warm up


def predict(setup: Setup, engine: Engine, trace: Trace, cost: CostModel) -> Row:
    """The same requests in virtual time, with the engine's limits and the pages that it has."""
    config = engine.resolved.config
    fleet = Fleet(
        model=config.model, device=setup.device, pages=engine.control.kv.pages[0],
        page_size=config.page_size, max_len=config.max_len, max_seqs=config.max_seqs,
        budget=config.budget, overlap=config.overlap,
    )  # fmt: skip
    outcome = sim.simulate(fleet, engine.spec, trace, cost=cost)
    rows = []
    for one in outcome.records:
        assert one.end is not None and one.first is not None
        rows.append(
            {
                "ttft": (one.first - one.arrival) / NS, "e2e": (one.end - one.arrival) / NS,
                "tpot": (one.end - one.first) / NS / max(1, one.n_out - 1), "end": one.end / NS,
            }
        )  # fmt: skip
    preemptions = outcome.instances[0].control.stats().preemptions
    return summary(rows) | {"preemptions": preemptions}


def summary(rows: list[Row]) -> Row:
    """What T3 compares [s, requests/s]."""
    ttft = sorted(row["ttft"] for row in rows)
    tpot = sorted(row["tpot"] for row in rows)
    return {
        "mean_ttft": fmean(ttft), "p99_ttft": percentile(ttft, 99),
        "mean_tpot": fmean(tpot), "p99_tpot": percentile(tpot, 99),
        "throughput": len(rows) / max(row["end"] for row in rows),
    }  # fmt: skip


def validate(setup: Setup, only: str | None, folder: Path) -> Iterator[dict[str, Any]]:
    """Both protocols, with room for the KV of all sequences and then with too little."""
    pools = {"slack": setup.options, "thrashing": setup.options | {"pages": setup.scarce}}
    judged, level, runs = list[Guess](), list[Guess](), list[dict[str, Any]]()
    about = dict[str, Any]()
    for pool, options in pools.items():
        if only not in (None, pool):
            continue
        served = Served(options, folder / f"{pool}.jsonl")
        served.serve(make_trace(setup, 0.0, 0))  # warms up
        burst, training = served.serve(make_trace(setup, 0.0, 1))
        saturation = burst["throughput"]
        traces = {
            load: make_trace(setup, load * saturation, 10 + i) for i, load in enumerate(LOADS)
        }
        real: dict[float, list[Row]] = {load: [] for load in LOADS}
        steps = list[Step]()
        for repeat in range(REPEATS):
            training += served.serve(make_trace(setup, saturation, 100 + repeat))[1]
            for load, trace in traces.items():
                row, more = served.serve(trace)
                real[load].append(row)
                steps += more
        cost = fit(training)
        guesses = [(cost.step(shape), seconds, regime(shape)) for shape, seconds in steps]
        judged += guesses
        level += steady(guesses)
        for load, trace in traces.items():
            runs += compare(pool, load, predict(setup, served.engine, trace, cost), real[load])
        about[pool] = {"saturation": saturation, "pages": served.engine.control.kv.pages[0]}
        served.engine.close()
        found = {"steps": by_regime(judged), "steady": by_regime(level)}
        yield {"pools": about, **found, "results": runs}


def compare(pool: str, load: float, guess: Row, real: list[Row]) -> Iterator[dict[str, Any]]:
    """Prediction beside the repeats, by measure."""
    for name, value in guess.items():
        seen = [one[name] for one in real]
        mean = fmean(seen)
        row = {"pool": pool, "load": load, "measure": name, "predicted": value, "measured": mean}
        if mean:
            row |= {"error": value / mean - 1, "spread": (max(seen) - min(seen)) / mean}
        print(row, flush=True)
        yield row


def steady(guesses: list[Guess]) -> list[Guess]:
    """The same steps as if the machine had kept its speed: its drift, which is the median error of
    the steps around each, is divided out of what was measured."""
    off = [seconds / guess.seconds for guess, seconds, _ in guesses]
    around = [median(off[max(0, i - AROUND) : i + AROUND + 1]) for i in range(len(off))]
    return [(guess, seconds / by, kind) for (guess, seconds, kind), by in zip(guesses, around)]


def by_regime(judged: list[Guess]) -> dict[str, Any]:
    """T2: errors of steps that the fit did not see, by regime and of all."""
    kinds: dict[str, list[tuple[Estimate, float]]] = {}
    for guess, seconds, kind in judged:
        kinds.setdefault(kind, []).append((guess, seconds))
        kinds.setdefault("all", []).append((guess, seconds))
    found: dict[str, Errors] = {kind: errors(pairs) for kind, pairs in sorted(kinds.items())}
    print(found)
    return {kind: asdict(one) for kind, one in found.items()}


def main() -> None:
    """One machine; the report goes to the screen and to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setup", choices=SETUPS)
    parser.add_argument(
        "--pool", choices=("slack", "thrashing"), help="default: one, then the other"
    )
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    setup = SETUPS[given.setup]
    about = {
        "requests": setup.requests, "repeats": REPEATS, "inputs": setup.inputs,
        "outputs": setup.outputs, "loads": LOADS,
    }  # fmt: skip
    header = record.header(f"sim_{given.setup}", about, setup.options)
    with tempfile.TemporaryDirectory() as folder:
        for result in validate(setup, given.pool, Path(folder)):
            record.write(header | result, given.json)


if __name__ == "__main__":
    main()
