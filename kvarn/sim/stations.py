"""Stations: servers of stages that are no language model. Pure state machines in virtual time.

Whatever a station is, it is given jobs, says when something will next happen, and hands out what
has ended by then. Times are integer ns.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kvarn.core.errors import ConfigError
from kvarn.sim.heap import NS
from kvarn.sim.links import SharedLink


class Station(Protocol):
    """Serves jobs by name."""

    def add(self, now: int, job: str, work: float) -> None:
        """A job comes, with so much work in the station's units."""
        ...

    def next_end(self) -> int | None:
        """When something happens next if no job comes before [ns]; None: nothing is there."""
        ...

    def finish(self, now: int) -> list[str]:
        """Jobs that have ended by `now`; what waited for their place begins."""
        ...

    def cancel(self, now: int, job: str) -> None:
        """A job that was added and not handed out yet is not wanted any more."""
        ...


@dataclass(slots=True, order=True)
class _Waiting:
    rank: tuple[float, int]
    job: str = field(compare=False)
    work: float = field(compare=False)
    since: int = field(compare=False)  #: [ns]


@dataclass(slots=True)
class BatchServer:
    """`workers` equal servers with one queue, each taking up to `most` jobs at once.

    A batch begins when a worker is free and `most` jobs wait, or the first of them has waited for
    `patience` (0: whoever is there goes). `first`: in order of arrival, or least work first.
    """

    seconds: Callable[[Sequence[float]], float]  #: time of a batch with these amounts of work
    workers: int = 1
    most: int = 1
    patience: float = 0.0  #: [s]
    first: Literal["arrival", "least_work"] = "arrival"
    busy: int = 0  #: of all workers [ns]
    waited: int = 0  #: of all jobs, before their batch began [ns]
    served: int = 0  #: jobs that have begun
    batches: int = 0
    _queue: list[_Waiting] = field(default_factory=list)
    _under_way: list[tuple[int, int, list[str]]] = field(default_factory=list)
    _added: int = 0

    def __post_init__(self) -> None:
        if min(self.workers, self.most) < 1 or self.patience < 0:
            raise ConfigError(
                f"a station needs workers and batches of at least 1 and patience of at least 0, "
                f"got {self.workers}, {self.most}, {self.patience}"
            )

    def add(self, now: int, job: str, work: float) -> None:
        """Queue a job, and begin it if the rule says so."""
        self._added += 1
        key = work if self.first == "least_work" else 0.0
        heapq.heappush(self._queue, _Waiting((key, self._added), job, work, now))
        self._begin(now)

    def next_end(self) -> int | None:
        """The first end of a batch, or of somebody's patience."""
        ends = [self._under_way[0][0]] if self._under_way else []
        if self._queue and len(self._under_way) < self.workers:
            ends.append(self._impatient())
        return min(ends, default=None)

    def finish(self, now: int) -> list[str]:
        """Jobs of the batches that have ended, in order of their ends."""
        done = list[str]()
        while self._under_way and self._under_way[0][0] <= now:
            done += heapq.heappop(self._under_way)[2]
        self._begin(now)
        return done

    def cancel(self, now: int, job: str) -> None:
        """A job that waits is gone; one under way goes on with its batch, and nobody is told."""
        self._queue = [one for one in self._queue if one.job != job]
        heapq.heapify(self._queue)
        for _, _, jobs in self._under_way:
            if job in jobs:
                jobs.remove(job)

    def _impatient(self) -> int:
        return min(one.since for one in self._queue) + round(self.patience * NS)

    def _begin(self, now: int) -> None:
        while self._queue and len(self._under_way) < self.workers:
            if len(self._queue) < self.most and self._impatient() > now:
                return
            batch = [heapq.heappop(self._queue) for _ in range(min(self.most, len(self._queue)))]
            time = max(1, round(self.seconds([one.work for one in batch]) * NS))
            self.batches += 1
            self.busy += time
            self.served += len(batch)
            self.waited += sum(now - one.since for one in batch)
            jobs = [one.job for one in batch]
            heapq.heappush(self._under_way, (now + time, self.batches, jobs))


@dataclass(slots=True)
class Transfers:
    """A link as a station: work is bytes; all jobs go on at once and share it."""

    link: SharedLink

    def add(self, now: int, job: str, work: float) -> None:
        """Begin a transfer."""
        self.link.start(now, job, round(work))

    def next_end(self) -> int | None:
        """The next arrival."""
        return self.link.next_end()

    def finish(self, now: int) -> list[str]:
        """Transfers that have arrived."""
        return self.link.finish(now)

    def cancel(self, now: int, job: str) -> None:
        """Stop a transfer; the others go on faster."""
        self.link.cancel(now, job)
