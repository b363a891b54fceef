"""`kvarn explain` and `kvarn parts`: what is in force and why, and what there is to choose from."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_explanation(found: dict[str, Any], as_json: bool) -> None:
    """Options, parts, capabilities, memory and start-up times of an engine."""
    if as_json:
        print(json.dumps(found))
        return
    options = [
        (row["option"], f"{row['value']} {row['unit']}".strip(), row["source"], row["why"])
        for row in found["options"]
    ]
    console = _console()
    _table(console, "Options", ("option", "value", "from", "why"), options)
    for title, key in (
        ("Parts", "parts"), ("Capabilities", "capabilities"), ("Ranks", "ranks"),
        ("Execution", "execution"), ("Memory", "memory"), ("Start-up", "startup"),
    ):  # fmt: skip
        _rows(console, title, found[key])


def print_parts(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Every known part: what it needs, what it gives, and where it wins and loses."""
    if as_json:
        print(json.dumps(rows))
    else:
        _rows(_console(), "Parts", rows)


def _console() -> Console:
    """The terminal; through a pipe, lines long enough not to be folded."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def _rows(console: Console, title: str, rows: Sequence[Any]) -> None:
    """A table of dicts with equal keys, or of plain words."""
    if not rows:
        return
    if not isinstance(rows[0], dict):
        _table(console, title, ("name",), [(row,) for row in rows])
        return
    names = tuple(rows[0])
    _table(console, title, names, [tuple(row.get(name) for name in names) for row in rows])


def _table(
    console: Console, title: str, names: tuple[str, ...], rows: Sequence[tuple[Any, ...]]
) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)
    console.print()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
