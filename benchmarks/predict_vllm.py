"""Predict public vLLM runs from per-layer tables of the same GPUs, and say how far off.

    python benchmarks/predict_vllm.py TRACES_FOLDER [--json FILE]

Two of the four public runs of LLMServingSim's repository can be predicted: Llama-3.1-8B on an RTX
4090 and on an RTX PRO 6000, whose layers were measured. (The other two, Qwen3-32B on two GPUs and
Qwen3-30B with experts, have no tables.) The requests are the run's own: arrivals, lengths, shared
blocks; so are the limits of a batch, and the number of KV blocks where the run recorded it. The
scheduler is kvarn's: decodes first, then prompts, in chunks, as in vLLM 0.19; a preempted request
is computed again. Nothing is fitted to the runs. The tables hold no host time; the rows with some
show how much it would change.
"""

import argparse
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvarn.bench import record, sim
from kvarn.bench.options import Fleet
from kvarn.bench.stats import percentile
from kvarn.cost.tables import from_table
from kvarn.sim.heap import NS
from kvarn.workload.load import open_trace
from kvarn.workload.trace import Trace

RUNS = ("RTX4090", "RTXPRO6000")
HOSTS = (0.0, 0.002)  #: what the device waits for the host each step [s]: none, and a case
MEASURES = ("ttft", "tpot", "e2e")


def measured(path: Path) -> list[dict[str, float]]:
    """TTFT, TPOT and E2E of each request of a run, from when the engine had it [s]."""
    found = []
    with gzip.open(path, "rt") as file:
        for line in file:
            row = json.loads(line)
            first, last, queued = row["first_token_ts"], row["last_token_ts"], row["queued_ts"]
            found.append(
                {
                    "arrival": row["arrival_time"], "n_out": row["output_toks"],
                    "n_in": row["input_toks"], "ttft": first - queued, "e2e": last - queued,
                    "tpot": (last - first) / max(1, row["output_toks"] - 1),
                }
            )  # fmt: skip
    return found


def the_trace(folder: Path, rows: list[dict[str, float]]) -> Trace:
    """The run's requests: contents of the workload file, times of the run."""
    trace = open_trace(str(folder / "sharegpt_llama-3.1-8b_300_sps10.jsonl.gz"))
    start = min(row["arrival"] for row in rows)
    requests = []
    for one, row in zip(trace, rows, strict=True):
        assert (one.n_in, one.n_out) == (row["n_in"], row["n_out"]), "the same order of requests"
        requests.append(replace(one, at=row["arrival"] - start))
    ordered = sorted(requests, key=lambda one: one.at)
    return trace.changed("arrivals of the run", tuple(ordered))


def predicted(folder: Path, gpu: str, trace: Trace, meta: dict[str, Any], host: float) -> Any:
    """Outcome of the simulated run, and its pages."""
    said = meta["engine_kwargs"]
    pages = (meta.get("kv_cache") or {}).get("num_gpu_blocks", 0)
    fleet = Fleet(
        model="llama-3.1-8b", device=gpu, max_seqs=said["max_num_seqs"], pages=pages,
        budget=said["max_num_batched_tokens"], page_size=16,
    )  # fmt: skip
    spec = sim.find_spec(fleet.model)
    cost = from_table(folder / "perf", spec, device=gpu, host=host)
    return sim.simulate(fleet, spec, trace, cost=cost), pages


def compare(rows: list[dict[str, float]], outcome: Any) -> dict[str, float]:
    """Relative errors of means, medians and 99th percentiles, and of the throughput."""
    ours: dict[str, list[float]] = {name: [] for name in MEASURES}
    for one in outcome.records:
        assert one.end is not None and one.first is not None, "every request completes"
        ours["ttft"].append((one.first - one.arrival) / NS)
        ours["e2e"].append((one.end - one.arrival) / NS)
        ours["tpot"].append((one.end - one.first) / NS / max(1, one.n_out - 1))
    found = {}
    for name, values in ours.items():
        theirs = [row[name] for row in rows]
        for label, reduce in (("mean", mean), ("p50", at(50)), ("p99", at(99))):
            found[f"{label}_{name}_ms"] = reduce(theirs) * 1000
            found[f"{label}_{name}_error"] = reduce(values) / reduce(theirs) - 1
    ends = [row["arrival"] + row["e2e"] for row in rows]
    span = max(ends) - min(row["arrival"] for row in rows)
    last = max(one.end for one in outcome.records) / NS
    found["throughput_error"] = span / last - 1
    return found


def mean(values: list[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def at(share: float) -> Any:
    """A percentile."""
    return lambda values: percentile(sorted(values), share)


def main() -> None:
    """Both runs, with and without host time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    results = []
    for gpu in RUNS:
        stem = given.traces / "bench" / f"vllm_{gpu}_Llama-3.1-8B"
        rows = measured(Path(f"{stem}_requests.jsonl.gz"))
        meta = json.loads(Path(f"{stem}_meta.json").read_text())
        for host in HOSTS:
            outcome, pages = predicted(given.traces, gpu, the_trace(given.traces, rows), meta, host)
            engine = outcome.instances[0]
            row = {
                "run": f"{gpu}, Llama-3.1-8B", "host_ms": host * 1000,
                "pages": engine.control.kv.pages[0], "pages_source": "run" if pages else "formula",
                "preemptions": engine.control.stats().preemptions,
                "measured_share": max(0.0, 1 - engine.unmeasured / (engine.busy / NS)),
            } | compare(rows, outcome)  # fmt: skip
            results.append(row)
            print(json.dumps(row, indent=1), flush=True)
    header = record.header("sim_vllm", {"runs": RUNS}, {"vllm": "0.19.0"})
    record.write(header | {"results": results}, given.json)


if __name__ == "__main__":
    main()
