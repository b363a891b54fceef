"""`kvarn bench policies`: two or more policies in simulation, with error bars on their ratios."""

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
    from rich.console import Console
    from rich.progress import Progress

    from kvarn.bench import error_bars, record

    how = error_bars.Draws(draws, draw_seed, residuals)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("simulations", total=None)
        result = error_bars.run(
            Fleet(**fleet), Workload(**work), Traffic(**traffic), vary, how,
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    record.write(result, json)
    rows = list(error_bars.rows(result))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{text:{wide}}" for text, wide in zip(row, widths, strict=True)).rstrip())
    print(
        f"{draws} draws of {result['source']}; ratio above 1: better than {result['policies'][0]}"
    )
    return 0
