"""Online schedulers in the round model of `kvarn.theory.schedule`, to hold against hindsight.

A policy sees the prompts, the arrivals so far and what it was told of the outputs; `play` runs it,
checks the memory every round and adds up the latency. These are the published rules on their own,
without pages, chunks or step times; the engine's schedulers live in `kvarn.schedule`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvarn.core.errors import ConfigError
from kvarn.theory.schedule import Job, check_jobs


@dataclass(slots=True)
class View:
    """What a policy may look at between two rounds."""

    now: int
    memory: int  #: [tokens]
    prompts: list[int]  #: of every job, by index [tokens]
    arrivals: list[int]  #: of every job, by index; the future ones are not for policies
    waiting: list[int] = field(default_factory=list)  #: job indices, in order of arrival
    running: dict[int, int] = field(default_factory=dict)  #: job index -> round of its start

    def used_next(self) -> int:
        """Positions that the running jobs hold in the coming round [tokens]."""
        return sum(self.prompts[i] + self.now + 1 - p for i, p in self.running.items())


class Policy(Protocol):
    """Decides before every round: first who is stopped, then who is started."""

    def stop(self, view: View) -> list[int]:
        """Running jobs to kill: they lose their tokens and wait again."""
        ...

    def start(self, view: View) -> list[int]:
        """Waiting jobs to start in this round."""
        ...


@dataclass(slots=True, frozen=True)
class Play:
    """What came of a policy."""

    ends: tuple[int, ...]  #: round in which each job ended
    total_latency: int  #: sum of end - arrival [rounds]
    peak: int  #: most positions held in a round [tokens]
    kills: int  #: runs thrown away


def play(jobs: Sequence[Job], memory: int, policy: Policy) -> Play:
    """Runs `policy` to the end; raises `ConfigError` if it overfills the memory or starves."""
    check_jobs(jobs, memory)
    view = View(0, memory, [job.prompt for job in jobs], [job.arrival for job in jobs])
    order = sorted(range(len(jobs)), key=lambda i: (jobs[i].arrival, i))
    ends, peak, kills, seen = [0] * len(jobs), 0, 0, 0
    while seen < len(order) or view.waiting or view.running:
        if not view.waiting and not view.running:
            view.now = jobs[order[seen]].arrival
        while seen < len(order) and jobs[order[seen]].arrival <= view.now:
            view.waiting.append(order[seen])
            seen += 1
        kills += _decide(policy, view)
        if not view.running:
            raise ConfigError(f"round {view.now}: the policy starts nothing on an empty machine")
        peak = max(peak, view.used_next())
        if peak > memory:
            raise ConfigError(f"round {view.now + 1}: the policy holds {peak} of {memory}")
        view.now += 1
        for i in [i for i, p in view.running.items() if p + jobs[i].output == view.now]:
            del view.running[i]
            ends[i] = view.now
    total = sum(end - job.arrival for end, job in zip(ends, jobs))
    return Play(tuple(ends), total, peak, kills)


def _decide(policy: Policy, view: View) -> int:
    """Lets the policy stop and start jobs; returns how many it stopped."""
    stopped = policy.stop(view)
    for i in stopped:
        del view.running[i]
    view.waiting.extend(stopped)
    view.waiting.sort(key=lambda i: (view.arrivals[i], i))
    for i in policy.start(view):
        view.waiting.remove(i)
        view.running[i] = view.now
    return len(stopped)


def fits(view: View, planned: Sequence[int], chosen: Iterable[int]) -> bool:
    """Whether the running jobs and `chosen`, started now, stay within the memory to their ends.

    `planned[i]` is the output assumed for job i. Usage only grows between two ends, so it is
    enough to look at the rounds in which a job ends (2502.07115, section 4).
    """
    spans = [(p, p + planned[i], view.prompts[i]) for i, p in view.running.items()]
    spans += [(view.now, view.now + planned[i], view.prompts[i]) for i in chosen]
    for _, t, _ in spans:
        if sum(s + t - p for p, end, s in spans if p < t <= end) > view.memory:
            return False
    return True


def take_while_fits(view: View, planned: Sequence[int], order: Iterable[int]) -> list[int]:
    """Waiting jobs in `order` up to the first that does not fit."""
    chosen: list[int] = []
    for i in order:
        if not fits(view, planned, [*chosen, i]):
            break
        chosen.append(i)
    return chosen


@dataclass(slots=True)
class FirstCome:
    """First come, first served, with the ends of running jobs known."""

    outputs: Sequence[int]  #: of every job [tokens]

    def stop(self, view: View) -> list[int]:
        """Nobody."""
        return []

    def start(self, view: View) -> list[int]:
        """The longest head of the queue that fits."""
        return take_while_fits(view, self.outputs, view.waiting)


@dataclass(slots=True)
class ShortestFirst:
    """MC-SF (2502.07115, Algorithm 1): memory-checked, shortest predicted output first.

    With upper ends of prediction intervals as `outputs` it is A_max (2508.14544).
    """

    outputs: Sequence[int]  #: predicted, never below the true ones [tokens]

    def stop(self, view: View) -> list[int]:
        """Nobody: the predictions are upper ends."""
        return []

    def start(self, view: View) -> list[int]:
        """The shortest jobs, up to the first that does not fit."""
        return take_while_fits(
            view, self.outputs, sorted(view.waiting, key=lambda i: self.outputs[i])
        )


@dataclass(slots=True)
class LowerBoundFirst:
    """A_min (2508.14544): plans with lower ends, learns as tokens pass them, evicts on overflow.

    A job that is stopped keeps what was learnt of its length.
    """

    learnt: list[int]  #: least possible output of every job so far [tokens]; grows

    def stop(self, view: View) -> list[int]:
        """On overflow in the coming round: those with the smallest known length first."""
        for i, p in view.running.items():
            self.learnt[i] = max(self.learnt[i], view.now + 1 - p)
        stopped: list[int] = []
        used = view.used_next()
        for i in sorted(view.running, key=lambda i: self.learnt[i]):
            if used <= view.memory:
                break
            stopped.append(i)
            used -= view.prompts[i] + view.now + 1 - view.running[i]
        return stopped

    def start(self, view: View) -> list[int]:
        """Ascending known length, up to the first that does not fit as far as is known."""
        return take_while_fits(
            view, self.learnt, sorted(view.waiting, key=lambda i: self.learnt[i])
        )


@dataclass(slots=True)
class GeometricSlices:
    """Kill and restart without any prediction, after GSA (2601.22996).

    A job's k-th run gets 2^k tokens; if it has not ended by then it is killed and waits for run
    k + 1. Fewer runs go first, so new arrivals overtake. The paper has all jobs arrive at once and
    spaces the starts of a phase evenly; here starts are greedy under the look-ahead, so its
    constants (61.92; 32 for large memory) are not claimed for this variant.
    """

    runs: dict[int, int] = field(default_factory=dict)  #: job -> runs that were too short

    def quantum(self, view: View, i: int) -> int:
        """Tokens that the present run of job i may make; its memory caps it."""
        return min(1 << self.runs.get(i, 0), view.memory - view.prompts[i])

    def stop(self, view: View) -> list[int]:
        """Jobs at the end of their quantum."""
        out = [i for i, p in view.running.items() if view.now - p >= self.quantum(view, i)]
        for i in out:
            self.runs[i] = self.runs.get(i, 0) + 1
        return out

    def start(self, view: View) -> list[int]:
        """Fewest runs first, up to the first that does not fit for its quantum."""
        planned = {i: self.quantum(view, i) for i in (*view.waiting, *view.running)}
        quanta = [planned.get(i, 0) for i in range(len(view.prompts))]
        return take_while_fits(
            view, quanta, sorted(view.waiting, key=lambda i: self.runs.get(i, 0))
        )


def adversary(memory: int) -> tuple[Job, ...]:
    """Jobs that undo every policy which starts a lone job at once and never stops it.

    With r = sqrt(memory): a job of prompt memory - r and output r at round 0, and r jobs of prompt
    r - 1 and output 1 at round 1. While the first runs, less than r positions are free, so all the
    others wait for its end: total r + r^2. Whoever lets them pass first needs 2 r + 2
    (`adversary_best`), so the ratio is r / 2. `memory` is a square of at least 4.
    """
    root = math.isqrt(memory)
    if root * root != memory or root < 2:
        raise ConfigError(f"the adversary needs a square memory of at least 4, got {memory}")
    return (Job(0, memory - root, root), *(Job(1, root - 1, 1) for _ in range(root)))


def adversary_best(memory: int) -> int:
    """Total latency of the schedule that serves the short jobs first and the long one after."""
    return 2 * math.isqrt(memory) + 2
