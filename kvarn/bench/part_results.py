"""What was measured of each part, as `benchmarks/part_results.py` wrote it."""

import json
from pathlib import Path

FILE = Path(__file__).with_name("part_results.json")


def results() -> dict[tuple[str, str], str]:
    """The result of each measured part, in words, by kind and name."""
    rows = json.loads(FILE.read_text())
    return {(row["kind"], row["name"]): f"{row['result']} ({row['file']})" for row in rows}
