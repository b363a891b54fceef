"""A fleet by its options: the shape of its model, its price list, control planes and router.

Pages are what `--pages` says (the number that a real engine measured) or what a formula leaves
beside the weights.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from kvarn.bench.options import Fleet
from kvarn.bench.sim_drafts import draft_prices, speculating, waits_for_host
from kvarn.bench.sim_report import MOST_GAPS
from kvarn.cluster.router import Router
from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.core.part import find
from kvarn.cost.build import cost_model, kv_capacity
from kvarn.cost.devices import find_device
from kvarn.cost.perturb import Perturbed
from kvarn.cost.precision import precision
from kvarn.cost.roofline import Host
from kvarn.cost.rounded import Rounded
from kvarn.cost.shape import CostModel
from kvarn.kv.sizing import pages_by_group, pages_for_bytes
from kvarn.models.hf_config import spec_from_config
from kvarn.models.json_file import read_json
from kvarn.models.shapes import named_shape
from kvarn.schedule.build import build_control
from kvarn.schedule.control import Capacity, ControlPlane
from kvarn.sim.instance import Instance
from kvarn.sim.run import Tally
from kvarn.sparse.rules import Rules, split
from kvarn.workload.trace import Trace

UNLIMITED = 1 << 40  #: pages that no memory bounds


def find_spec(model: str) -> ModelSpec:
    """The shape of a model: a folder or file with its config, or a name."""
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    return spec_from_config(read_json(path), model) if path.is_file() else named_shape(model)


def tally_of(trace: Trace) -> Tally:
    """What watches a simulation of it, in bounded memory."""
    return Tally(keep_gaps=sum(one.n_out for one in trace) <= MOST_GAPS)


def instances_of(
    fleet_: Fleet, spec: ModelSpec, trace: Trace, cost: CostModel, tally: Tally
) -> list[Instance]:
    """The fleet, idle."""
    ahead = overlaps(fleet_)
    names = [f"{spec.name}-{i}" for i in range(fleet_.instances)]
    if fleet_.speculate == "none":
        return [
            Instance(name, make_control(fleet_, spec, trace), cost, tally, overlap=ahead)
            for name in names
        ]
    late = cost
    if ahead:
        late = as_wrong(cost, price_list(replace(fleet_, overlap="off"), spec, waits_for_host()))
    drafting = draft_prices(
        fleet_, cost, lambda name: as_wrong(cost, draft_price_list(fleet_, spec, name))
    )
    return [
        speculating(
            fleet_, name, make_control(fleet_, spec, trace), (cost, late), tally, drafting, ahead
        )
        for name in names
    ]


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


def price_list(fleet_: Fleet, spec: ModelSpec, host: Host | None = None) -> CostModel:
    """The cost model of one instance; `host`: of the roofline's steps, if not its own."""
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
        host=host,
    )
    return Rounded(exact, fleet_.round_context) if fleet_.round_context else exact


def as_wrong(cost: CostModel, other: CostModel) -> CostModel:
    """The `other` prices, wrong by what those of `cost` are wrong by on purpose."""
    return Perturbed(other, cost.factors) if isinstance(cost, Perturbed) else other


def draft_price_list(fleet_: Fleet, spec: ModelSpec, name: str) -> CostModel:
    """The cost model of a drafting model: on one device of the instance, its weights as they are.

    Its passes are replayed one behind the other, so that the host's part of them is hidden.
    """
    drafter = find_spec(name)
    if drafter.vocab != spec.vocab:
        raise ConfigError(
            f"draft_model {name!r} has a vocabulary of {drafter.vocab} tokens and {spec.name} one "
            f"of {spec.vocab}: a drafter must share the model's"
        )
    return price_list(replace(fleet_, tp=1, quantization="none", overlap="on"), drafter)


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
    if fleet_.draft_model:  # it has weights, and a page for each of the model's
        drafter = find_spec(fleet_.draft_model)
        numbers = precision(find_device(fleet_.device), fleet_.dtype, "none", "auto")
        memory -= int(numbers.weight_bytes(drafter, None))
        groups = [*groups, *drafter.groups()]
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
