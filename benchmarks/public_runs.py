"""Four real vLLM runs beside their simulations: with layer tables of the same GPU, or a roofline.

vLLM 0.19 with 300 ShareGPT requests (LLMServingSim `bench/examples`). Where no tables of the model
were published, the roofline alone prices the steps, and the result says so.
"""

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvarn.bench.options import Fleet
from kvarn.bench.sim_fleet import find_spec, make_control
from kvarn.bench.sim_load import requests_of
from kvarn.bench.validation import errors, simulated_times, times
from kvarn.cluster import fleet
from kvarn.cluster.router.round_robin import RoundRobin
from kvarn.cluster.routing import Routing
from kvarn.core.errors import ConfigError
from kvarn.cost.build import cost_model, kv_capacity
from kvarn.cost.moe import MoEShape
from kvarn.cost.shape import CostModel
from kvarn.cost.tables import from_table
from kvarn.kv.sizing import pages_for_bytes
from kvarn.models.shapes import named_shape
from kvarn.sim.instance import Instance
from kvarn.sim.run import Outcome, Tally
from kvarn.sim.simulation import Simulation
from kvarn.workload.load import open_trace
from kvarn.workload.trace import Trace, TraceRequest

Row = dict[str, Any]


@dataclass(slots=True, frozen=True)
class Run:
    """How a run is simulated."""

    model: str
    device: str
    content: str  #: data set by its model, for tokens differ
    tables: str = ""  #: family of layer tables; "": the roofline
    tp: int = 1
    instances: int = 1
    moe: MoEShape | None = None  #: what one instance has of the experts
    unpriced: str = ""  #: what the simulation leaves out


#: Qwen3-30B-A3B-Instruct-2507: the config.json of its repository; its MLP is experts in all layers
A3B = replace(
    named_shape("qwen3-32b"), name="qwen3-30b-a3b", n_layers=48, hidden=2048, ffn=6144, n_heads=32,
    n_kv_heads=4, max_len=262_144,
)  # fmt: skip
SPECS = {A3B.name: A3B}
LLAMA, QWEN = (f"sharegpt_{name}_300_sps10.jsonl.gz" for name in ("llama-3.1-8b", "qwen3-32b"))
RUNS = {
    "vllm_RTX4090_Llama-3.1-8B": Run("llama-3.1-8b", "rtx4090", LLAMA, "llmservingsim_RTX4090_"),
    "vllm_RTXPRO6000_Llama-3.1-8B": Run(
        "llama-3.1-8b", "rtxpro6000", LLAMA, "llmservingsim_RTXPRO6000_"
    ),
    # Two attention ranks, each with half of the 128 experts: a rank computes topk rows of experts
    # for each token of its own, among its 64, just as often as half of topk of everybody's tokens.
    "vllm_RTXPRO6000_Qwen3-30B-A3B-Instruct-2507": Run(
        A3B.name, "rtxpro6000", QWEN, instances=2, moe=MoEShape(64, 8, 768, 48),
        unpriced="exchange of rows between the two ranks, and that they wait for each other",
    ),
    "vllm_RTXPRO6000_Qwen3-32B": Run(
        "qwen3-32b", "rtxpro6000", QWEN, tp=2,
        unpriced="how far sums over PCIe stay below the link's rate",
    ),
}  # fmt: skip
HOSTS = (0.0, 0.5e-3, 1e-3, 2e-3)  #: host time of a step, tried on every run alike [s]
BLOCKS = (0.8, 0.9, 1.0, 1.1)  #: shares of the block count


def lines(path: Path) -> list[Row]:
    """Rows of a compressed JSON-lines file."""
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def measured_times(rows: list[Row]) -> list[tuple[float, float, float, int]]:
    """A run's requests on one clock: the least delay from arrival to the queue ties the two."""
    shift = min(row["queued_ts"] - row["arrival_time"] for row in rows)
    return [
        (row["arrival_time"] + shift, row["first_token_ts"], row["last_token_ts"],
         row["output_toks"])
        for row in rows
    ]  # fmt: skip


def run_trace(folder: Path, rows: list[Row], name: str) -> Trace:
    """The run's requests: its arrival times and lengths, the data set's contents by order."""
    content = open_trace(str(folder / name))
    by_number = sorted(rows, key=lambda row: int(row["request_id"].rpartition("-")[2]))
    for row, one in zip(by_number, content, strict=True):
        if row["input_toks"] != one.n_in:
            raise ConfigError(f"{row['request_id']}: {row['input_toks']} tokens, not {one.n_in}")
    first = min(row["arrival_time"] for row in rows)
    made = [
        TraceRequest(
            row["request_id"], row["arrival_time"] - first, one.n_in, row["output_toks"],
            one.blocks,
        )
        for row, one in zip(by_number, content, strict=True)
    ]  # fmt: skip
    return Trace(content.name, tuple(sorted(made, key=lambda r: r.at)), content.block_size)


