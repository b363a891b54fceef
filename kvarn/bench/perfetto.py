"""Steps of simulated instances as a trace for ui.perfetto.dev (Chrome's JSON trace format).

A track for the steps of each instance and counters for its queue, its batch and its KV pages.
"""

import json
from pathlib import Path
from typing import Any

from kvarn.core.errors import ConfigError
from kvarn.sim.run import Outcome, StepRow


def write(outcome: Outcome, path: str) -> None:
    """Write the trace; times are virtual, in microseconds."""
    try:
        Path(path).write_text(json.dumps({"traceEvents": events(outcome)}))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def events(outcome: Outcome) -> list[dict[str, Any]]:
    """Trace events of all instances; needs an outcome that kept its steps."""
    numbers = {one.name: i + 1 for i, one in enumerate(outcome.instances)}
    found: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        for name, pid in numbers.items()
    ]
    for row in outcome.steps or ():
        pid, at = numbers[row.instance], row.start / 1000
        found.append(
            {
                "ph": "X",
                "name": _kind(row),
                "pid": pid,
                "tid": 1,
                "ts": at,
                "dur": (row.end - row.start) / 1000,
                "args": {
                    "rows of prompts and drafts": row.shape.n_tokens - row.shape.n_decode,
                    "decodes": row.shape.n_decode,
                    "attended by decodes": row.shape.decode_sum,
                },
            }
        )
        for name, value in (
            ("running", row.running), ("waiting", row.waiting), ("pages held", row.held)
        ):  # fmt: skip
            found.append(
                {"ph": "C", "name": name, "pid": pid, "ts": row.end / 1000, "args": {name: value}}
            )
    return found


def _kind(row: StepRow) -> str:
    if row.shape.n_logits > row.shape.n_seqs:
        return "verify"
    if not row.shape.chunks:
        return "decode"
    return "mixed" if row.shape.n_decode else "prefill"
