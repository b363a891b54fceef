"""Markdown tables out of results, and where results and pages lie."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Lines = list[str]


def table(names: list[str], rows: list[list[Any]]) -> Lines:
    """A Markdown table; numbers are rounded to three digits that matter."""
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]


def cell(value: Any) -> str:
    """A value as the page shows it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def columns(result: dict[str, Any], picked: dict[str, str]) -> Lines:
    """A table of the result's rows: picked maps a key to the name of its column."""
    rows = [[row.get(key) for key in picked] for row in result["results"]]
    return table(list(picked.values()), rows)


def percent(share: float) -> str:
    """A relative error."""
    return f"{100 * share:+.1f} %"


def ratio(value: float | None) -> str:
    """A ratio to a thousandth: whether it is above 1 must show."""
    return "-" if value is None else f"{value:.3f}"