def simulated(fleet_: Fleet, trace: Trace, cost: CostModel, loop: Any = None) -> Outcome:
    """Simulate a fleet; `loop` is `(requests, after)` in place of the trace's arrivals."""
    spec, tally = SPECS.get(fleet_.model) or find_spec(fleet_.model), Tally(keep_gaps=False)
    instances = [
        Instance(f"engine-{i}", make_control(fleet_, spec, trace), cost, tally)
        for i in range(fleet_.instances)
    ]
    policy = Routing(RoundRobin(), fleet.Fleet(fleet_.instances))
    requests, after = loop or (requests_of(trace), None)
    return Simulation(requests, instances, policy, tally, after).run()


def served(folder: Path, name: str) -> Row:
    """One vLLM run beside its simulation."""
    run = RUNS[name]
    rows = lines(folder / "bench" / f"{name}_requests.jsonl.gz")
    meta = json.loads((folder / "bench" / f"{name}_meta.json").read_text())
    flags, blocks = meta["engine_kwargs"], meta.get("kv_cache", {}).get("num_gpu_blocks", 0)
    options = Fleet(
        model=run.model, device=run.device, tp=run.tp, instances=run.instances, page_size=16,
        max_seqs=flags["max_num_seqs"], budget=flags["max_num_batched_tokens"],
        max_len=flags["max_model_len"] or 0, pages=blocks,
    )  # fmt: skip
    about: Row = {"run": name, "measured": times(measured_times(rows))}
    about["pages_source"] = "measured" if blocks else "formula"
    trace = run_trace(folder, rows, run.content)
    found = by_tables if run.tables else by_roofline
    return about | found(folder, run, options, trace, about["measured"])


def by_tables(folder: Path, run: Run, options: Fleet, trace: Trace, truth: Row) -> Row:
    """With the GPU's layer tables, and what host time and block count change."""
    spec = find_spec(run.model)

    def predict(host: float, pages: int) -> tuple[Row, Outcome]:
        cost = from_table(folder / "perf", spec, device=run.tables, host=host)
        outcome = simulated(replace(options, pages=pages), trace, cost)
        return errors(times(simulated_times(outcome.records)), truth), outcome

    _, outcome = predict(0.0, options.pages)
    pages = outcome.instances[0].control.kv.pages[0]
    return {
        "predicted": times(simulated_times(outcome.records)), "pages": pages,
        "preemptions": outcome.instances[0].control.stats().preemptions,
        "by_host": [{"host": h, "error": predict(h, pages)[0]} for h in HOSTS],
        "by_blocks": [
            {"share": s, "error": predict(0.0, round(s * pages))[0]} for s in BLOCKS
        ],
    }  # fmt: skip


def by_roofline(folder: Path, run: Run, options: Fleet, trace: Trace, truth: Row) -> Row:
    """With peaks alone: nothing of this model was measured on this GPU."""
    spec = SPECS.get(run.model) or find_spec(run.model)
    cost = cost_model(spec, device=run.device, tp=run.tp, moe=run.moe)
    room = kv_capacity(spec, device=run.device, tp=run.tp, moe=run.moe)
    groups, size = spec.groups(), options.page_size
    pages = pages_for_bytes(groups, room, size, 2, options.budget, options.max_seqs, 1 << 40)
    outcome = simulated(replace(options, pages=pages), trace, cost)
    predicted = times(simulated_times(outcome.records))
    return {
        "predicted": predicted, "pages": pages, "unpriced": run.unpriced,
        "preemptions": sum(one.control.stats().preemptions for one in outcome.instances),
        "roofline": errors(predicted, truth),
    }  # fmt: skip


def transferred(runs: list[Row]) -> Row:
    """The host time that fits the first run's TPOT best, judged on the others."""
    first, *others = [run for run in runs if "by_host" in run]
    best = min(first["by_host"], key=lambda row: abs(row["error"]["tpot"]["mean"]))
    judged = {
        run["run"]: next(r["error"] for r in run["by_host"] if r["host"] == best["host"])
        for run in others
    }
    return {"host": best["host"], "calibrated_on": first["run"], "errors": judged}
