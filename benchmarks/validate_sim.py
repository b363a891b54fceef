"""The simulator against measurements: four real vLLM runs, and end-to-end points of H100 and H200.

    python benchmarks/validate_sim.py TRACES_FOLDER [--json FILE] [--images docs/img]

Runs: `public_runs.py`. Points: AIConfigurator's `silicon_sample.csv`, Llama-3.1 on vLLM, simulated
as a closed loop with its kernel tables. Nothing is fitted, but for one line that takes the host
time of one run to the other and says so.
"""

import argparse
import csv
import gzip
import statistics
from functools import cache
from pathlib import Path
from typing import Any

from public_runs import RUNS, Row, served, simulated, transferred

from kvarn.bench import record
from kvarn.bench.options import Fleet
from kvarn.bench.sim_fleet import find_spec
from kvarn.bench.validation import SHORTEST, WAVES, closed_loop, simulated_times, times
from kvarn.core.errors import ConfigError
from kvarn.cost.rounded import Rounded
from kvarn.cost.shape import CostModel, StepShape
from kvarn.cost.tables import from_table
from kvarn.workload.trace import Trace

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"tpot": 0.10, "e2e": 0.10}  #: of the means of the runs
POINT_LIMITS = {"tpot": 0.15, "ttft": 0.30}  #: of the median over the points
BUDGET = 8192  #: tokens of a step, of the published server
#: KV format. 70B: `kv-cache-dtype: fp8` in InferenceMAX's `70b_fp8_{h100,h200}_slurm.sh`. The
#: sample does not say how the 8B points were measured: the server's default.
KV = {"llama-3.1-70b": "fp8", "llama-3.1-8b": "bfloat16"}
ROUND = 32  #: contexts of decodes in closed loops are priced rounded to this [tokens]


def wanted(row: Row) -> bool:
    """A point that the kernel tables cover: Llama-3.1 on vLLM, one kind of worker."""
    return (
        "Llama-3.1" in row["model_path"] and row["backend"] == "vllm" and row["mode"] == "agg"
        and row["system"] in ("h100_sxm", "h200_sxm") and row["pp_size"] == "1"
    )  # fmt: skip


@cache
def kernels(folder: Path, model: str, system: str, tp: int, gemm: str, kv: str) -> CostModel:
    """Kernel tables, read once for all points that they price."""
    spec = find_spec(model)
    return from_table(folder / "perf", spec, device=system, tp=tp, gemm=gemm, kv=kv)


