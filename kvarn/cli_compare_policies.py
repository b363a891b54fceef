"""`kvarn bench policies`: two or more policies in simulation, with error bars on their ratios."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.cli_options import takes

ToFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="write the result")]
Vary = Annotated[
    str,
    typer.Option(
        metavar="FIELD=A,B,...", help="an option of the fleet and its values; the first is the base"
    ),
]
Draws = Annotated[int, typer.Option(help="wrong time models that every policy meets")]
DrawSeed = Annotated[int, typer.Option(help="of the draws")]
FromFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="a validation's JSON, whose errors the draws have (default: published)"
    ),
]


@takes(skip=("perfetto", "plots", "label", "detailed", "goodput", "percentiles"),
       fleet=Fleet, traffic=Traffic, work=Workload)  # fmt: skip
def policies(
    fleet: dict[str, Any],
    traffic: dict[str, Any],
    work: dict[str, Any],
    vary: Vary,
    draws: Draws = 30,
    draw_seed: DrawSeed = 0,
    residuals: FromFile = None,
    json: ToFile = None,
) -> int:
    """Does A beat B? Simulated policies, and what is left of their ratios if times are wrong."""
    from kvarn.bench import error_bars, record, sim, sim_load
    from kvarn.bench import residuals as errors
    from kvarn.cost.perturb import draws as draw

    base, load, traffic_ = Fleet(**fleet), Workload(**work), Traffic(**traffic)
    fleets = error_bars.varied(base, vary)
    width = errors.read(residuals)
    spec, trace = sim.find_spec(base.model), sim_load.find_trace(load, traffic_)
    found = error_bars.compare(
        fleets,
        lambda one: sim.price_list(one, spec),
        draw(width.sigma, draws, draw_seed),
        error_bars.simulator(spec, trace, traffic_.closed_loop),
    )
    result = record.header("policies", sim.workload_of(load, traffic_, trace), asdict(base)) | {
        "vary": vary, "draws": draws, "draw_seed": draw_seed, **asdict(width), **asdict(found),
    }  # fmt: skip
    record.write(result, json)
    rows = list(error_bars.rows(found))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{text:{wide}}" for text, wide in zip(row, widths, strict=True)).rstrip())
    print(f"{draws} draws of {width.source}; ratio above 1: better than {found.policies[0]}")
    return 0
