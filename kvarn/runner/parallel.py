"""Tensor parallelism: one runner a rank, a process each; every rank is told the same plans.

Rank 0 is the engine's own process. Beside the collectives of the forward pass nothing crosses but
plans: every rank keeps its own image and draws the same tokens, since sampling is a pure function
of logits that are the same bits on all ranks.

When a step fails in the same way everywhere (every rank raised, after the same number of
collectives), its requests end with the error and the ranks go on. When a rank ends, is silent for
too long, or fails alone, it cannot be trusted any more: the others are ended, whoever waits for it
in a collective is set free by that, and `EngineDied` names it.
"""

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from socket import socketpair
from typing import Any

import torch

from kvarn.core.config import Resolved
from kvarn.core.errors import ConfigError, EngineDied, KvarnError
from kvarn.core.plan import StepPlan, StepResult
from kvarn.kernels.collective import Group, make_group, open_store
from kvarn.runner.executor import Executor, Pending

log = logging.getLogger("kvarn.parallel")

MEETING = 1800.0  #: for ranks to load their parts: one may be that much slower than another [s]
LIMIT = 300.0  #: in a step, a rank that keeps the others waiting for longer is lost [s]
GRACE = 5.0  #: when a step fails on one rank, the others have this long to fail too [s]
PATIENCE = 3.0  #: for a rank to end by itself [s]
#: the module that a rank's process runs
PROGRAM = "kvarn.engine.rank"


@dataclass(slots=True)
class Start:
    """First message to a rank: build this runner."""

    resolved: Resolved  #: with the choices that rank 0 has made
    rank: int
    port: int  #: where the ranks meet
    limit: float  #: for a rank that keeps others waiting [s]


@dataclass(slots=True)
class Do:
    """One call of the executor, which every rank makes; `plan` None: the result of a launch."""

    plan: StepPlan | None
    ahead: bool = False  #: only launch it


@dataclass(slots=True)
class Stop:
    """The engine is closed; the rank may be given another one."""


@dataclass(slots=True)
class Ready:
    """A rank has built its runner: its memory, as `Ledger.rows` says it."""

    memory: list[dict[str, object]]


@dataclass(slots=True)
class Refused:
    """A rank could not build its runner."""

    text: str


@dataclass(slots=True)
class Broke:
    """A step raised on a rank."""

    step: int
    calls: int  #: collectives that the rank had begun by then
    text: str


