"""`kvarn profile`: step times of this machine, for cost models and the simulator."""

from typing import Annotated, Any

import typer

from kvarn.bench.profile import Profile
from kvarn.cli_options import chosen, takes
from kvarn.core.config import EngineConfig

Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="the same as --model")]
ToFile = Annotated[str, typer.Option("--json", metavar="FILE", help="where the profile goes")]


def add_profile(app: typer.Typer) -> None:
    """Add `profile` to the program."""
    app.command("profile")(_profile)


@takes(engine=EngineConfig, how=Profile)
def _profile(
    engine: dict[str, Any],
    how: dict[str, Any],
    name: Model = None,
    json: ToFile = "profile.json",
) -> int:
    """Measure step times over a grid of batch shapes, for the cost model of simulations."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from kvarn.bench import profile, record
    from kvarn.cli_model import open_llm

    options = Profile(**how)
    profile.check(options)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal
    bar = Progress(*columns, console=console, transient=True, disable=hidden)
    with open_llm(chosen(engine, name)) as llm, bar:
        task = bar.add_task("steps", total=None)

        def watch(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = profile.run(llm, options, watch)
    record.write(result, json)
    print("\n".join(profile_lines(result)))
    print(f"written to {json}")
    return 0


def profile_lines(result: dict[str, Any]) -> list[str]:
    """The profile as a table."""
    lines = [f"{'prefill rows':>24}{'decodes':>9}{'mean context':>14}{'ms':>12}{'repeats':>9}"]
    for row in result["rows"]:
        chunks = [f"{rows}@{context - rows}" for rows, context in row["chunks"]]
        shown = f"{len(chunks)} x {chunks[0]}" if len(chunks) > 1 else "".join(chunks)
        mean = row["decode_sum"] / row["n_decode"] if row["n_decode"] else 0
        lines.append(
            f"{shown:>24}{row['n_decode']:9d}{mean:14.0f}{1000 * row['seconds']:12.3f}"
            f"{len(row['times']):9d}"
        )
    if result["skipped"]:
        lines.append(f"{result['skipped']} shapes had no time left: allow more --seconds")
    return lines
