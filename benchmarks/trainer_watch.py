"""What a trainer's thread does beside an engine, watched from outside: for `train_beside.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter, sleep
from typing import Any

from kvarn.speculate.train.trainer import OnlineTrainer
from kvarn.speculate.train.updater import Update
from kvarn.speculate.train.worker import Job

PATIENCE = 60.0  #: for the thread to come to an end [s]
Span = tuple[float, float]  #: from, to [s]


@dataclass(slots=True)
class Watched:
    """A job of the trainer's thread: it computes between two times of asking whether to go on."""

    marks: list[float] = field(default_factory=list)  #: beginning and end of each piece, in turn
    over: bool = False

    def run(self, job: Job, go_on: Callable[[], bool]) -> Update | None:
        """Do it, by the clock."""

        def asked() -> bool:
            self.marks.append(perf_counter())
            found = go_on()
            self.marks.append(perf_counter())
            return found

        self.marks.append(perf_counter())
        try:
            return job(asked)
        finally:
            self.marks.append(perf_counter())
            self.over = True

    @property
    def pieces(self) -> list[Span]:
        """What comes before the first lesson, each lesson, and the making of the new version."""
        return list(zip(self.marks[::2], self.marks[1::2]))

    @property
    def span(self) -> Span:
        """Pauses and all; of a job that is over."""
        return self.marks[0], self.marks[-1]


class Watch:
    """What a trainer's thread does, and what it is told."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.jobs, self.renewals = list[Watched](), list[Span]()
        self.told: list[tuple[float, bool]] = []  #: when and whether it was to give way, by turns
        worker: Any = trainer.worker
        self._begin, self._yields, self._renew = worker.begin, worker.yields, trainer.renew
        worker.begin, worker.yields, trainer.renew = self._watch, self._tell, self._time

    def _watch(self, job: Job) -> None:
        self.jobs.append(one := Watched())
        self._begin(lambda go_on: one.run(job, go_on))

    def _tell(self, busy: bool) -> None:
        # its time lies within the pause: who passes just before and just after is not inside it
        before = perf_counter()
        self._yields(busy)
        after = perf_counter()
        if busy != (bool(self.told) and self.told[-1][1]):
            self.told.append((after if busy else before, busy))

    def _time(self, decoder: Any, keep_kv: bool) -> None:
        began = perf_counter()
        self._renew(decoder, keep_kv)
        self.renewals.append((began, perf_counter()))

    def rest(self) -> None:
        """Wait until the job under way has ended: its result is looked at in the next step."""
        self._tell(False)
        until = perf_counter() + PATIENCE
        while self.jobs and not self.jobs[-1].over:
            if perf_counter() > until:
                raise TimeoutError(f"an update took more than {PATIENCE:.0f} s by itself")
            sleep(0.005)

    @property
    def pieces(self) -> list[Span]:
        """When the thread computed; jobs are over."""
        return [piece for job in self.jobs for piece in job.pieces]


@dataclass(slots=True)
class Yield:
    """Load came while a job was under way."""

    waited: float  #: how long requests waited, which is how long the thread was to pause [s]
    went_on: float  #: for how long it computed after that was known [s]
    pieces: int  #: that ran, in part at least, while requests waited


def yields(jobs: Sequence[Watched], told: Sequence[tuple[float, bool]]) -> list[Yield]:
    """What the thread did whenever it was told to give way while it had a job."""
    found = list[Yield]()
    for (since, busy), (until, _) in pairwise(told):
        job = next((one for one in jobs if one.span[0] <= since < one.span[1]), None)
        if busy and job is not None:
            pieces = [one for one in job.pieces if one[0] < until and one[1] > since]
            went_on = max((ended for _, ended in pieces), default=since) - since
            found.append(Yield(until - since, went_on, len(pieces)))
    return found
