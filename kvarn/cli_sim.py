"""`kvarn sim`: a cluster in virtual time."""

from typing import Annotated, Any

import typer

from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.cli_bench import serve_lines
from kvarn.cli_options import takes

ToFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="write the result")]
Bounds = Annotated[bool, typer.Option("--bounds", help="print the distance to what is possible")]


def add_sim(app: typer.Typer) -> None:
    """Add `sim` to the program."""
    app.command("sim")(_sim)


@takes(fleet=Fleet, traffic=Traffic, work=Workload)
def _sim(
    fleet: dict[str, Any],
    traffic: dict[str, Any],
    work: dict[str, Any],
    json: ToFile = None,
    bounds: Bounds = False,
) -> int:
    """Simulate a cluster of engines: the same scheduler, cache and router, priced steps."""
    from kvarn.bench import perfetto, record, sim
    from kvarn.bench.bounds import distances

    fleet_, traffic_ = Fleet(**fleet), Traffic(**traffic)
    done = sim.run(fleet_, Workload(**work), traffic_)
    result = done.result
    if traffic_.perfetto is not None:
        perfetto.write(done.outcome, traffic_.perfetto)
    if bounds:
        result["bounds"] = distances(fleet_, result, done.outcome, done.trace)
    record.write(result, json)
    lines = serve_lines(result, traffic_.percentiles) + sim_lines(result)
    print("\n".join(lines))
    return 0 if result["completed"] else 1


def sim_lines(result: dict[str, Any]) -> list[str]:
    """What only a simulation knows."""
    lines = [
        f"prefix hits {result['prefix_hit_rate']:.1%}, {result['preemptions']} preemptions, "
        f"{result['energy_j'] / 1000:.1f} kJ, instances busy {result['utilisation']:.1%}",
        f"priced by {result['cost_model']}: {result['measured_share']:.1%} of the time lies inside "
        f"measured data",
        f"{result['pages']} KV pages of {result['page_size']} positions ({result['pages_source']})",
        f"{result['steps']} steps simulated in {result['wall_seconds']:.1f} s",
    ]
    for name, row in result.get("bounds", {}).items():
        value, bound, ratio = row["value"], row["bound"], row["ratio"]
        lines.append(f"{name:22}{value:12.4g}, bound {bound:.4g} ({ratio:.3f} of it)")
    return lines
