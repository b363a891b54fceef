"""`Instance`: one engine in virtual time. Its decisions are the engine's own; steps are priced.

The loop is the engine's `plan, execute, apply`. What is simulated is the executor: a step takes
what the cost model says, and commits one token for each span that wants logits. Output lengths come
from the requests (their `max_tokens`); a generated token is unlike any other sequence's, so it
serves no prefix hit of another request.

While only decodes run and nobody waits, steps are taken together (`coast`); an arrival cuts such a
run at the end of the step in which it falls, exactly where step by step it would be noticed.

The engine's overlapped loop plans step n+1 when step n begins: whoever comes during n enters n+2.
Here that plan is made late, with the time and the state of then: when somebody comes, or when the
step ends, unless decodes go on that are planned alike whenever it is done.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Protocol

from kvarn.core.plan import Choice, SpanResult, StepPlan, StepResult
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.cost.partway import partway
from kvarn.cost.rounded import Rounded
from kvarn.cost.shape import CostModel, Estimate, StepShape, shape_of
from kvarn.schedule.coast import can_coast, coast
from kvarn.schedule.control import ControlPlane, Progress
from kvarn.sim.heap import NS


class Watcher(Protocol):
    """Sees what instances do: results, traces and plots are made of it."""

    def committed(self, instance: "Instance", seqs: Sequence[Seq], ends: list[int]) -> None:
        """Each of `seqs` got a token at each of `ends` [ns]."""
        ...

    def stepped(self, instance: "Instance", shape: StepShape, start: int, end: int) -> None:
        """One step, or a run of decode steps (`shape` is then the first's), took place [ns]."""
        ...


@dataclass(slots=True)
class _Run:
    """Steps under way: one that was planned, or several decode steps that are taken at once."""

    shape: StepShape
    start: int  #: [ns]
    ends: list[int]  #: of each step [ns]
    joules: list[float]  #: spent by the end of each step
    unmeasured: list[float]  #: seconds outside measured data by the end of each step
    plan: StepPlan | None  #: None: the steps are coasted

    def take(self, price: Estimate, now: int, steps: int = 1) -> int:
        """`steps` more at one price, from `now` on; their end, at least a tick each later [ns]."""
        seconds = price.seconds
        unmeasured = (1.0 - price.confidence) * seconds
        tick = max(1, round(seconds * NS))
        end = now + steps * tick
        self.ends.extend(range(now + tick, end + 1, tick))
        _add_up(self.joules, price.joules, steps)
        _add_up(self.unmeasured, unmeasured, steps)
        return end


def _add_up(sums: list[float], more: float, times: int) -> None:
    """Go on with running `sums` by adding `more`, one by one: as steps priced singly would."""
    if sums:
        sums.extend(accumulate(repeat(more, times), initial=sums.pop()))
    else:
        sums.extend(accumulate(repeat(more, times)))


@dataclass(slots=True)
class Instance:
    """A control plane, a price list, and the step under way."""

    name: str
    control: ControlPlane
    cost: CostModel
    watcher: Watcher
    coasts: bool = True  #: take decode steps together; off only to test that nothing changes
    overlap: bool = False  #: the engine plans the next step while one runs
    busy: int = 0  #: time spent in steps [ns]
    joules: float = 0.0  #: spent in steps
    unmeasured: float = 0.0  #: of that, what no measured data covers [s]
    version: int = 0  #: of the run under way; an end scheduled for an older one is void
    _run: _Run | None = None
    _ahead: StepPlan | None = None  #: with `overlap`, the step behind the one under way

    @property
    def is_busy(self) -> bool:
        """Whether steps are under way."""
        return self._run is not None

    def add(self, request: Request) -> None:
        """Queue a request; `QueueFull` if there is no place."""
        self.control.add(request)

    def noticed(self, now: int, token_of: Callable[[Seq], int]) -> int | None:
        """Somebody comes at `now`, and is not there yet: the new end of the run, if it moved.

        A run of decodes is cut at the end of the step under way; the overlapped loop has planned
        the one after it.
        """
        run = self._run
        if run is None:
            return None
        if self.overlap:
            if run.plan is None:
                return self._step_in(run, bisect_left(run.ends, now), token_of)
            self._plan_ahead(run)
            return None
        steps = bisect_left(run.ends, now) + 1
        if run.plan is not None or steps >= len(run.ends):
            return None
        del run.ends[steps:], run.joules[steps:], run.unmeasured[steps:]
        self.version += 1
        return run.ends[-1]

    def start(self, now: int) -> int | None:
        """Begin the next step, or run of steps; when it ends [ns], or None with nothing to do."""
        if not self.control.has_work:
            return None
        plan, self._ahead = self._ahead, None
        if plan is not None and plan.spans:
            return self._begin(plan, now)
        most = can_coast(self.control) if self.coasts else 0
        if most > 1:
            self._run = self._decodes(now, min(most, _AT_ONCE))
        else:
            plan = self.control.plan(now / NS)
            if not plan.spans:
                return None
            return self._begin(plan, now)
        self.version += 1
        return self._run.ends[-1]

    def finish(self, now: int, token_of: Callable[[Seq], int]) -> list[Progress]:
        """Commit the run that ends now; who made progress (coasted runs end nobody)."""
        run = self._run
        assert run is not None and run.ends[-1] == now, "a run ends when it said it would"
        self._run = None
        if run.plan is None:
            self._coasted(run, len(run.ends), token_of)
            return []
        if self.overlap and not (self.coasts and can_coast(self.control, in_flight=1) > 1):
            self._plan_ahead(run)
        self._account(run, 1)
        tokens = [
            [token_of(self.control.seqs[span.seq])]
            if span.wants_logits and span.seq in self.control.seqs
            else []
            for span in run.plan.spans
        ]
        extras = choices(self.control, run.plan) if run.plan.partial else {}
        result = StepResult(run.plan.step, tokens, extras, (now - run.start) / NS)
        progress = self.control.apply(run.plan, result, now / NS)
        self.watcher.committed(self, [one.seq for one in progress if one.tokens], run.ends)
        return progress

    def _begin(self, plan: StepPlan, now: int) -> int:
        """Run a planned step; its end [ns]."""
        context = self.control.context
        shape = shape_of((context(s), s.length, s.wants_logits) for s in plan.spans)
        price = self._partway(plan) if plan.partial else self.cost.step(shape)
        self._run = _Run(shape, now, [], [], [], plan)
        self.version += 1
        return self._run.take(price, now)

    def _partway(self, plan: StepPlan) -> Estimate:
        """The price of a step in which filtered prompts leave after the first layers."""
        context = self.control.context
        spans = [(context(s), s.length, s.wants_logits, s.layers) for s in plan.spans]
        return partway(self.cost, spans, sum(len(g.layers) for g in self.control.kv.groups))

    def _plan_ahead(self, run: _Run) -> None:
        """What the overlapped loop decided when `run` began, if that is not done yet."""
        if self._ahead is None and self.control.has_work:
            self._ahead = self.control.plan(run.start / NS)

    def _step_in(self, run: _Run, steps: int, token_of: Callable[[Seq], int]) -> int:
        """Commit the first `steps` decodes of a run; the next is under way, one more is planned."""
        begun = run.ends[steps - 1] if steps else run.start
        if steps:
            self._coasted(run, steps, token_of)
        end = self._begin(self.control.plan(begun / NS), begun)
        assert self._run is not None
        self._plan_ahead(self._run)
        return end

    def _coasted(self, run: _Run, steps: int, token_of: Callable[[Seq], int]) -> None:
        """Commit the first `steps` of a run of decodes."""
        self._account(run, steps)
        times = [run.start, *run.ends[: steps - 1]]
        seqs = coast(self.control, [at / NS for at in times], token_of)
        self.watcher.committed(self, seqs, run.ends[:steps])

    def _account(self, run: _Run, steps: int) -> None:
        end = run.ends[steps - 1]
        self.busy += end - run.start
        self.joules += run.joules[steps - 1]
        self.unmeasured += run.unmeasured[steps - 1]
        self.watcher.stepped(self, run.shape, run.start, end)

    def unstick(self, now: int) -> Seq | None:
        """Nothing runs and the first in the queue was not let in: end it, for it never will be."""
        queues = self.control.queues
        if self.is_busy or queues.running or not queues.waiting:
            return None
        seq = queues.waiting[0]
        self.control.finish(seq, "error", now / NS)
        return seq

    def _decodes(self, now: int, most: int) -> _Run:
        """Price `most` decode steps, each attending to one position more a sequence."""
        n = len(self.control.queues.running)
        known = [len(seq.tokens) for seq in self.control.queues.running]
        total, longest = sum(known), max(known)
        run = _Run(StepShape((), n, total, longest, n), now, [], [], [], None)
        cost = self.cost
        alike = cost.alike if isinstance(cost, Rounded) else None
        done = 0
        while done < most:
            at, far = total + done * n, longest + done
            steps = min(alike(n, at, far), most - done) if alike else 1
            now = run.take(cost.step(StepShape((), n, at, far, n)), now, steps)
            done += steps
        return run


def choices(control: ControlPlane, plan: StepPlan) -> dict[int, SpanResult]:
    """What goes on of prompts that are through: as many tokens as an engine would choose."""
    found = {}
    for i, span in enumerate(plan.spans):
        seq = control.seqs.get(span.seq)
        rule = None if seq is None or not span.layers else seq.filter
        if seq is not None and rule is not None and span.start + span.length == seq.prompt_len:
            found[i] = SpanResult(choice=Choice(rule.spread(seq.prompt_len)))
    return found


#: decode steps priced ahead: an arrival throws the rest away, so pricing more does not pay
_AT_ONCE = 64
