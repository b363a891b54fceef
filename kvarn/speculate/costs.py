"""`Measured`: what steps and drafts cost here and now, learnt from the steps themselves.

Times are wall times: whatever the host adds to a step counts. The time of a size is the median of
its last few, so that a step that compiled or captured something is forgotten. Where a size has not
been seen, its time lies between those of its neighbours; beyond them it follows the nearest line,
and never falls.
"""

from bisect import bisect_left, insort
from collections import deque
from statistics import median

LAST = 7  #: times of a size that count


class Measured:
    """Seconds by size; a step's size is its rows, a draft's its tokens."""

    def __init__(self) -> None:
        self._steps = _Curve()
        self._drafts = _Curve()

    def saw_step(self, rows: int, seconds: float) -> None:
        """A step of `rows` positions took so long."""
        self._steps.add(rows, seconds)

    def saw_draft(self, tokens: int, seconds: float) -> None:
        """Drafting `tokens` in all took so long."""
        self._drafts.add(tokens, seconds)

    def step(self, rows: int) -> float:
        """A step that computes `rows` positions [s]; 0 while nothing is known."""
        return self._steps.at(rows)

    def draft(self, seqs: int, most: int) -> float:
        """Drafting up to `most` tokens for each of `seqs` sequences [s]; 0: nothing is known."""
        return self._drafts.at(seqs * most)


class _Curve:
    """Piecewise linear through what was seen."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._times: dict[int, deque[float]] = {}
        self._seconds: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> None:
        times = self._times.get(size)
        if times is None:
            insort(self._sizes, size)
            times = self._times[size] = deque(maxlen=LAST)
        times.append(seconds)
        self._seconds[size] = median(times)

    def at(self, size: int) -> float:
        sizes, seconds = self._sizes, self._seconds
        if size in seconds:
            return seconds[size]
        if not sizes:
            return 0.0
        after = bisect_left(sizes, size)
        if len(sizes) == 1 or after == 0:
            return seconds[sizes[min(after, len(sizes) - 1)]]
        left, right = sizes[min(after, len(sizes) - 1) - 1], sizes[min(after, len(sizes) - 1)]
        slope = max(0.0, (seconds[right] - seconds[left]) / (right - left))
        return seconds[left] + slope * (size - left)
