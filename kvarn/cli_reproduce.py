"""`kvarn reproduce`: an experiment of a technique, at the scale of this machine."""

from typing import Annotated

import typer

Name = Annotated[str, typer.Argument(help="suffix-decoding, gammatune")]
Model = Annotated[str, typer.Option("--model", help="name, folder or file of the model")]
ToFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="write the result")]


def add_reproduce(app: typer.Typer) -> None:
    """Add `reproduce` to the program."""
    app.command("reproduce")(_reproduce)


def _reproduce(name: Name, model: Model = "smollm2-135m", json: ToFile = None) -> int:
    """Compare a technique with plain decoding and its best static rivals, in one run."""
    from kvarn.bench import record, reproduce

    result = reproduce.run(name, model)
    print("\n".join(reproduce.lines(result)))
    record.write(result, json)
    return 0
