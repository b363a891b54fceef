"""Sections of docs/results.md on the simulator."""

from typing import Any

from cells import Lines, cell, columns, ratio, table


def sim_routers(result: dict[str, Any]) -> Lines:
    """Routers in simulation, and the simulator's own speed."""
    said, big = result["config"], result["large"]
    picked = {
        "speed": "trace speed", "router": "router", "mean_ttft_ms": "mean TTFT ms",
        "p99_ttft_ms": "p99 TTFT ms", "mean_tpot_ms": "mean TPOT ms",
        "prefix_hit_rate": "prefix hits", "best_hit_rate": "best possible",
        "e2e_over_bound": "mean E2E / bound", "energy_j": "energy J", "wall_seconds": "wall s",
    }  # fmt: skip
    return [
        f"{said['instances']} instances of {said['model']} on {said['device']}, priced by the "
        f"{said['cost']} (nothing measured: read the differences, not the times; the "
        f"section below has error bars, for a smaller fleet and part of the trace), "
        f"{result['workload']['trace']}.",
        "",
        *columns(result, picked),
        "",
        f"{big['instances']} instances at {big['rate']:.0f} requests/s for "
        f"{big['virtual_seconds']:.0f} virtual seconds: {cell(big['wall_us_per_request'])} us a "
        f"request, so that an hour takes {cell(big['hour_in_hours'])} hours in one process.",
    ]


def policies(result: dict[str, Any]) -> Lines:
    """Ratios of policies in simulation, with what is left of them when the times are wrong."""
    said, option = result["config"], result["vary"].partition("=")[0]
    rows = [
        [
            one["measure"], one["policy"].removeprefix(f"{option}="), ratio(one["nominal"]),
            f"[{ratio(one['p5'])}, {ratio(one['p95'])}]", one["verdict"],
        ]
        for one in result["claims"]
    ]  # fmt: skip
    base = result["policies"][0].removeprefix(f"{option}=")
    sigmas = ", ".join(f"{term} {cell(wide)}" for term, wide in result["sigma"].items())
    return [
        f"How many times better than {base}, and [p5, p95] of that over {result['draws']} draws of "
        f"a wrong time model that every {option} meets; better only if p5 is above 1 "
        f"([how](cost-model.md#how-far-to-trust-a-conclusion)). {said['instances']} instances of "
        f"{said['model']} on {said['device']}, priced by the {said['cost']}; "
        f"{result['workload']['requests']} requests of {result['workload']['trace']}. "
        f"Log-deviations by term: {sigmas} ({result['source']}).",
        "",
        *table(["measure", option, "ratio", "[p5, p95]", "verdict"], rows),
    ]


def sim_validation(result: dict[str, Any]) -> Lines:
    """Simulated closed loops beside measured end-to-end points."""
    limits = result["workload"]["point_limits"]
    picked = {
        "model": "model", "device": "device", "tp": "tp", "points": "points",
        "tpot_median_error": "median TPOT error", "tpot_bias": "TPOT bias",
        "tpot_within": "within limit", "missing_ms": "TPOT short by ms",
        "ttft_median_error": "median TTFT error", "ttft_bias": "TTFT bias",
        "ttft_within": "within limit ", "prefill_load": "prefill load",
    }  # fmt: skip
    rows = [[row.get(key) for key in picked] for row in result["groups"]]
    return [
        f"Llama-3.1 on vLLM (AIConfigurator's silicon sample) against closed loops priced by "
        f"kernel tables without host time; limits of the median error: TPOT "
        f"{limits['tpot']:.0%}, TTFT {limits['ttft']:.0%}. {len(result['refused'])} points were "
        f"refused. [How, and what is missed](simulator-validation.md). "
        f"Scatter: [TPOT](img/sim_tpot.svg), [TTFT](img/sim_ttft.svg).",
        "",
        *table(list(picked.values()), rows),
    ]
