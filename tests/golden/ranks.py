"""Processes of ranks that outlive an engine: importing torch takes seconds, and once will do."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvarn.runner import parallel
from kvarn.runner.parallel import Worker


class Kept(Worker):
    """A rank whose process waits for another engine when its own is closed."""

    pool: list["Kept"]

    def end(self) -> None:
        """Back to the pool."""
        if self.process.poll() is None:
            self.pool.append(self)
        else:
            Worker.end(self)


@contextmanager
def kept_ranks() -> Iterator[None]:
    """While it lasts, engines take their ranks from a pool that grows as needed."""
    pool: list[Kept] = []

    def take(rank: int) -> Worker:
        if pool:
            worker = pool.pop()
            worker.rank = rank
            return worker
        fresh = spawn(rank)
        kept = Kept(rank, fresh.process, fresh.link)
        kept.pool = pool
        return kept

    spawn = parallel.spawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "spawn", take)
        yield
    for worker in pool:
        Worker.end(worker)
