"""The fluid machine: total flow of preemptive work, the relaxation behind the cheap bounds.

Whatever a server shares out (KV positions, tokens per second, slots), a schedule of it is also a
schedule of one machine that works off volumes at the full rate and may stop and resume for free.
The machine's best therefore bounds every server, batching and preemption included.
"""

import heapq
from collections.abc import Iterable


def srpt_flow(work: Iterable[tuple[float, float]], speed: float) -> float:
    """Least total flow of (release, volume) on a preemptive machine of `speed` volume per unit.

    Shortest remaining processing time first is optimal for it (Schrage 1968): at each instant the
    number of unfinished items is the least possible.
    """
    return _run(work, speed, by_size=False)


def mean_busy_flow(work: Iterable[tuple[float, float]], speed: float) -> float:
    """Least sum of (mean busy time + volume / (2 speed) - release): at most `srpt_flow`.

    An item's mean busy time is when its volume is worked off on average, so fractions of an item
    may finish apart; smallest volume first (whatever remains of it) is optimal (Goemans 1997).
    """
    return _run(work, speed, by_size=True)


def _run(work: Iterable[tuple[float, float]], speed: float, *, by_size: bool) -> float:
    """Plays the machine; `by_size` keeps an item's place by its whole volume and averages."""
    arrivals = sorted(work)
    heap: list[tuple[float, float, float, float]] = []  # (key, remaining, release, volume)
    now, flow, i = 0.0, 0.0, 0
    while heap or i < len(arrivals):
        if not heap:
            now = max(now, arrivals[i][0])
        while i < len(arrivals) and arrivals[i][0] <= now:
            release, volume = arrivals[i]
            heapq.heappush(heap, (volume, volume, release, volume))
            i += 1
        _, left, release, volume = heapq.heappop(heap)
        end = now + left / speed
        done = i == len(arrivals) or end <= arrivals[i][0]
        until = end if done else arrivals[i][0]
        rest = 0.0 if done else left - (until - now) * speed
        if by_size and volume:
            flow += (left - rest) / volume * (now + until) / 2
        if not done:
            heapq.heappush(heap, (volume if by_size else rest, rest, release, volume))
        elif by_size:
            flow += volume / (2 * speed) - release
        else:
            flow += until - release
        now = until
    return flow
