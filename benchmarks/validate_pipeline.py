"""A real pipeline beside its prediction: retrieval over 100,000 vectors, then SmolLM2, on a CPU.

    python benchmarks/validate_pipeline.py [--json FILE]

A thread searches all vectors for every question (one at a time, one core); the engine answers with
what was found on another core. Time of a search and of steps come from runs that are not judged,
which alternate with those that are. The machine must be quiet.
"""

import argparse
import queue
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import msgspec
import numpy as np
from validate_engine import steps_of

from kvarn.bench import record
from kvarn.bench.options import Fleet
from kvarn.bench.pipeline_cluster import Cluster
from kvarn.bench.stats import percentile
from kvarn.core.config import resolve
from kvarn.core.request import Request, SamplingParams
from kvarn.cost.fitted import Step, fit
from kvarn.cost.shape import CostModel
from kvarn.engine.engine import Engine
from kvarn.engine.garbage import paced
from kvarn.sim.heap import NS
from kvarn.sim.stations import BatchServer
from kvarn.workload.pipelines import MODEL, Pipeline, Pipelines, Stage

VECTORS, DIM, FOUND = 100_000, 384, 5
REQUESTS, REPEATS, RATE = 40, 4, 2.0  #: of a run; judged runs; arrivals [1/s]
INPUTS, OUTPUTS = (64, 192), (8, 48)  #: shortest and longest [tokens]
TOKENS = (300, 40_000)  #: ids of random prompts
OPTIONS = {
    "model": "smollm2-135m", "device": "cpu", "threads": 1, "pages": 1200, "max_len": 512,
    "max_seqs": 32,
}  # fmt: skip
LIMITS = {"mean": 0.15, "p95": 0.20}  #: of E2E
POLL = 0.0002  #: between looks at the searches while the engine is idle [s]


class Searcher(threading.Thread):
    """Finds the nearest vectors, one question after the other."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        rng = np.random.default_rng(0)
        self.vectors = rng.standard_normal((VECTORS, DIM), dtype=np.float32)
        self.asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.found: deque[int] = deque()
        self.seconds = list[float]()

    def run(self) -> None:
        """Until None is asked."""
        while (request := self.asked.get()) is not None:
            began = time.perf_counter()
            scores = self.vectors @ self.vectors[request]
            np.argpartition(scores, -FOUND)[-FOUND:]
            self.seconds.append(time.perf_counter() - began)
            self.found.append(request)


@dataclass(slots=True)
class Server:
    """An engine behind a searcher."""

    engine: Engine
    searcher: Searcher
    log: Path
    read: int = 0  #: of the log [bytes]

    def serve(self, load: Pipelines) -> list[float]:
        """E2E of every request, in real time [s]."""
        engine, searcher, due = self.engine, self.searcher, deque(enumerate(load))
        rng, arrived, ends = Random(0), dict[str, float](), list[float]()
        start = engine.clock()
        with paced():
            while len(ends) < len(load):
                now = engine.clock()
                while due and start + due[0][1].at <= now:
                    number, one = due.popleft()
                    arrived[one.id] = start + one.at
                    searcher.asked.put(number)
                while searcher.found:
                    one = load.requests[searcher.found.popleft()]
                    stage = one.stages[-1]
                    prompt = [rng.randrange(*TOKENS) for _ in range(stage.n_in)]
                    params = SamplingParams(max_tokens=stage.n_out, ignore_eos=True, temperature=0)
                    engine.add(Request(one.id, prompt, params, arrival=now))
                if not engine.has_work:
                    time.sleep(POLL)
                for output in engine.step():
                    if output.finish is not None:
                        ends.append(engine.clock() - arrived[output.request_id])
        engine.reset_prefix_cache()
        return ends

    def steps(self) -> list[Step]:
        """Steps since the last call, with their wall times."""
        with self.log.open("rb") as file:
            file.seek(self.read)
            lines = file.readlines()
            self.read = file.tell()
        return list(steps_of([msgspec.json.decode(line) for line in lines]))


def make_load(seed: int) -> Pipelines:
    """Questions that share nothing."""
    rng, at, found = Random(seed), 0.0, list[Pipeline]()
    for i in range(REQUESTS):
        at += rng.expovariate(RATE)
        n_in, n_out = rng.randrange(*INPUTS), rng.randrange(*OUTPUTS)
        stages = (Stage("search"), Stage(MODEL, (0,), n_in=n_in, n_out=n_out))
        found.append(Pipeline(f"{seed}.{i}", at, stages))
    return Pipelines(tuple(found), 16)


def predict(engine: Engine, load: Pipelines, cost: CostModel, search: float) -> list[float]:
    """The same in virtual time, with the engine's limits and pages."""
    config = engine.resolved.config
    fleet = Fleet(
        model=config.model, device="CPU", pages=engine.control.kv.pages[0],
        page_size=config.page_size, max_len=config.max_len, max_seqs=config.max_seqs,
        budget=config.budget,
    )  # fmt: skip
    outcome = Cluster(fleet, {"search": BatchServer(lambda works: search)}, cost).run(load)
    return [(one.end - one.arrival) / NS for one in outcome.done() if one.end is not None]


def summary(times: list[float]) -> dict[str, float]:
    """What is compared [s]."""
    return {"mean": fmean(times), "p95": percentile(sorted(times), 95)}


def validate(folder: Path) -> dict[str, Any]:
    """Judged runs beside their predictions."""
    log = folder / "steps.jsonl"
    server = Server(Engine(resolve(OPTIONS | {"step_log": str(log)})), Searcher(), log)
    server.searcher.start()
    load = make_load(1)
    server.serve(replace(load, requests=load.requests[:10]))  # warms up
    server.steps()
    server.searcher.seconds.clear()
    training, judged = list[Step](), list[list[float]]()
    for repeat in range(REPEATS):
        server.serve(make_load(100 + repeat))
        training += server.steps()
        judged.append(server.serve(load))
        server.steps()
    search = fmean(server.searcher.seconds)
    server.searcher.asked.put(None)
    guess = summary(predict(server.engine, load, fit(training), search))
    server.engine.close()
    real = [summary(times) for times in judged]
    rows = []
    for name, limit in LIMITS.items():
        seen = [one[name] for one in real]
        error = guess[name] / fmean(seen) - 1
        rows.append(
            {"measure": f"E2E {name}", "predicted": guess[name], "measured": fmean(seen),
             "error": error, "limit": limit, "spread": (max(seen) - min(seen)) / fmean(seen)}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return {"search_ms": 1000 * search, "results": rows}


def main() -> None:
    """The report goes to the screen and to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    about = {"vectors": VECTORS, "dim": DIM, "requests": REQUESTS, "repeats": REPEATS,
             "rate": RATE, "inputs": INPUTS, "outputs": OUTPUTS}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found = validate(Path(folder))
    record.write(record.header("sim_pipeline", about, OPTIONS) | found, given.json)


if __name__ == "__main__":
    main()
