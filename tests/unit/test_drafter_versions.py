"""Versions of a drafter: published when the one before is known, taken back when they do worse."""

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from kvarn.core.errors import ConfigError
from kvarn.speculate.train.updater import Update
from kvarn.speculate.train.versions import Share, Versions
from kvarn.speculate.train.worker import Background, Inline


def saw(versions: Versions, share: float, tokens: int) -> None:
    """One-token drafts, so many of which are accepted, evenly spread."""
    for i in range(tokens):
        versions.saw(1, int((i + 1) * share) > int(i * share))


def test_a_share_forgets_what_is_older_than_its_window() -> None:
    share = Share(100)
    for _ in range(300):
        share.saw(1, 0)
    for _ in range(100):
        share.saw(1, 1)
    assert share.full and share.judged == 100 and share.rate == 1.0


def test_better_stays_and_worse_goes_back() -> None:
    versions = Versions(window=100, margin=0.2)
    assert not versions.ready
    saw(versions, 0.5, 100)
    assert versions.ready and versions.publish() == 1
    assert not versions.ready and versions.verdict() == "open"
    saw(versions, 0.7, 99)
    assert versions.verdict() == "open"
    saw(versions, 1.0, 1)
    assert versions.verdict() == "keep" and versions.verdict() == "open" and versions.ready
    assert versions.publish() == 2 and versions.before == pytest.approx(0.7, abs=0.011)
    saw(versions, 0.55, 100)
    assert versions.verdict() == "roll back"
    assert versions.roll_back() == 1
    assert versions.version == 1 and versions.rolled_back == 1
    assert not versions.ready  # traffic may have changed: what it is worth now is not known
    saw(versions, 0.5, 100)
    assert versions.ready and versions.publish() == 3 and versions.previous == 1


def test_a_fall_within_the_margin_is_borne() -> None:
    versions = Versions(window=100, margin=0.2)
    saw(versions, 0.5, 100)
    versions.publish()
    saw(versions, 0.42, 100)
    assert versions.verdict() == "keep"


@pytest.mark.parametrize("window, margin", [(0, 0.1), (10, 0.0), (10, 1.0)])
def test_nonsense_is_refused(window: int, margin: float) -> None:
    with pytest.raises(ConfigError, match="window of at least 1"):
        Versions(window, margin)


class Batches:
    """A job of so many batches; each waits to be let through."""

    def __init__(self, count: int) -> None:
        self.count, self.done = count, 0
        self.step, self.stepped = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, go_on: Callable[[], bool]) -> Update | None:
        for _ in range(self.count):
            if not go_on():
                return None
            self.step.acquire(timeout=5)
            self.done += 1
            self.stepped.release()
        return None


def test_a_busy_engine_stops_the_job_before_its_next_batch() -> None:
    worker, job = Background(), Batches(3)
    worker.begin(job)
    job.step.release()
    assert job.stepped.acquire(timeout=5)
    job.step.release(2)
    assert job.stepped.acquire(timeout=5)  # the second may have begun before the word came
    worker.yields(True)
    job.stepped.acquire(timeout=0.2)
    seen = job.done
    assert not job.stepped.acquire(timeout=0.2) and job.done == seen
    assert worker.works and worker.result() is None
    worker.yields(False)
    worker.close()
    assert not any(one.name.startswith("kvarn-trainer") for one in threading.enumerate())


def test_what_a_job_raises_comes_with_its_result() -> None:
    def broken(go_on: Callable[[], bool]) -> Update | None:
        raise ValueError("no")

    for worker in (Inline(), Background()):
        worker.begin(broken)
        with pytest.raises(ValueError, match="no"):
            while worker.result() is None:
                pass
        assert not worker.works
        worker.close()


def test_a_nice_process_has_no_nicer_steps_than_its_thread() -> None:
    code = """
import os, threading
from kvarn.speculate.train.worker import Background
worker = Background()
mine = os.getpriority(os.PRIO_PROCESS, threading.main_thread().native_id)
its = worker._pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
assert mine <= its.result() and its.result() >= 10, (mine, its.result())
worker.close()
"""
    for nice in ("0", "15"):
        subprocess.run(["nice", "-n", nice, sys.executable, "-c", code], check=True)


def test_the_thread_leaves_torch_as_it_was() -> None:
    import torch

    before = torch.get_num_threads()
    worker = Background()
    assert torch.get_num_threads() == before
    worker.close()
