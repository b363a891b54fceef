"""`kvarn bench compare`: two results side by side, as ratios, only where they may be compared."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

#: fields that describe a run and do not measure it
NOT_MEASURED = (
    "bench", "date", "device", "versions", "git_commit", "workload", "config", "runs", "latencies",
    "percentiles", "num_prompts", "request_rate", "burstiness", "max_concurrency", "results",
    "input_lens", "output_lens", "start_times", "queue_times", "ttfts", "itls", "batch_size",
)  # fmt: skip
#: what identifies a workload in a result of another tool, which has no `workload`
FOREIGN = ("num_prompts", "request_rate", "burstiness", "max_concurrency")


@dataclass(slots=True)
class Row:
    """One measure of both results."""

    name: str
    a: float
    b: float

    @property
    def ratio(self) -> float | None:
        """b / a; None where a is 0."""
        return self.b / self.a if self.a else None


def mismatches(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Why the two results may not be compared: what differs between their workloads."""
    if a.get("bench", "serve") != b.get("bench", "serve"):
        return [f"bench: {a.get('bench')} and {b.get('bench')}"]
    if "workload" in a and "workload" in b:
        left, right = a["workload"], b["workload"]
    else:
        left, right = ({key: found.get(key) for key in FOREIGN} for found in (a, b))
    return [
        f"{key}: {left.get(key)} and {right.get(key)}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def warnings(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What weakens the comparison: other devices, models, failed requests."""
    found = []
    for key in ("cpu", "cores", "gpus"):
        left, right = ((result.get("device") or {}).get(key) for result in (a, b))
        if left != right:
            found.append(f"the devices differ: {key} {left} and {right}")
    if a.get("model_id") != b.get("model_id"):
        found.append(f"the models differ: {a.get('model_id')} and {b.get('model_id')}")
    for name, result in (("a", a), ("b", b)):
        if result.get("failed"):
            found.append(f"{result['failed']} requests of {name} failed")
    return found


def rows(a: dict[str, Any], b: dict[str, Any]) -> list[Row]:
    """Every measure that both results hold."""
    left, right = dict(_measures(a)), dict(_measures(b))
    return [Row(name, left[name], right[name]) for name in left if name in right]


def _measures(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in result.items():
        if key not in NOT_MEASURED and isinstance(value, int | float):
            yield prefix + key, float(value)
    for row in result.get("results") or ():
        name = row.get("workload", row.get("batch_size", ""))
        yield from _measures(row, f"{name} ")
    steady = result.get("steady")
    if isinstance(steady, dict):
        yield from _measures(
            {key: steady[key] for key in steady if key not in ("start", "end")}, "steady "
        )
