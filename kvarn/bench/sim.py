"""`kvarn sim`: what a fleet would do, in virtual time, under the names of `bench serve`'s results.

The fleet is described by data only: a named shape or a config.json, a device, a cost model. Pages
are what `--pages` says (the number that a real engine measured) or what a formula leaves beside the
weights; the result says which.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kvarn.bench.checks import check_fleet, check_traffic
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.bench.sim_load import ClosedLoop, find_trace, requests_of
from kvarn.bench.sim_report import MOST_GAPS, report
from kvarn.cluster import fleet
from kvarn.cluster.router import Router
from kvarn.cluster.routing import Routing
from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.core.part import find
from kvarn.cost.build import cost_model, kv_capacity
from kvarn.cost.rounded import Rounded
from kvarn.cost.shape import CostModel
from kvarn.kv.sizing import pages_by_group, pages_for_bytes
from kvarn.models.hf_config import spec_from_config
from kvarn.models.json_file import read_json
from kvarn.models.shapes import named_shape
from kvarn.schedule.build import build_control
from kvarn.schedule.control import Capacity, ControlPlane
from kvarn.sim.instance import Instance
from kvarn.sim.run import Outcome, Tally
from kvarn.sim.simulation import Simulation
from kvarn.sparse.rules import Rules, split
from kvarn.workload.trace import Trace

UNLIMITED = 1 << 40  #: pages that no memory bounds


@dataclass(slots=True)
class Simulated:
    """A result as `bench serve` writes it, and what it came from."""

    result: dict[str, Any]
    outcome: Outcome
    trace: Trace


def run(fleet_: Fleet, work: Workload, traffic: Traffic) -> Simulated:
    """Simulate a fleet under the load that the options describe."""
    check_fleet(fleet_)
    check_traffic(traffic)
    return measured(fleet_, work, traffic, find_trace(work, traffic))


def measured(fleet_: Fleet, work: Workload, traffic: Traffic, trace: Trace) -> Simulated:
    """Simulate a fleet under `trace`, and report it."""
    spec = find_spec(fleet_.model)
    began = time.perf_counter()
    with uncollected():
        outcome = simulate(
            fleet_, spec, trace, keep_steps=traffic.perfetto is not None,
            closed_loop=traffic.closed_loop, keep_pages=traffic.plots is not None,
        )  # fmt: skip
        result = report(fleet_, work, traffic, trace, outcome)
    result["wall_seconds"] = time.perf_counter() - began
    return Simulated(result, outcome, trace)


def find_spec(model: str) -> ModelSpec:
    """The shape of a model: a folder or file with its config, or a name."""
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    return spec_from_config(read_json(path), model) if path.is_file() else named_shape(model)


def simulate(
    fleet_: Fleet, spec: ModelSpec, trace: Trace, keep_steps: bool = False,
    cost: CostModel | None = None, closed_loop: bool = False, keep_pages: bool = False,
) -> Outcome:  # fmt: skip
    """Run a trace through the fleet, priced by its own cost model or by `cost`."""
    check_fleet(fleet_)
    cost = cost or price_list(fleet_, spec)
    tokens = sum(one.n_out for one in trace)
    tally = Tally(
        steps=[] if keep_steps else None, keep_gaps=tokens <= MOST_GAPS,
        page_use={} if keep_pages else None,
    )  # fmt: skip
    instances = [
        Instance(
            f"{spec.name}-{i}",
            make_control(fleet_, spec, trace),
            cost,
            tally,
            overlap=overlaps(fleet_),
        )
        for i in range(fleet_.instances)
    ]
    policy = Routing(make_router(fleet_, trace), fleet.Fleet(fleet_.instances))
    if closed_loop:
        loop = ClosedLoop(trace)
        simulation = Simulation(loop.first(), instances, policy, tally, loop.after)
    else:
        simulation = Simulation(requests_of(trace), instances, policy, tally)
    with uncollected():
        return simulation.run()


@contextmanager
def uncollected() -> Iterator[None]:
    """Nobody looks for cycles: none are made for long, and looking costs a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def price_list(fleet_: Fleet, spec: ModelSpec) -> CostModel:
    """The cost model of one instance."""
    exact = cost_model(
        spec,
        device=fleet_.device,
        tp=fleet_.tp,
        dtype=fleet_.dtype,
        quantization=fleet_.quantization,
        kv_dtype=fleet_.kv_dtype,
        source=fleet_.cost,
        table=fleet_.table,
        overlap=overlaps(fleet_),
    )
    return Rounded(exact, fleet_.round_context) if fleet_.round_context else exact


def overlaps(fleet_: Fleet) -> bool:
    """Whether instances plan the next step while one runs."""
    if fleet_.overlap not in ("auto", "on", "off"):
        raise ConfigError(f"overlap must be auto, on or off, not {fleet_.overlap!r}")
    return fleet_.overlap == "on" or (fleet_.overlap == "auto" and fleet_.device.lower() != "cpu")


def page_size_of(fleet_: Fleet, trace: Trace) -> int:
    """Positions of a page: what was asked, else the trace's own blocks, else the engine's 16."""
    blocks = any(request.blocks for request in trace.requests[:100])
    return fleet_.page_size or (trace.block_size if blocks and trace.block_size > 1 else 16)


def make_control(fleet_: Fleet, spec: ModelSpec, trace: Trace) -> ControlPlane:
    """The control plane of one instance, as the engine would build it."""
    groups, size = split(spec.groups(), fleet_.sparsity), page_size_of(fleet_, trace)
    full = fleet_.pages or pages_by_formula(fleet_, spec, size)
    pages = pages_by_group(groups, full, size, fleet_.budget, fleet_.max_seqs)
    longest = min(fleet_.max_len or spec.max_len, full * size)
    capacity = Capacity(fleet_.budget, fleet_.max_seqs, longest, fleet_.max_queue)
    rules = Rules(groups, size, fleet_.sparsity)
    return build_control(
        groups, pages, size, fleet_.scheduler, fleet_.prefix, fleet_.evict, capacity,
        keeps=rules.keeps, selects=rules.selects, filters=rules.filters,
    )  # fmt: skip


def pages_by_formula(fleet_: Fleet, spec: ModelSpec, size: int) -> int:
    """Pages in the memory beside the weights, where no engine measured them."""
    memory = kv_capacity(
        spec, device=fleet_.device, tp=fleet_.tp, dtype=fleet_.dtype,
        quantization=fleet_.quantization,
    )  # fmt: skip
    wide = 1 if fleet_.kv_dtype == "fp8" else 4 if fleet_.dtype == "float32" else 2
    groups = split(spec.groups(), fleet_.sparsity)
    pages = pages_for_bytes(groups, memory, size, wide, fleet_.budget, fleet_.max_seqs, UNLIMITED)
    if pages < 1:
        raise ConfigError(
            f"{spec.name} leaves no memory for KV on {fleet_.tp} x {fleet_.device}; raise tp, or "
            f"take a smaller number format"
        )
    return pages


def make_router(fleet_: Fleet, trace: Trace) -> Router:
    """The router by name; a prefix-aware one thinks in the trace's pages."""
    part: Any = find("router", fleet_.router)
    if fleet_.router == "prefix_aware":
        part = part(block=max(page_size_of(fleet_, trace), 16))
    else:
        part = part()
    return cast(Router, part)
