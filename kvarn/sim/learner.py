"""`Learner`: a trainer in virtual time. When updates are made is as in the engine; what they bring
is the fitted curve's (`kvarn.sim.learnt`), and what they take is stated.

Requests that ended and had a draft judged are lessons. Every `interval` of them there is an update
on those that wait, the last ones, as many as the engine's buffer holds. `inline` makes it between
two steps, and no step begins meanwhile; `on` beside the steps, which take `slows` times as long;
`idle` while no request runs. While requests queue nothing is learnt. A version comes into force
when the one before has been judged, and goes back when it does far worse, by the engine's own
`Versions`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvarn.core.output import TrainerStats
from kvarn.core.plan import SeqId
from kvarn.core.seq import Seq
from kvarn.sim.drafter import Clock
from kvarn.sim.learnt import Learnt
from kvarn.speculate.records import Record
from kvarn.speculate.train.lessons import Lessons
from kvarn.speculate.train.versions import Versions

Mode = Literal["on", "idle", "inline"]
MOST = Lessons().most  #: that wait
SHARE = 0.25  #: of the time that updates in a thread take at most, as the engine's `Pace`
Knowledge = dict[str, float]  #: share by subject


@dataclass(slots=True)
class Learner:
    """See `kvarn.speculate.part.Trainer`. One for each instance: it learns from its traffic."""

    drafts: Learnt  #: what is taught
    clock: Clock
    mode: Mode
    interval: int  #: requests that end before the next update
    seconds: float  #: that an update takes
    slows: float = 1.0  #: by which steps beside an update take longer
    versions: Versions = field(default_factory=Versions)
    worked: float = 0.0  #: time of updates so far [s]
    _lessons: deque[str] = field(default_factory=lambda: deque(maxlen=MOST))  #: by subject
    _ended: int = 0  #: since the last update
    _taught: set[SeqId] = field(default_factory=set)  #: that run, and had a draft judged
    _before: Knowledge = field(default_factory=dict)  #: of the version before
    _latest: Knowledge = field(default_factory=dict)  #: of the last update made
    _made: Knowledge | None = None  #: waits until the version in force is known
    _next: Knowledge | None = None  #: of the update under way
    _left: float = 0.0  #: of it [s]
    _yields: bool = False  #: it waits
    _seen: float = 0.0  #: when it was last looked after [s]
    _not_before: float = 0.0  #: [s]

    @property
    def slowdown(self) -> float:
        """By which a step that begins now takes longer."""
        beside = self.mode == "on" and self._next is not None and not self._yields
        return self.slows if beside else 1.0

    def hear(self, records: Sequence[Record]) -> None:
        """Drafts were judged."""
        for record in records:
            self.versions.saw(record.judged, record.accepted)
            self._taught.add(record.seq)

    def forget(self, seq: Seq) -> None:
        """The sequence has ended."""
        if seq.id in self._taught:
            self._taught.remove(seq.id)
            self._lessons.append(self.drafts.turns.of(seq.request))
            self._ended += 1

    def between_steps(self, waits: bool, runs: bool, now: float) -> None:
        """See `Trainer`; `inline` moves the clock."""
        self._work(now)
        if self.versions.verdict() == "roll back":
            self.versions.roll_back()
            self.drafts.knows = self._latest = self._before
            self._made = self._next = None
        if self._made is not None and self.versions.ready:
            self.versions.publish()
            self._before, self.drafts.knows, self._made = self.drafts.knows, self._made, None
        self._yields = waits or (runs and self.mode == "idle")
        if not self._yields and now >= self._not_before:
            self._begin()

    def _work(self, now: float) -> None:
        """The thread went on since it was last looked after, unless it had to wait."""
        gone, self._seen = now - self._seen, now
        if self._next is None or self._yields:
            return
        done = min(gone, self._left)
        self._left -= done
        self.worked += done
        if self._left <= 0.0:
            self._finish(now)

    def _begin(self) -> None:
        """The next update, where there are lessons enough and none is under way."""
        if self._ended < self.interval or self._next is not None or self._made is not None:
            return
        self._next = self.drafts.curve.moved(self._latest, list(self._lessons))
        self._lessons.clear()
        self._ended, self._left = 0, self.seconds
        if self.mode == "inline":
            self.clock.now += self.seconds
            self.worked += self.seconds
            self._finish(self.clock.now)

    def _finish(self, now: float) -> None:
        """The update is made; the thread rests, so that it keeps to its share of the time."""
        assert self._next is not None
        self._latest = self._made = self._next
        self._next = None
        if self.mode != "inline":
            self._not_before = now + self.seconds * (1.0 / SHARE - 1.0)

    def stats(self) -> TrainerStats:
        """Counters of now."""
        versions = self.versions
        return TrainerStats(
            version=versions.version, published=versions.published,
            rolled_back=versions.rolled_back, acceptance_before=versions.before,
            acceptance=versions.now.rate, lessons=len(self._lessons), seconds=self.worked,
        )  # fmt: skip

    def close(self) -> None:
        """Nothing to stop."""