@dataclass(slots=True)
class Worker:
    """The process of one rank, seen from rank 0."""

    rank: int
    process: subprocess.Popen[bytes]
    link: Connection

    def end(self) -> None:
        """End the process: it leaves when its link closes."""
        self.link.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process now."""
        self.process.kill()
        self.process.wait()


def spawn(rank: int) -> Worker:
    """A new process, waiting for its `Start`."""
    ours, theirs = socketpair()
    command = [sys.executable, "-m", PROGRAM, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    return Worker(rank, process, Connection(ours.detach()))


# rank 0


@dataclass(slots=True)
class _Failures:
    """What is known of the steps that went wrong."""

    fatal: str = ""  #: why the engine is over
    own: set[int] = field(default_factory=set)  #: steps that raised here
    broke: dict[int, dict[int, Broke]] = field(default_factory=dict)  #: by step and rank
    since: dict[int, float] = field(default_factory=dict)  #: when a step was first said to break


class Ranks:
    """The other ranks of one engine, and the way to keep in step with them."""

    def __init__(self, count: int) -> None:
        """Start the processes of ranks 1 to count - 1; they import torch meanwhile."""
        self.count = count
        self.workers = [spawn(rank) for rank in range(1, count)]
        self.group: Group | None = None
        self.ready: list[Ready] = []
        self._failures = _Failures()
        self._news = threading.Condition()
        self._watcher = threading.Thread(target=self._watch, name="kvarn-ranks", daemon=True)
        self._stop_watching, self._stopped = Pipe()

    def connect(self, by_rank: list[Resolved], device: torch.device) -> Group:
        """Tell every rank its options and meet them; blocks until all are there."""
        store = open_store(self.count)
        for worker, resolved in zip(self.workers, by_rank[1:]):
            worker.link.send(Start(resolved, worker.rank, store.port, LIMIT))
        self.group = make_group(store, 0, self.count, device, MEETING)
        return self.group

    def await_ready(self) -> None:
        """Until every rank has built its runner; from then on they are watched."""
        for worker in self.workers:
            self.ready.append(self._answer(worker))
        assert self.group is not None
        self.group.limit(LIMIT)
        self._watcher.start()

    def _answer(self, worker: Worker) -> Ready:
        try:
            answer = worker.link.recv()
        except (EOFError, OSError):
            raise EngineDied(f"rank {worker.rank} {_fate(worker)} while it started") from None
        if isinstance(answer, Refused):
            raise ConfigError(f"rank {worker.rank}: {answer.text}")
        assert isinstance(answer, Ready)
        return answer

    def start_error(self, error: Exception) -> Exception:
        """Why the start failed here: a rank that gave up first explains it, else `error` does."""
        for link in wait([worker.link for worker in self.workers], timeout=1.0):
            try:
                self._answer(next(worker for worker in self.workers if worker.link is link))
            except KvarnError as reason:
                return reason
        return error

    def tell(self, message: Do) -> None:
        """Send one call to every rank; `EngineDied` when one is gone."""
        self.check()
        for worker in self.workers:
            try:
                worker.link.send(message)
            except OSError:
                self._give_up(f"rank {worker.rank} {_fate(worker)}")
                self.check()

    def check(self) -> None:
        """Raise `EngineDied` when a rank is lost."""
        if self._failures.fatal:
            raise EngineDied(self._failures.fatal)

    def settle(self, step: int, error: Exception) -> None:
        """A step raised here. Returns when it did so on every rank alike, else `EngineDied`."""
        assert self.group is not None
        calls, failures = self.group.calls, self._failures
        with self._news:
            failures.own.add(step)
            self._news.wait_for(
                lambda: failures.fatal or len(failures.broke.get(step, ())) == self.count - 1, GRACE
            )
            others = failures.broke.pop(step, {})
            failures.since.pop(step, None)
        self.check()
        silent = [rank for rank in range(1, self.count) if rank not in others]
        astray = [broke for broke in others.values() if broke.calls != calls]
        if silent:
            names = ", ".join(map(str, silent))
            self._give_up(f"step {step} failed on rank 0 ({error}); rank {names} did not say so")
        elif astray:
            self._give_up(f"the ranks fell apart at step {step}: {error}; {astray[0].text}")
        self.check()

    def _watch(self) -> None:
        """Read what ranks say of failed steps; see when one ends. Sleeps while all is well."""
        links = {worker.link: worker for worker in self.workers}
        while not self._failures.fatal:
            late = [t for step, t in self._failures.since.items() if step not in self._failures.own]
            pause = max(0.0, min(late) + GRACE - time.monotonic()) if late else None
            news: list[Any] = wait([*links, self._stopped], pause)
            if self._stopped in news:
                return
            for link in news:
                self._hear(links[link])
            self._find_loners()

    def _hear(self, worker: Worker) -> None:
        try:
            broke = worker.link.recv()
        except (EOFError, OSError):
            self._give_up(f"rank {worker.rank} {_fate(worker)}")
            return
        if isinstance(broke, Broke):
            with self._news:
                self._failures.broke.setdefault(broke.step, {})[worker.rank] = broke
                self._failures.since.setdefault(broke.step, time.monotonic())
                self._news.notify_all()

    def _find_loners(self) -> None:
        """A step that failed on another rank and, `GRACE` later, has not failed here."""
        now, failures = time.monotonic(), self._failures
        for step, since in list(failures.since.items()):
            if step not in failures.own and now - since >= GRACE:
                rank, broke = next(iter(failures.broke[step].items()))
                self._give_up(f"rank {rank} failed alone at step {step}: {broke.text}")

    def _give_up(self, why: str) -> None:
        """The engine is over: say why, end the ranks, and free whoever waits in a collective."""
        with self._news:
            if self._failures.fatal:
                return
            self._failures.fatal = f"{why}; the engine cannot go on without it"
            self._news.notify_all()
        log.error("%s", why)
        for worker in self.workers:
            worker.kill()
        if self.group is not None:
            self.group.close()

    def close(self) -> None:
        """End every rank; at once where the start has failed."""
        started = len(self.ready) == len(self.workers)
        if self._watcher.is_alive():
            self._stop_watching.send(None)
            self._watcher.join()
        for worker in self.workers:
            if not started:
                worker.kill()
            elif not self._failures.fatal:
                try:
                    worker.link.send(Stop())
                except OSError:
                    log.debug("rank %d was gone already", worker.rank)
            worker.end()
        if self.group is not None:
            self.group.close()
        self._stop_watching.close()
        self._stopped.close()


def _fate(worker: Worker) -> str:
    """How a process ended, in words."""
    try:
        status = worker.process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return f"(process {worker.process.pid}) has closed its connection"
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
    return f"(process {worker.process.pid}) {how}"


class ParallelExecutor:
    """An `Executor` over all ranks: each call is sent to the others, then made here."""

    def __init__(self, runner: Executor, ranks: Ranks) -> None:
        self.runner, self.ranks = runner, ranks

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one step on every rank."""
        self.ranks.tell(Do(plan))
        try:
            return self.runner.run(plan)
        except Exception as error:
            self.ranks.settle(plan.step, error)
            raise

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step on every rank; what goes wrong is raised by its `result`."""
        self.ranks.tell(Do(plan, ahead=True))
        return _Launched(plan.step, _attempt(self.runner, plan), self.ranks)

    def close(self) -> None:
        """End the other ranks and this one's runner."""
        self.ranks.close()
        self.runner.close()


