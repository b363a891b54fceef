"""`Instance`: one engine in virtual time. Its decisions are the engine's own; steps are priced.

The loop is the engine's `plan, execute, apply`. What is simulated is the executor: a step takes
what the cost model says, and commits one token for each span that wants logits. Output lengths come
from the requests (their `max_tokens`); a generated token is unlike any other sequence's, so it
serves no prefix hit of another request.

While only decodes run and nobody waits, steps are taken together (`coast`), up to the one that ends
a sequence; an arrival cuts such a run at the end of the step in which it falls, exactly where step
by step it would be noticed.

The engine's overlapped loop plans step n+1 when step n begins: whoever comes during n enters n+2.
Here that plan is made late, with the time and the state of then: when somebody comes, or when the
step ends, unless decodes go on that are planned alike whenever it is done. A run of decodes stops
before a step behind which the plan would not be: one that takes the last pages, or ends a sequence
while another is about to take a page. An arrival during step n cuts a run behind n+1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvarn.core.plan import Choice, SpanResult, StepPlan, StepResult
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.cost.partway import partway
from kvarn.cost.rounded import Rounded
from kvarn.cost.shape import CostModel, Estimate, StepShape, shape_of
from kvarn.schedule.coast import can_coast, coast, settle, steps_to_end
from kvarn.schedule.control import ControlPlane, Progress
from kvarn.sim.heap import NS
from kvarn.sim.steps import Run

Gaps = Sequence[tuple[int, int]]  #: (ns, how many in a row), in order


class Watcher(Protocol):
    """Sees what instances do: results, traces and plots are made of it."""

    def committed(
        self, instance: "Instance", seqs: Sequence[Seq], first: int, last: int, gaps: Gaps
    ) -> None:
        """Each of `seqs` got tokens, from `first` to `last` [ns], with `gaps` between them."""
        ...

    def stepped(self, instance: "Instance", shape: StepShape, start: int, end: int) -> None:
        """One step, or a run of decode steps (`shape` is then the first's), took place [ns].

        Called while the sequences that it ends still hold their pages.
        """
        ...

    def accepted(self, seqs: Sequence[Seq], tokens: Sequence[int]) -> None:
        """Each of `seqs` got so many tokens more with the one just committed: drafts that stood."""
        ...


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
    _run: Run | None = None
    _ahead: StepPlan | None = None  #: with `overlap`, the step behind the one under way

    @property
    def is_busy(self) -> bool:
        """Whether steps are under way."""
        return self._run is not None

    def add(self, request: Request) -> None:
        """Queue a request; `QueueFull` if there is no place."""
        self.control.add(request)

    def abort(self, request: str, now: int) -> list[Seq]:
        """Drop a request at `now` [ns]; the sequences that it ends."""
        return self.control.abort(request, now / NS)

    def noticed(self, now: int, token_of: Callable[[Seq], int]) -> int | None:
        """Somebody comes at `now`, and is not there yet: the new end of the run, if it moved.

        A run of decodes is cut at the end of the step under way; the overlapped loop has planned
        the one after it. Where that ends the run anyway, what it planned is planned now.
        """
        run = self._run
        if run is None:
            return None
        if self.overlap and (run.plan is not None or run.committed):
            self._plan_ahead(run)
            return None
        steps = run.ended(now) + 1 + self.overlap
        if steps < run.steps:
            run.keep(steps)
            self.version += 1
            return run.end
        if not self.overlap:
            return None
        if run.steps == steps_to_end(self.control):  # who ends still holds pages in the next plan
            return self._step_in(run, steps - 2, token_of)
        if steps > run.steps:
            self._coasted(run, token_of)
            run.committed = True
            self._plan_ahead(run)
        return None

    def start(self, now: int) -> int | None:
        """Begin the next step, or run of steps; when it ends [ns], or None with nothing to do."""
        if not self.control.has_work:
            return None
        plan, self._ahead = self._ahead, None
        if plan is not None and plan.spans:
            return self._begin(plan, now)
        steps = self._coastable()
        if steps > 0:
            self._run = self._decodes(now, steps)
        else:
            plan = self.control.plan(now / NS)
            if not plan.spans:
                return None
            return self._begin(plan, now)
        self.version += 1
        return self._run.end

    def finish(self, now: int, token_of: Callable[[Seq], int]) -> list[Progress]:
        """Commit the run that ends now; who made progress (of coasted ones, who ended)."""
        run = self._run
        assert run is not None and run.end == now, "a run ends when it said it would"
        self._run = None
        if run.plan is None:
            progress = [] if run.committed else self._coasted(run, token_of)
            if self.overlap and self.control.queues.waiting:
                self._plan_ahead(run)
            return progress
        if self.overlap and self._coastable(in_flight=1) < 1:
            self._plan_ahead(run)
        tokens = [
            [token_of(self.control.seqs[span.seq])]
            if span.wants_logits and span.seq in self.control.seqs
            else []
            for span in run.plan.spans
        ]
        return self._record(run, run.plan, tokens)[1]

    def _record(
        self, run: Run, plan: StepPlan, tokens: list[list[int]]
    ) -> tuple[StepResult, list[Progress]]:
        """A planned step has ended with these tokens, by span."""
        self._account(run)
        now = run.end
        extras = choices(self.control, plan) if plan.partial else {}
        result = StepResult(plan.step, tokens, extras, (now - run.start) / NS)
        progress = self.control.apply(plan, result, now / NS)
        self.watcher.committed(self, [one.seq for one in progress if one.tokens], now, now, ())
        return result, progress

    def _begin(self, plan: StepPlan, now: int) -> int:
        """Run a planned step; its end [ns]."""
        context = self.control.context
        shape = shape_of((context(s), s.length, s.wants_logits) for s in plan.spans)
        price = self._partway(plan) if plan.partial else self.cost.step(shape)
        self._run = Run(shape, now, plan)
        self._run.take(price)
        self.version += 1
        return self._run.end

    def _partway(self, plan: StepPlan) -> Estimate:
        """The price of a step in which filtered prompts leave after the first layers."""
        context = self.control.context
        spans = [(context(s), s.length, s.wants_logits, s.layers) for s in plan.spans]
        return partway(self.cost, spans, self.control.kv.n_layers)

    def _coastable(self, in_flight: int = 0) -> int:
        """Decode steps that may be taken at once, after those `in_flight`."""
        if not self.coasts:
            return 0
        most = _AT_ONCE_ROUNDED if isinstance(self.cost, Rounded) else _AT_ONCE
        return can_coast(self.control, most, in_flight, self.overlap)

    def _plan_ahead(self, run: Run) -> None:
        """What the overlapped loop decided when the last step of `run` began, if not done yet."""
        if self._ahead is None and self.control.has_work:
            self._ahead = self.control.plan(run.began(run.steps - 1))

    def _step_in(self, run: Run, steps: int, token_of: Callable[[Seq], int]) -> int:
        """Commit the first `steps` decodes of a run; the next is under way, one more is planned."""
        begun = run.start
        if steps:
            run.keep(steps)
            begun = run.end
            self._coasted(run, token_of)
        end = self._begin(self.control.plan(begun / NS), begun)
        assert self._run is not None
        self._plan_ahead(self._run)
        return end

    def _coasted(self, run: Run, token_of: Callable[[Seq], int]) -> list[Progress]:
        """Commit a run of decodes; who ended with it."""
        seqs = coast(self.control, run.steps, run.began, token_of)
        self._account(run)
        progress = settle(self.control, seqs, run.end / NS)
        first = run.start + run.stretches[0].tick
        self.watcher.committed(self, seqs, first, run.end, run.gaps())
        return progress

    def _account(self, run: Run) -> None:
        self.busy += run.end - run.start
        self.joules, self.unmeasured = run.spent(self.joules, self.unmeasured)
        self.watcher.stepped(self, run.shape, run.start, run.end)

    def unstick(self, now: int) -> Seq | None:
        """Nothing runs and the first in the queue was not let in: end it, for it never will be."""
        queues = self.control.queues
        if self.is_busy or queues.running or not queues.waiting:
            return None
        seq = queues.waiting[0]
        self.control.finish(seq, "error", now / NS)
        return seq

    def _decodes(self, now: int, most: int) -> Run:
        """Price `most` decode steps, each attending to one position more a sequence."""
        known = [len(seq.tokens) for seq in self.control.queues.running]
        n, total, longest = len(known), sum(known), max(known)
        run = Run(StepShape((), n, total, longest, n), now, None)
        cost = self.cost
        if isinstance(cost, Rounded):
            while run.steps < most:
                done = run.steps
                price, alike = cost.decodes(n, total + done * n, longest + done)
                run.take(price, min(alike, most - done))
        else:
            for done in range(most):
                run.take(cost.step(StepShape((), n, total + done * n, longest + done, n)))
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
#: the same where many steps have one price, and forming a run costs more than its prices
_AT_ONCE_ROUNDED = 128
