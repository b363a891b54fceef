"""What a trace is like, in the numbers that traces are published with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvarn.core.errors import ConfigError
from kvarn.workload.reuse import Reuse, reuse
from kvarn.workload.trace import Trace


@dataclass(slots=True, frozen=True)
class LengthStats:
    """A distribution of lengths [tokens]."""

    mean: float
    p50: int
    p90: int
    p99: int
    max: int


@dataclass(slots=True, frozen=True)
class TraceStats:
    """Size, speed, lengths and reuse of a trace."""

    requests: int
    span: float  #: from the first to the last arrival [s]
    rate: float | None  #: requests / span [1/s]; None where nothing has a time
    cv: float | None  #: of the times between arrivals: 1 is Poisson, above is burstier
    n_in: LengthStats
    n_out: LengthStats
    reuse: Reuse | None  #: None where contents are unknown


def describe(trace: Trace) -> TraceStats:
    """All statistics of a trace that has at least one request."""
    if not len(trace):
        raise ConfigError(f"trace {trace.name} has no request to describe")
    return TraceStats(
        requests=len(trace),
        span=trace.span,
        rate=len(trace) / trace.span if trace.span else None,
        cv=gap_cv([one.at for one in trace]),
        n_in=length_stats([one.n_in for one in trace]),
        n_out=length_stats([one.n_out for one in trace]),
        reuse=reuse(trace),
    )


def length_stats(lengths: Sequence[int]) -> LengthStats:
    """Mean, quantiles and maximum of at least one length."""
    ordered = sorted(lengths)
    p50, p90, p99 = (nearest_rank(ordered, share) for share in (0.5, 0.9, 0.99))
    return LengthStats(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def nearest_rank(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of the sorted values do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def gap_cv(times: Sequence[float]) -> float | None:
    """Standard deviation over mean of the gaps between sorted times; None without gaps."""
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps) if gaps else 0.0
    if not mean:
        return None
    return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean
