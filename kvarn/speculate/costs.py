"""`Measured`: what steps and drafts cost here and now, learnt from the steps themselves.

Times are wall times: whatever the host adds to a step counts. Steps that verify drafts are a kind
of their own: what they follow must be known before they are planned, so the host's part of them is
not hidden behind the step before. The first plain step after one of these pays for the same once
(`back`), and says nothing of plain steps.

The time of a size is the mean of the middle half of its last few, so that a step that compiled or
captured something does not count; what was seen once only is not believed. Sizes are taken together
in classes of an eighth. Where a class has not been seen, its time lies between those of its
neighbours; beyond them it follows the line through the first and the last, and never falls.

A draft's time is kept by its length, and for each by the sequences drafted for: a model makes one
pass for each token, and that takes several sequences hardly longer than one. Of a length that was
not seen it is that of the nearest one, in proportion.

What the proposer reads of a sequence, a prompt at first, it reads once: where it is much, a draft's
time beyond what others took is the time to read, at the median rate of the last few.
"""

from bisect import bisect_left, insort
from collections import deque
from statistics import median

LAST = 32  #: times of a size that count: contexts grow, but steps vary by a tenth and more
FINE = 8  #: classes from one power of two to the next
MUCH = 16  #: tokens read for each sequence, more than what a draft reads anyway
READS = 9  #: the last ones, whose rate counts; what was seen once only is not believed
NEAR, APART = 1.25, 2.0  #: a size is known up to so far above the largest seen, below the least


class Measured:
    """Seconds by size; a step's size is its rows, a draft's its sequences."""

    def __init__(self) -> None:
        self._plain, self._verifying = _Curve(), _Curve()
        self._drafts: dict[int, _Curve] = {}  # by tokens of the longest
        self._back, self._looks = _Curve(), _Curve()
        self._reads = deque[float](maxlen=READS)  # seconds a token
        self._ahead = False  # the last step was plain: the next one was planned while it ran

    def saw_plain(self, rows: int, seconds: float, ahead: bool = True) -> None:
        """A plain step of `rows` single rows took so long; `ahead`: nobody waited for its plan."""
        if ahead and self._ahead:
            self._plain.add(rows, seconds)
        elif ahead and self._plain.at(rows):
            self._back.add(1, max(0.0, seconds - self._plain.at(rows)))
        self._ahead = ahead

    def saw_verifying(self, rows: int, seconds: float) -> None:
        """A step of `rows` positions, drafts and what they follow, took so long."""
        self._verifying.add(rows, seconds)
        self._ahead = False

    def saw_other(self, ahead: bool) -> None:
        """A step whose time says nothing, with prompts in it."""
        self._ahead = ahead

    def saw_draft(
        self, seqs: int, most: int, seconds: float, read: int = 0, asked: int = 0
    ) -> None:
        """Drafting for so many sequences, at most so many tokens, took so long, in which so many of
        the sequences' tokens were read; 0 sequences: nothing came of it. `asked`: for how many
        drafts were wanted, if that is more."""
        asked = max(asked, seqs)
        if read > MUCH * asked:
            usual = self.draft(asked, max(most, 1)) if asked else 0.0
            self._reads.append(max(0.0, seconds - usual) / read)
        elif seqs:
            self._drafts.setdefault(most, _Curve()).add(seqs, seconds)

    def saw_look(self, seconds: float) -> None:
        """The length control was asked, and wants no drafts."""
        self._looks.add(1, seconds)

    def step(self, rows: int) -> float:
        """A plain step of `rows` positions [s]; 0 while nothing is known."""
        return self._plain.at(rows)

    def verifying(self, rows: int) -> float:
        """A step of `rows` positions, drafts among them [s]; at least a plain one."""
        return max(self._verifying.at(rows), self._plain.at(rows))

    def reach(self) -> int:
        """The largest step with drafts that was seen [positions]."""
        return self._verifying.largest

    def draft(self, seqs: int, most: int) -> float:
        """Drafting up to `most` tokens for each of `seqs` sequences [s]; 0: nothing is known."""
        seen = [length for length, curve in self._drafts.items() if curve.largest]
        if not seen:
            return 0.0
        nearest = min(seen, key=lambda length: (abs(length - most), length))
        return self._drafts[nearest].at(seqs) * most / nearest

    def reading(self, tokens: int) -> float:
        """Reading so many tokens [s]; 0: nothing is known."""
        return tokens * median(self._reads) if len(self._reads) > 1 else 0.0

    def back(self) -> float:
        """What the first plain step after one with drafts costs more than others [s]."""
        return self._back.at(1)

    def look(self) -> float:
        """Asking the length control in vain [s]."""
        return self._looks.at(1)

    def knows(self, rows: int) -> bool:
        """Whether plain steps of about this size were seen."""
        return self._plain.knows(rows)


def class_of(size: int) -> int:
    """The largest size of the class that `size` is in."""
    step = 1 << max(0, (size - 1).bit_length() - FINE.bit_length())
    return -(-size // step) * step


class _Curve:
    """Piecewise linear through what was seen."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # that are believed, rising
        self._times: dict[int, deque[float]] = {}
        self._seconds: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> None:
        size = class_of(size)
        times = self._times.setdefault(size, deque(maxlen=LAST))
        times.append(seconds)
        if len(times) == 1:
            return
        if size not in self._seconds:
            insort(self._sizes, size)
        middle, side = sorted(times), (len(times) - 1) // 4
        if len(times) == 2:
            middle.pop()  # the first of a size may have captured it
        middle = middle[side : len(middle) - side]
        self._seconds[size] = sum(middle) / len(middle)

    @property
    def largest(self) -> int:
        return self._sizes[-1] if self._sizes else 0

    def knows(self, size: int) -> bool:
        size, sizes = class_of(size), self._sizes
        if size in self._seconds:
            return True
        after = bisect_left(sizes, size)
        if 0 < after < len(sizes):
            return True
        if after:
            return size <= NEAR * sizes[-1]
        return bool(sizes) and sizes[0] <= APART * size

    def at(self, size: int) -> float:
        sizes, seconds = self._sizes, self._seconds
        size = class_of(size)
        if size in seconds:
            return seconds[size]
        if not sizes:
            return 0.0
        after = bisect_left(sizes, size)
        if len(sizes) == 1:
            return seconds[sizes[0]]
        first, last = (after - 1, after) if 0 < after < len(sizes) else (0, -1)
        left, right = sizes[first], sizes[last]
        slope = max(0.0, (seconds[right] - seconds[left]) / (right - left))
        near = sizes[max(0, after - 1)]
        return max(seconds[near] / APART, seconds[near] + slope * (size - near))
