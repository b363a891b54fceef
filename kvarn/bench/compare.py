"""`kvarn bench compare`: results side by side, only where they may be compared.

Two measurements give ratios; a simulation and measurements of the same workload give the errors of
the prediction, beside what repeated measurements differ by among themselves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kvarn.bench.stats import percentile
from kvarn.core.errors import ConfigError

#: fields that describe a run and do not measure it
NOT_MEASURED = (
    "bench", "date", "device", "versions", "git_commit", "workload", "config", "runs", "latencies",
    "percentiles", "num_prompts", "request_rate", "burstiness", "max_concurrency", "results",
    "input_lens", "output_lens", "start_times", "queue_times", "ttfts", "itls", "batch_size",
)  # fmt: skip
#: what identifies a workload in a result of another tool, which has no `workload`
FOREIGN = ("num_prompts", "request_rate", "burstiness", "max_concurrency")
#: results that predict: of `kvarn sim`, and of `bench policies` (its first policy)
PREDICTING = ("sim", "policies")
#: largest relative errors of a prediction that counts as good
LIMITS = {
    "mean_ttft_ms": 0.10, "mean_tpot_ms": 0.05, "output_throughput": 0.03, "p99_ttft_ms": 0.15,
    "p99_tpot_ms": 0.15,
}  # fmt: skip
#: of a load generator, without meaning for a simulation
CLIENT_ONLY = ("backend", "temperature")


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


@dataclass(slots=True)
class Judged:
    """One measure of a prediction beside repeated measurements."""

    name: str
    predicted: float
    measured: float  #: mean of the repeats
    spread: float | None  #: (max - min) / mean of the repeats; None for a single run
    bars: tuple[float, float] | None  #: [p5, p95] of the prediction, if it has them

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool | None:
        """Whether the error is no larger than the spread; None where that is unknown."""
        return None if self.spread is None else abs(self.error) <= self.spread

    @property
    def good(self) -> bool:
        """Whether the error keeps the limit."""
        return abs(self.error) <= LIMITS[self.name]


def split(results: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The simulation and the measurements; None if nothing among the results is simulated."""
    guesses = [one for one in results if one.get("bench") in PREDICTING]
    if not guesses or len(guesses) == len(results) == 2:
        return None
    if len(guesses) > 1:
        raise ConfigError(f"one simulation can be compared with measurements, not {len(guesses)}")
    real = [one for one in results if one.get("bench") not in PREDICTING]
    for one in real:
        if one.get("bench", "serve") != "serve":
            raise ConfigError(f"a simulation predicts bench serve, not bench {one['bench']}")
    if not real:
        raise ConfigError("a prediction needs at least one measurement to compare with")
    return guesses[0], real


def unlike(guess: dict[str, Any], real: Sequence[dict[str, Any]]) -> list[str]:
    """How the workloads of a simulation and of measurements differ."""
    found = [line for one in real[1:] for line in mismatches(real[0], one)]
    left, right = guess.get("workload") or {}, real[0].get("workload") or real[0]
    shared = left.keys() & right.keys() - set(CLIENT_ONLY)
    found += [
        f"{key}: {left[key]} (simulated) and {right[key]} (measured)"
        for key in sorted(shared)
        if left[key] != right[key]
    ]
    if right.get("max_concurrency") is not None:
        found.append(f"max_concurrency: none (simulated) and {right['max_concurrency']} (measured)")
    if right.get("ignore_eos") is False:
        found.append("ignore_eos: answers of full length (simulated) and False (measured)")
    asked = "requests", left.get("requests"), real[0].get("num_prompts")
    tokens = (
        (name, guess.get(name), real[0].get(name))
        for name in ("total_input_tokens", "total_output_tokens")
        if name in guess and name in real[0]
    )
    for name, simulated, measured in (asked, *tokens):
        if simulated != measured:
            found.append(f"{name}: {simulated} (simulated) and {measured} (measured)")
    return found


def judged(guess: dict[str, Any], real: Sequence[dict[str, Any]]) -> list[Judged]:
    """Every limited measure of the prediction beside the mean of the measurements."""
    if guess.get("bench") == "policies":
        values, drawn = guess["nominal"][0], guess["drawn"][0]
        names = [name for name in LIMITS if name in values]
    else:
        values, drawn, names = guess, [], list(LIMITS)
    rows = []
    for name in names:
        predicted = _value(values, name, "the simulation")
        seen = [_value(one, name, f"measurement {i}") for i, one in enumerate(real, 1)]
        mean = fmean(seen)
        if mean <= 0:
            raise ConfigError(f"{name} was measured as {mean:g}: no error relative to it")
        spread = (max(seen) - min(seen)) / mean if len(seen) > 1 else None
        ordered = sorted(one[name] for one in drawn)
        bars = (percentile(ordered, 5), percentile(ordered, 95)) if ordered else None
        rows.append(Judged(name, predicted, mean, spread, bars))
    return rows


def prediction_lines(rows: Sequence[Judged], repeats: int) -> Iterator[str]:
    """Prediction against measurement as a table."""
    heads = ("predicted", "measured", "error", "spread", "inside", "limit", "verdict")
    yield f"{'':18}" + "".join(f"{head:>11}" for head in heads) + "  [p5, p95] of the prediction"
    for row in rows:
        cells = (
            f"{row.predicted:.4g}", f"{row.measured:.4g}", f"{row.error:+.1%}",
            "-" if row.spread is None else f"{row.spread:.1%}",
            "-" if row.inside is None else "yes" if row.inside else "no",
            f"{LIMITS[row.name]:.0%}", "pass" if row.good else "fail",
        )  # fmt: skip
        bars = "" if row.bars is None else f"  [{row.bars[0]:.4g}, {row.bars[1]:.4g}]"
        yield f"{row.name:18}" + "".join(f"{text:>11}" for text in cells) + bars
    yield f"means of {repeats} measured run{'s' if repeats > 1 else ''}"


def _value(result: dict[str, Any], name: str, where: str) -> float:
    value = result.get(name)
    if not isinstance(value, int | float):
        hint = "; run it with --percentiles 50,90,95,99" if name.startswith("p99") else ""
        raise ConfigError(f"{where} holds no {name}{hint}")
    return float(value)
