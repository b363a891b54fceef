"""Probes of a capacity search, each one a whole simulation, and the two searches over them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.bench.sim import measured
from kvarn.workload.trace import Trace

MOST_STEPS = 16  #: doublings or halvings from the first rate before a search gives up
#: what a probe keeps of its simulation's result
KEPT = (
    "attainment", "request_goodput", "request_throughput", "mean_ttft_ms", "p99_ttft_ms",
    "mean_tpot_ms", "p99_tpot_ms", "energy_j", "output_throughput", "completed",
    "failed",
)  # fmt: skip


@dataclass(slots=True)
class Probe:
    """One simulation of a search: where it was made, and how it went."""

    at: float  #: the rate [unit of the search], or the number of instances
    attained: bool
    found: dict[str, Any]  #: the keys `KEPT` of its result

    def row(self, name: str) -> dict[str, Any]:
        """As one flat row of a result; `name` says what was varied."""
        return {name: self.at, "attained": self.attained} | self.found


@dataclass(slots=True)
class RateSearch:
    """The highest rate that attains, as the pair of probes that it lies between."""

    unit: str  #: of rates
    highest: Probe | None  #: highest rate that attained; None: not even the lowest tried
    lowest: Probe | None  #: lowest rate above it that did not; None: every rate tried attained
    curve: list[Probe]  #: all probes, by rate


def simulate(
    at: float, fleet: Fleet, work: Workload, traffic: Traffic, trace: Trace, attain: float
) -> Probe:
    """Simulate `trace` on `fleet`: does the share `attain` of all requests meet every target?"""
    percentiles = tuple(sorted({*traffic.percentiles, 99.0}))
    bare = replace(traffic, percentiles=percentiles, detailed=False, perfetto=None, plots=None)
    result = measured(fleet, work, bare, trace).result
    kept = {key: result[key] for key in KEPT}
    return Probe(at, kept["attainment"] >= attain, kept)


def highest_rate(
    probe: Callable[[float], Probe], start: float, tolerance: float, unit: str = "requests/s"
) -> RateSearch:
    """Double or halve from `start` until a pair of rates encloses the limit; bisect their ratio.

    Which of several limits is found, where attainment does not only fall, is left to the probes.
    Ends when the higher rate is at most 1 + `tolerance` times the lower one.
    """
    curve = [probe(start)]
    high = low = curve[0]
    while high.attained and len(curve) <= MOST_STEPS:
        low, high = high, probe(high.at * 2)
        curve.append(high)
    while not low.attained and len(curve) <= MOST_STEPS:
        low, high = probe(low.at / 2), low
        curve.append(low)
    while low.attained and not high.attained and high.at > low.at * (1 + tolerance):
        middle = probe(math.sqrt(low.at * high.at))
        curve.append(middle)
        low, high = (middle, high) if middle.attained else (low, middle)
    curve.sort(key=lambda one: one.at)
    best = high if high.attained else low if low.attained else None
    return RateSearch(unit, best, None if high.attained else high if best else low, curve)


def fewest(probe: Callable[[int], Probe], most: int) -> tuple[Probe | None, list[Probe]]:
    """The smallest of 1..`most` that attains (None: not even `most`), and all probes in order."""
    low, curve = 0, [probe(1)]
    while not curve[-1].attained and curve[-1].at < most:
        low = round(curve[-1].at)
        curve.append(probe(min(2 * low, most)))
    best = curve[-1]
    while best.attained and best.at - low > 1:
        middle = probe((low + round(best.at)) // 2)
        curve.append(middle)
        if middle.attained:
            best = middle
        else:
            low = round(middle.at)
    curve.sort(key=lambda one: one.at)
    return best if best.attained else None, curve