class _Launched:
    """A step under way on every rank."""

    def __init__(self, step: int, own: Pending, ranks: Ranks) -> None:
        self.step, self.own, self.ranks = step, own, ranks
        self._asked = False

    def result(self) -> StepResult:
        if not self._asked:
            self._asked = True
            self.ranks.tell(Do(None))
        try:
            return self.own.result()
        except Exception as error:
            self.ranks.settle(self.step, error)
            raise


class _Failed:
    """A step whose launch raised."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self) -> StepResult:
        raise self.error


def _attempt(runner: Executor, plan: StepPlan) -> Pending:
    try:
        return runner.launch(plan)
    except Exception as error:
        return _Failed(error)


# the other ranks

#: builds the runner of a rank from its options and its group; also says what it takes
Build = Callable[[Resolved, Group], tuple[Executor, Ready]]
Device = Callable[[Resolved], torch.device]


def serve(link: Connection, device_of: Device, build: Build) -> None:
    """Be a rank until rank 0 is gone: build what `Start` says, carry out plans, until `Stop`."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; rank 0 decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(link.fileno(),), daemon=True).start()
    while True:
        start = link.recv()
        assert isinstance(start, Start)
        resolved = start.resolved
        try:
            store = open_store(resolved.config.tp, start.port)
            group = make_group(store, start.rank, resolved.config.tp, device_of(resolved), MEETING)
            runner, ready = build(resolved, group)
        except Exception as error:
            log.debug("rank %d cannot start", start.rank, exc_info=True)
            expected = isinstance(error, KvarnError)
            link.send(Refused(str(error) if expected else f"{type(error).__name__}: {error}"))
            os._exit(1)
        link.send(ready)
        group.limit(start.limit)
        _follow(link, runner, group)
        runner.close()
        group.close()
        del runner, group


def _end_with_parent(fd: int) -> None:
    """End this process when rank 0 is gone, even while a collective waits for it."""
    watch = select.poll()
    watch.register(fd, 0)  # being hung up on is always reported
    watch.poll()
    os._exit(0)


def _follow(link: Connection, runner: Executor, group: Group) -> None:
    """Make the calls that rank 0 makes, in its order; failures are told, not raised."""
    launched: deque[tuple[int, Pending]] = deque()
    while not isinstance(message := link.recv(), Stop):
        step = launched[0][0] if message.plan is None else message.plan.step
        try:
            if message.plan is None:
                launched.popleft()[1].result()
            elif message.ahead:
                launched.append((step, _Failed(RuntimeError("was not launched"))))
                launched[-1] = (step, runner.launch(message.plan))
            else:
                runner.run(message.plan)
        except Exception as error:
            log.debug("step %d failed", step, exc_info=True)
            link.send(Broke(step, group.calls, f"{type(error).__name__}: {error}"))
