"""Bringing and loading the model of a command, with progress on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from kvarn.core.config import EngineConfig, Resolved


def fetch(config: EngineConfig) -> None:
    """Bring the default model to this machine if it is asked for and not there yet."""
    from kvarn.models.pull import ALIASES

    if config.load != "random" and config.model.lower() in ALIASES:
        pull_with_bar(config.model)


def pull_with_bar(name: str) -> Path:
    """Path of a model, with a progress bar while it is fetched (nothing when it is there)."""
    from kvarn.models.pull import pull

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(name, total=None, visible=False)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total or None, description=what, visible=True)

        return pull(name, progress)


def tokenizer_of(resolved: Resolved) -> Any:
    """The tokenizer of the model that the options name; None for random weights."""
    from kvarn.models.load import load_tokenizer, locate

    config = resolved.config
    return None if config.load == "random" else load_tokenizer(locate(config.model))


@contextmanager
def open_llm(resolved: Resolved) -> Iterator[Any]:
    """The engine of a command: model brought here, loaded, and closed at the end."""
    fetch(resolved.config)
    console = Console(stderr=True)
    with console.status(f"loading {resolved.config.model}"):
        from kvarn.engine.llm import LLM

        given = {
            name: getattr(resolved.config, name)
            for name, origin in resolved.origins.items()
            if origin.source == "flag"
        }
        llm = LLM(**given)  # what the environment says, it reads itself
    try:
        yield llm
    finally:
        llm.close()
