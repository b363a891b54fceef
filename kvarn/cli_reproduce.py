"""`kvarn reproduce`: an experiment of a technique, at the scale of this machine."""

from typing import Annotated

import typer

from kvarn.bench.experiments import MODULES, TEXTS

Name = Annotated[str, typer.Argument(help=", ".join((*TEXTS, *MODULES)))]
Model = Annotated[
    str | None, typer.Option("--model", help="name, folder or file (default: the experiment's own)")
]
ToFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="write the result")]


def add_reproduce(app: typer.Typer) -> None:
    """Add `reproduce` to the program."""
    app.command("reproduce")(_reproduce)


def _reproduce(name: Name, model: Model = None, json: ToFile = None) -> int:
    """A technique beside its rivals or beside what was published, in one run."""
    from kvarn.bench import experiments, record

    experiment = experiments.find(name)
    result = experiment.run(model or experiment.model)
    print("\n".join(experiment.lines(result)))
    record.write(result, json)
    return 0
