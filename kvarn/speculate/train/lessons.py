"""What verification taught: the target's distribution where drafts were judged, in bounded memory.

A lesson is a sequence with the places that were judged. It is open while its sequence runs, and
joins the buffer when the sequence ends; there the oldest make room for the newest.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvarn.core.errors import ConfigError
from kvarn.core.plan import SeqId

LONGEST = 256  #: tokens of a lesson, as in arXiv 2310.07177; of longer sequences the last ones


@dataclass(slots=True)
class Label:
    """What the target said at one place: its most likely tokens, of its own distribution."""

    place: int  #: of the token that was judged [tokens from the start of the sequence]
    wrong: bool  #: the draft was refused here
    top: Sequence[int]  #: tokens, best first
    logprobs: Sequence[float]


@dataclass(slots=True)
class Lesson:
    """A piece of a sequence, and its labels: all at 1 to len(tokens), the place after the last."""

    tokens: list[int]
    labels: list[Label]


@dataclass(slots=True)
class Lessons:
    """The buffer, with what is still open."""

    most: int = 16  #: sequences that wait to be learnt from; so of one update too
    most_open: int = 256  #: sequences that run and are followed; others teach nothing
    longest: int = LONGEST  #: tokens of a lesson, and so labels too
    dropped: int = 0  #: lessons that made room for others
    _open: dict[SeqId, deque[Label]] = field(default_factory=dict)
    _kept: deque[Lesson] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if min(self.most, self.most_open) < 1 or self.longest < 2:
            raise ConfigError(
                f"a buffer of lessons needs most and most_open of at least 1 and longest of at "
                f"least 2, not {self.most}, {self.most_open} and {self.longest}"
            )

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def labels(self) -> int:
        """Labels held, of open lessons too."""
        return sum(map(len, self._open.values())) + sum(len(one.labels) for one in self._kept)

    def add(self, seq: SeqId, labels: Sequence[Label]) -> None:
        """What one step taught about a sequence, in rising order of places."""
        if seq not in self._open and len(self._open) < self.most_open:
            self._open[seq] = deque(maxlen=self.longest)
        if seq in self._open:
            self._open[seq].extend(labels)

    def close(self, seq: SeqId, tokens: Sequence[int]) -> None:
        """The sequence has ended with these tokens; what was learnt of it waits in the buffer."""
        labels = self._open.pop(seq, None)
        if not labels:
            return
        end = min(len(tokens), labels[-1].place)  # the last label needs only what is before it
        start = max(0, end - self.longest)
        for label in labels:
            label.place -= start
        kept = [label for label in labels if 0 < label.place <= end - start]
        if not kept:
            return
        if len(self._kept) == self.most:
            self._kept.popleft()
            self.dropped += 1
        self._kept.append(Lesson(list(tokens[start:end]), kept))

    def take(self) -> list[Lesson]:
        """Everything that waits, oldest first; the buffer is empty afterwards."""
        taken = list(self._kept)
        self._kept.clear()
        return taken
