"""Reading measured tables: CSV (gzip or not) as rows, and the few figures of a system file."""

import csv
import gzip
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvarn.core.errors import ConfigError

Row = dict[str, str]


def rows(path: Path, only: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Rows of a CSV file whose fields equal `only`; other rows are not even made into dicts."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the table {path}: {error.strerror}") from None
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    reader = csv.reader(io.StringIO(data.decode()))
    names = next(reader, [])
    missing = [name for name in only or {} if name not in names]
    if missing:
        raise ConfigError(f"{path} has no column {missing[0]!r}; it has: {', '.join(names)}")
    wanted = [(names.index(name), value) for name, value in (only or {}).items()]
    for line in reader:
        if all(line[i] == value for i, value in wanted):
            yield dict(zip(names, line, strict=True))


def number(row: Row, name: str, path: Path) -> float:
    """Field `name` as a number, or an error that names the file."""
    try:
        return float(row[name])
    except KeyError:
        raise ConfigError(f"{path} has no column {name!r}; it has: {', '.join(row)}") from None
    except ValueError:
        raise ConfigError(f"{path}: {name} = {row[name]!r} is no number") from None


def figures(path: Path) -> dict[str, float]:
    """Numbers of the `name: number  # comment` lines of a system file, whatever their section."""
    found: dict[str, float] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the system file {path}: {error.strerror}") from None
    for line in lines:
        name, _, value = line.partition("#")[0].partition(":")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            continue  # a section, a word or a path
    return found
