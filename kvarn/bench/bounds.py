"""How far a simulated run is from what no policy could beat (`kvarn sim --bounds`)."""

from dataclasses import replace
from typing import Any

from kvarn.bench.options import Fleet
from kvarn.core.errors import ConfigError
from kvarn.cost.shape import CostModel, StepShape
from kvarn.sim.run import Outcome
from kvarn.theory.bounds import lower_bounds
from kvarn.workload.trace import Trace

#: bound -> where the run's own value lies in the result, and its unit's factor
VALUES = {
    "mean_e2e": ("mean_e2el_ms", 1e-3),
    "mean_ttft": ("mean_ttft_ms", 1e-3),
    "makespan": ("duration", 1.0),
    "output_tokens_per_s": ("output_throughput", 1.0),
    "hit_rate_unlimited": ("prefix_hit_rate", 1.0),
    "hit_rate": ("prefix_hit_rate", 1.0),
}


def check(fleet: Fleet) -> None:
    """Raise `ConfigError` for a fleet that bounds say nothing of."""
    if fleet.speculate != "none":
        raise ConfigError(
            f"bounds hold for one token a step, not for speculate={fleet.speculate}: leave one out"
        )


def distances(
    fleet: Fleet, result: dict[str, Any], outcome: Outcome, trace: Trace
) -> dict[str, dict[str, float]]:
    """By bound: the bound, the run's value, and value / bound."""
    if result["failed"]:
        raise ConfigError(
            f"bounds hold for runs in which every request completes; {result['failed']} failed"
        )
    n, cost = len(outcome.instances), outcome.instances[0].cost
    kv = outcome.instances[0].control.kv
    found = lower_bounds(
        [replace(one, n_out=max(1, one.n_out)) for one in trace],
        kv_tokens=n * kv.pages[0] * kv.page_size,
        seconds_per_round=cost.step(StepShape((), 1, 1, 1, 1)).seconds,
        peak_tokens_per_s=n * peak_rate(cost, fleet.budget),
        max_seqs=n * fleet.max_seqs,
        block_size=trace.block_size,
        shared=fleet.prefix != "none",
    )
    rows = {}
    for name, (key, factor) in VALUES.items():
        if name in found:
            value, bound = result[key] * factor, found[name]
            rows[name] = {"bound": bound, "value": value, "ratio": value / bound if bound else 1.0}
    return rows


def peak_rate(cost: CostModel, budget: int) -> float:
    """Most positions a second that an instance computes, at the best size of a step [tokens/s]."""
    sizes = {budget} | {1 << i for i in range(budget.bit_length())}
    best = 0.0
    for size in sizes:
        prompts = cost.step(StepShape(((size, size),), 0, 0, 0, 1)).seconds
        many = cost.step(StepShape((), size, size, 1, 0)).seconds
        best = max(best, size / min(prompts, many))
    return best
