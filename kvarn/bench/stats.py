"""Mean, median, standard deviation and percentiles, as `vllm bench` names and defines them."""

import math
from collections.abc import Sequence
from statistics import fmean


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` percent lie, by linear interpolation; `ordered` ascends."""
    if not ordered:
        return 0.0
    at = (len(ordered) - 1) * share / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(values: Sequence[float]) -> float:
    """The middle value; 0 for no values."""
    return percentile(sorted(values), 50)


def label(share: float) -> str:
    """'p99' for 99, 'p99.9' for 99.9."""
    return f"p{int(share) if share == int(share) else share}"


def summary(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """`mean_`, `median_`, `std_` and `pNN_` of one measure, in milliseconds; 0 for no values."""
    ordered = sorted(value * 1000 for value in seconds)
    mean = fmean(ordered) if ordered else 0.0
    spread = math.sqrt(fmean([(v - mean) ** 2 for v in ordered])) if ordered else 0.0
    found = {
        f"mean_{name}_ms": mean,
        f"median_{name}_ms": percentile(ordered, 50),
        f"std_{name}_ms": spread,
    }
    for share in percentiles:
        found[f"{label(share)}_{name}_ms"] = percentile(ordered, share)
    return found
