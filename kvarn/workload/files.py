"""Rows of a trace file: JSON lines, a JSON list, or CSV, gzipped or not, each with its line."""

import csv
import gzip
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from kvarn.core.errors import ConfigError


class BadRow(ValueError):
    """A row that is not what its format promises; the message says why."""


def rows(path: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(line, row) of a file; what cannot be parsed comes as a `BadRow` in its place."""
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode()
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if path.removesuffix(".gz").endswith(".csv"):
        reader = csv.DictReader(StringIO(text))
        yield from ((reader.line_num, row) for row in reader)
    elif text.lstrip().startswith("["):
        yield from _listed(text, path)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _object(line)


def _object(line: str) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line)
    except ValueError as error:
        return BadRow(f"not JSON ({error})")
    return row if isinstance(row, dict) else BadRow("not a JSON object")


def _listed(text: str, path: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Entries of a JSON list, numbered from 1: such files have no lines to speak of."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    for number, row in enumerate(found, 1):
        yield number, row if isinstance(row, dict) else BadRow("not a JSON object")


def number(row: dict[str, Any], key: str, least: float = 0.0) -> float:
    """A number of a row, at least `least`."""
    try:
        value = float(row[key])
    except (TypeError, ValueError, OverflowError):
        raise BadRow(f"{key} is {row[key]!r}, not a number") from None
    except KeyError:
        raise BadRow(f"{key} is missing") from None
    if not least <= value < float("inf"):
        raise BadRow(f"{key} is {value:g}; it must be at least {least:g} and finite")
    return value


def count(row: dict[str, Any], key: str, least: int = 0) -> int:
    """A whole number of a row, at least `least`."""
    value = number(row, key, least)
    if value != int(value):
        raise BadRow(f"{key} is {value:g}, not a whole number")
    return int(value)
