"""Hindsight: the best that any schedule could do for given requests under a KV limit.

The round model (arXiv 2502.07115, section 2): a job started at round p >= its arrival is never
stopped; it makes one token a round and holds prompt + (t - p) positions in round t, for
p < t <= p + output; the positions held in one round never exceed the memory. The cost is the total
latency, sum of (p + output - arrival), in rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvarn.core.errors import ConfigError
from kvarn.theory.volume import mean_busy_flow, srpt_flow


@dataclass(slots=True, frozen=True)
class Job:
    """A request of the round model."""

    arrival: int  #: first round before which it may start
    prompt: int  #: positions that it holds before its first token [tokens]
    output: int  #: rounds that it runs, one token each

    @property
    def peak(self) -> int:
        """Positions in its last round [tokens]."""
        return self.prompt + self.output

    @property
    def volume(self) -> int:
        """Positions held, summed over its rounds [token rounds]."""
        return self.prompt * self.output + self.output * (self.output + 1) // 2


@dataclass(slots=True, frozen=True)
class Hindsight:
    """What the integer programme, or its relaxation, found."""

    bound: float  #: no schedule does better than this
    value: float | None  #: reached by `starts`; None without a schedule
    starts: tuple[int | None, ...]  #: start of each job; None: not served (or not known)


def check_jobs(jobs: Sequence[Job], memory: int) -> None:
    """Raises `ConfigError` unless every job can run alone in `memory` positions."""
    for i, job in enumerate(jobs):
        if job.arrival < 0 or job.prompt < 0 or job.output < 1:
            raise ConfigError(f"job {i}: needs arrival >= 0, prompt >= 0, output >= 1; got {job}")
        if job.peak > memory:
            raise ConfigError(
                f"job {i} grows to {job.peak} positions but the memory holds {memory}; "
                f"give at least {job.peak}"
            )


def latency_bound(jobs: Sequence[Job], memory: int) -> float:
    """At most the total latency of any schedule: the fluid machine, or no waiting at all.

    Rounds give out at most `memory` positions and a job must be given its volume, so a schedule is
    one of the fluid machine; and a job takes `output` rounds even if it never waits. Both hold
    with preemption, and with kill and restart.
    """
    check_jobs(jobs, memory)
    fluid = srpt_flow(((job.arrival, job.volume) for job in jobs), memory)
    return max(fluid, float(sum(job.output for job in jobs)))


def relaxed_bound(jobs: Sequence[Job], memory: int) -> float:
    """As `latency_bound`, but at most the relaxed programme as well, whatever the arrivals.

    In the relaxation a job may start in fractions. A fraction that ends at C is worked off at no
    more than `memory` a round, so on average volume / (2 memory) before C or earlier: its latency
    is at least its mean busy time plus that, which `mean_busy_flow` minimises.
    """
    check_jobs(jobs, memory)
    fluid = mean_busy_flow(((job.arrival, job.volume) for job in jobs), memory)
    return max(fluid, float(sum(job.output for job in jobs)))


def safe_horizon(jobs: Sequence[Job]) -> int:
    """A round by which some best schedule has ended: after the last arrival one job always runs."""
    return max(job.arrival for job in jobs) + sum(job.output for job in jobs)


def best_latency(
    jobs: Sequence[Job],
    memory: int,
    *,
    integral: bool = True,
    horizon: int | None = None,
    seconds: float = 60.0,
) -> Hindsight:
    """Least total latency, by the hindsight integer programme; `integral=False` relaxes it.

    x[i, t] = 1 starts job i at round t; minimise sum t x[i, t] + output - arrival subject to
    sum_t x[i, t] = 1 and, for every round t, sum over k in [t - output, t) of
    (prompt + t - k) x[i, k] <= memory. Rows: jobs + rounds; columns: jobs x rounds.

    A `horizon` shorter than `safe_horizon` keeps it small: a job may then also start "at or after"
    the horizon at the price of the horizon and for no memory, so `bound` stays a bound, and
    `value` is None if the solution uses that way out. After `seconds` the bound proven so far is
    returned. Practical for about 50 jobs that are short against the memory, or about 10 that fill
    half of it each: there the relaxation is loose. Raises `ConfigError` without scipy.
    """
    check_jobs(jobs, memory)
    if not jobs:
        return Hindsight(0.0, 0.0, ())
    end = min(horizon or safe_horizon(jobs), safe_horizon(jobs))
    if end <= max(job.arrival for job in jobs):
        raise ConfigError(f"the horizon {end} lies before the last arrival; give a later round")
    columns = [(i, t) for i, job in enumerate(jobs) for t in range(job.arrival, end + 1)]
    cost = [t + jobs[i].output - jobs[i].arrival for i, t in columns]
    fixed = _Programme(jobs, memory, columns, end)
    found = fixed.solve(cost, at_least=1, integral=integral, seconds=seconds)
    starts = fixed.starts(found) if integral else (None,) * len(jobs)
    return Hindsight(fixed.bound(found, integral), _latency(jobs, starts, end), starts)


def _latency(jobs: Sequence[Job], starts: Sequence[int | None], end: int) -> float | None:
    """Total latency, None unless every job starts before `end`."""
    total = 0
    for job, start in zip(jobs, starts):
        if start is None or start >= end:
            return None
        total += start + job.output - job.arrival
    return float(total)


def best_goodput(
    jobs: Sequence[Job], deadlines: Sequence[int], memory: int, *, seconds: float = 60.0
) -> Hindsight:
    """The most jobs that can end by their deadlines (rounds); the others need not be served.

    The same programme with sum_t x[i, t] <= 1 and only starts up to deadline - output, which is
    all that a job can gain from. `bound` is the number no schedule exceeds.
    """
    check_jobs(jobs, memory)
    if len(deadlines) != len(jobs):
        raise ConfigError(f"{len(jobs)} jobs need as many deadlines, got {len(deadlines)}")
    latest = [deadline - job.output for job, deadline in zip(jobs, deadlines)]
    columns = [(i, t) for i, job in enumerate(jobs) for t in range(job.arrival, latest[i] + 1)]
    if not columns:
        return Hindsight(0.0, 0.0, (None,) * len(jobs))
    fixed = _Programme(jobs, memory, columns, max(latest) + 1)
    found = fixed.solve([-1] * len(columns), at_least=0, integral=True, seconds=seconds)
    starts = fixed.starts(found)
    value = float(sum(start is not None for start in starts)) if found.x is not None else None
    return Hindsight(-fixed.bound(found, True), value, starts)


@dataclass(slots=True)
class _Programme:
    """The rows that both programmes share, and the call of the solver (HiGHS in scipy)."""

    jobs: Sequence[Job]
    memory: int
    columns: list[tuple[int, int]]  #: (job, start)
    end: int  #: a start at this round holds no memory

    def solve(self, cost: Sequence[float], *, at_least: int, integral: bool, seconds: float) -> Any:
        """scipy's result object for min cost x."""
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
            from scipy.sparse import csc_array
        except ImportError as error:
            raise ConfigError(
                "the hindsight programme needs scipy: pip install kvarn[theory]"
            ) from error
        n = len(self.jobs)
        rounds = max(t + self.jobs[i].output for i, t in self.columns)
        values, rows, starts = self._entries()
        matrix = csc_array((values, rows, starts), shape=(n + rounds, len(self.columns)))
        low = [at_least] * n + [0] * rounds
        high = [1] * n + [self.memory] * rounds
        return milp(
            cost,
            integrality=[int(integral)] * len(cost),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, low, high),
            options={"time_limit": seconds},
        )

    def _entries(self) -> tuple[list[int], list[int], list[int]]:
        """The matrix by columns: values, their rows, where each column starts."""
        n, values, rows, starts = len(self.jobs), [], [], [0]
        for i, t in self.columns:
            job = self.jobs[i]
            values.append(1)
            rows.append(i)
            if t < self.end:
                values.extend(range(job.prompt + 1, job.peak + 1))
                rows.extend(range(n + t, n + t + job.output))
            starts.append(len(values))
        return values, rows, starts

    def starts(self, found: Any) -> tuple[int | None, ...]:
        """The start of every job in an integral solution; None for those without."""
        starts: list[int | None] = [None] * len(self.jobs)
        for (i, t), x in zip(self.columns, () if found.x is None else found.x):
            if x > 0.5:
                starts[i] = t
        return tuple(starts)

    def bound(self, found: Any, integral: bool) -> float:
        """The proven bound of the objective; raises `ConfigError` when there is none."""
        proven = found.mip_dual_bound if integral else found.fun
        if proven is None or (not integral and found.status != 0):
            raise ConfigError(f"the solver gave no bound ({found.message}); allow more seconds")
        return float(proven)