def prefill_load(cost: CostModel, row: Row) -> float:
    """Share of the time that prompts alone would take at the measured rate, in the fastest way.

    By Little's law the point's concurrency and times give its rate of prompts; the tables give the
    time of a step full of whole prompts. Above 1 these kernels cannot have computed the prompts.
    """
    isl, osl, n = int(row["isl"]), int(row["osl"]), int(row["batch_size"])
    n_in, n_out = (round((1 + SHORTEST) / 2 * length) for length in (isl, osl))
    spent = float(row["silicon_ttft_ms"]) + (n_out - 1) * float(row["silicon_tpot_ms"])
    whole = max(1, BUDGET // n_in)
    seconds = cost.step(StepShape(((n_in, n_in),) * whole, n_logits=whole)).seconds / whole
    return n / (spent / 1000) * seconds


def point(folder: Path, row: Row) -> Row:
    """One measured point beside its closed loop, and what its steady decode is made of."""
    model = "llama-3.1-8b" if "8B" in row["model_path"] else "llama-3.1-70b"
    tp, concurrency = int(row["tp_size"]), int(row["batch_size"])
    isl, osl = int(row["isl"]), int(row["osl"])
    kv = KV[model]
    exact = kernels(folder, model, row["system"], tp, row["gemm_quant_mode"], kv)
    options = Fleet(
        model=model, device=row["system"].partition("_")[0], tp=tp, quantization=row["precision"],
        max_seqs=concurrency, page_size=16, prefix="none", budget=BUDGET,
        kv_dtype="fp8" if kv == "fp8" else "auto",
    )  # fmt: skip
    first, after = closed_loop(concurrency, isl, osl)
    outcome = simulated(options, Trace("closed loop", ()), Rounded(exact, ROUND), (first, after))
    found = times(simulated_times(outcome.records))
    about = {"model": model, "device": row["system"], "tp": tp, "concurrency": concurrency}
    return about | {
        "isl": isl, "osl": osl, "precision": row["precision"], "id": row["id"],
        "measured": {"ttft": float(row["silicon_ttft_ms"]), "tpot": float(row["silicon_tpot_ms"])},
        "predicted": {key: 1000 * found[key]["mean"] for key in ("ttft", "tpot")},
        "prefill_load": prefill_load(exact, row),
        "missing_ms": float(row["silicon_tpot_ms"]) - 1000 * found["tpot"]["mean"],
    }  # fmt: skip


def groups(points: list[Row]) -> list[Row]:
    """Median absolute and signed errors by model, device and tp, by model, and of all."""
    keyed: dict[tuple[Any, ...], list[Row]] = {("all", "", ""): points}
    for one in points:
        for key in ((one["model"], "", ""), (one["model"], one["device"], one["tp"])):
            keyed.setdefault(key, []).append(one)
    found = []
    for (model, device, tp), members in sorted(keyed.items(), key=str):
        row: Row = {"model": model, "device": device, "tp": tp, "points": len(members)}
        for key, limit in POINT_LIMITS.items():
            off = [one["predicted"][key] / one["measured"][key] - 1 for one in members]
            row[f"{key}_median_error"] = statistics.median(map(abs, off))
            row[f"{key}_bias"] = statistics.median(off)
            row[f"{key}_within"] = row[f"{key}_median_error"] <= limit
        row["prefill_load"] = statistics.median(one["prefill_load"] for one in members)
        row["missing_ms"] = statistics.median(one["missing_ms"] for one in members)
        found.append(row)
    return found


def scatter(points: list[Row], folder: Path) -> None:
    """Predicted over measured, log-log, one point a configuration."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kvarn"
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for key in POINT_LIMITS:
        figure, axes = pyplot.subplots(figsize=(4.5, 4.5))
        for name in sorted({(one["model"], one["device"]) for one in points}):
            some = [one for one in points if (one["model"], one["device"]) == name]
            axes.plot(
                [one["measured"][key] for one in some], [one["predicted"][key] for one in some],
                "o", markersize=3, label=" ".join(name),
            )  # fmt: skip
        ends = [f(one["measured"][key] for one in points) for f in (min, max)]
        axes.plot(ends, ends, "k-", linewidth=0.7)
        axes.set(xscale="log", yscale="log", xlabel=f"measured {key} [ms]",
                 ylabel=f"simulated {key} [ms]")  # fmt: skip
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(folder / f"sim_{key}.svg", metadata={"Date": None})


def main() -> None:
    """Run everything, print as it goes, write one result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--json", default=str(ROOT / "benchmarks/results/sim_validation.json"))
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "img")
    given = parser.parse_args()
    runs = []
    for name in RUNS:
        runs.append(served(given.traces, name))
        print(name, runs[-1].get("by_host", runs[-1].get("roofline")), flush=True)
    with gzip.open(given.traces / "bench" / "aic_silicon_sample.csv.gz", "rt") as file:
        rows = [row for row in csv.DictReader(file) if wanted(row)]
    points, refused = [], []
    for row in rows:
        try:
            points.append(point(given.traces, row))
        except ConfigError as why:
            refused.append({"id": row["id"], "why": str(why)})
    by_group = groups(points)
    print(*by_group, *refused, sep="\n")
    scatter(points, given.images)
    result = record.header(
        "sim_validation", {"limits": LIMITS, "point_limits": POINT_LIMITS},
        {"waves": WAVES, "shortest": SHORTEST, "round": ROUND, "host": 0.0},
    )  # fmt: skip
    result |= {"runs": runs, "transferred": transferred(runs), "groups": by_group}
    record.write(result | {"points": points, "refused": refused}, given.json)


if __name__ == "__main__":
    main()
