"""Where updates are made: in a thread of low priority beside the steps, or between two of them."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from kvarn.speculate.train.updater import Update

NICE = 10  #: of the thread: a tenth of the processor time of a step that wants the same core

Job = Callable[[Callable[[], bool]], Update | None]  #: given whether to go on


class Worker(Protocol):
    """Makes one update at a time."""

    def begin(self, job: Job) -> None:
        """Start on it; the one before has ended."""
        ...

    def result(self) -> Update | None:
        """What the job gave, once it has ended, and only once; raises what it raised."""
        ...

    @property
    def works(self) -> bool:
        """Whether a job is under way."""
        ...

    def yields(self, busy: bool) -> None:
        """Whether requests wait for the processor: the job then pauses before its next lesson."""
        ...

    def close(self) -> None:
        """End the job under way."""
        ...


class Inline:
    """Between steps: a run is the same every time."""

    def __init__(self) -> None:
        self._job: Job | None = None

    def begin(self, job: Job) -> None:
        """See `Worker`: it is done when the result is asked for."""
        self._job = job

    def result(self) -> Update | None:
        """See `Worker`."""
        job, self._job = self._job, None
        return None if job is None else job(lambda: True)

    @property
    def works(self) -> bool:
        """See `Worker`."""
        return False

    def yields(self, busy: bool) -> None:
        """See `Worker`: nothing runs meanwhile."""

    def close(self) -> None:
        """See `Worker`."""
        self._job = None


class Background:
    """One thread with one core of its own at most, behind everything else that wants it."""

    def __init__(self) -> None:
        self._free, self._closing = threading.Event(), False
        self._free.set()
        self._job: Future[Update | None] | None = None
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, "kvarn-trainer", initializer=_settle_down)
        self._pool.submit(lambda: None).result()
        torch.set_num_threads(threads)  # setting the new thread's set the program's default too

    def begin(self, job: Job) -> None:
        """See `Worker`."""
        self._job = self._pool.submit(job, self._go_on)

    def result(self) -> Update | None:
        """See `Worker`."""
        if self._job is None or not self._job.done():
            return None
        job, self._job = self._job, None
        return job.result()

    @property
    def works(self) -> bool:
        """See `Worker`."""
        return self._job is not None

    def yields(self, busy: bool) -> None:
        """See `Worker`."""
        if busy:
            self._free.clear()
        else:
            self._free.set()

    def close(self) -> None:
        """See `Worker`: waits for the lesson under way."""
        self._closing = True
        self._free.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _go_on(self) -> bool:
        self._free.wait()
        return not self._closing


def _settle_down() -> None:
    """One core, low priority: of the calling thread alone."""
    torch.set_num_threads(1)
    if sys.platform == "linux":  # elsewhere a thread has its process's priority
        me = threading.get_native_id()
        # nobody may raise a priority: a process that is nicer already stays so
        nicer = max(NICE, os.getpriority(os.PRIO_PROCESS, me))
        os.setpriority(os.PRIO_PROCESS, me, nicer)
