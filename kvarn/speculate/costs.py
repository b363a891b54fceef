"""`Measured`: what steps and drafts cost here and now, learnt from the steps themselves.

Times are wall times: whatever the host adds to a step counts. Where a size has not been seen, its
time lies between those of its neighbours; beyond them it follows the nearest line, and never falls.
"""

from bisect import bisect_left, insort

SLOWER = 0.1  #: weight of a time that is longer than before
FASTER = 0.5  #: weight of one that is shorter
#: a time so many times longer than before counts as so many times longer, no more; one so many
#: times shorter counts alone, for what was before it has compiled or captured something
OUTLIER = 1.5


class Measured:
    """Seconds by size, moving averages; a step's size is its rows, a draft's its tokens."""

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
        self._seconds: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> None:
        known = self._seconds.get(size)
        if known is None:
            insort(self._sizes, size)
            self._seconds[size] = seconds
        else:
            change = min(seconds, OUTLIER * known) - known
            weight = SLOWER if change > 0 else FASTER if seconds > known / OUTLIER else 1.0
            self._seconds[size] = known + weight * change

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
