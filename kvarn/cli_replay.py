"""`kvarn replay`: does the decision code decide again as it did?"""

import json
from dataclasses import asdict
from typing import Annotated

import typer

Log = Annotated[str, typer.Argument(metavar="LOG", help="written by an engine with --step-log")]
AsJSON = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


def add_replay(app: typer.Typer) -> None:
    """Add `replay` to the program."""
    app.command("replay")(_replay)


def _replay(log: Log, as_json: AsJSON = False) -> int:
    """Feed a recorded run to the simulator's control plane: every decision must be the same."""
    from kvarn.sim.replay import replay

    report = replay(log)
    stats = report.stats
    assert stats is not None
    if as_json:
        print(json.dumps(asdict(report)))
        return int(report.differing > 0)
    for difference in report.shown:
        print(difference)
    if report.truncated:
        print("the log ends in the middle of a record, which was left out")
    kinds = [f"{count} {kind}" for kind, count in sorted(report.regimes.items())]
    print(f"steps: {', '.join(kinds) or 'none'}")
    print(
        f"{stats.preemptions} preemptions, {stats.cached_tokens} of {stats.prompt_tokens} prompt "
        f"tokens from the prefix cache, {report.forks} forks, {report.aborts} aborts"
    )
    print(f"{report.steps} steps, {report.differing} differ")
    return int(report.differing > 0)
