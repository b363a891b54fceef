"""Mean, median, standard deviation and percentiles, as `vllm bench` names and defines them."""

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

#: values of an array that are Python objects at a time
CHUNK = 1 << 16


def percentile(ordered: Sequence[float] | NDArray[np.float64], share: float) -> float:
    """The value below which `share` percent lie, by linear interpolation; `ordered` ascends."""
    if not len(ordered):
        return 0.0
    at = (len(ordered) - 1) * share / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (at - low))


def mean_of(values: NDArray[np.float64]) -> float:
    """The mean, its sum rounded once: whatever the order; 0 for no values."""
    if not len(values):
        return 0.0
    chunks = (values[at : at + CHUNK].tolist() for at in range(0, len(values), CHUNK))
    return math.fsum(chain.from_iterable(chunks)) / len(values)


def median(values: Sequence[float]) -> float:
    """The middle value; 0 for no values."""
    return percentile(sorted(values), 50)


def label(share: float) -> str:
    """'p99' for 99, 'p99.9' for 99.9."""
    return f"p{int(share) if share == int(share) else share}"


def summary(
    name: str, seconds: Sequence[float] | NDArray[np.float64], percentiles: Sequence[float]
) -> dict[str, float]:
    """`mean_`, `median_`, `std_` and `pNN_` of one measure, in milliseconds; 0 for no values."""
    ordered = np.sort(np.asarray(seconds, np.float64) * 1000)
    mean = mean_of(ordered)
    spread = math.sqrt(mean_of((ordered - mean) ** 2))
    found = {
        f"mean_{name}_ms": mean,
        f"median_{name}_ms": percentile(ordered, 50),
        f"std_{name}_ms": spread,
    }
    for share in percentiles:
        found[f"{label(share)}_{name}_ms"] = percentile(ordered, share)
    return found
