"""`Speculating`: an instance whose steps verify drafts.

Who is drafted for, and how much, is decided by the engine's own `Speculation` with its length
control, which learns costs from virtual times.

The loop is `Engine.step` with drafts: a step is planned when what its drafts follow is known. In
the overlapped loop the control is asked when a step begins; where it wants no drafts the next step
is planned at once, and where it does that waits for the end. Steps with drafts, and the one behind
them, are so priced with nothing of the host's part hidden; but where a model drafts and the control
does not look at drafts within a round, as much of it as the passes of the draft take: the engine
hands the step over while these run, and begins them behind the step before.

Steps are never taken together: whether drafts are wanted is asked before each of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kvarn.core.plan import SeqId, StepPlan
from kvarn.core.seq import Seq
from kvarn.cost.shape import CostModel, Estimate, StepShape, shape_of, total
from kvarn.schedule.control import Progress
from kvarn.sim.drafter import Drafter
from kvarn.sim.heap import NS
from kvarn.sim.instance import Instance
from kvarn.sim.learner import Learner
from kvarn.sim.steps import Run
from kvarn.speculate.speculation import Speculation


@dataclass(slots=True, kw_only=True)
class Speculating(Instance):
    """An `Instance` with a drafter, and perhaps with somebody who teaches it."""

    speculation: Speculation
    drafter: Drafter  #: its proposer; its clock is that of the speculation
    late: CostModel  #: prices of steps that are planned after the one before
    learner: Learner | None = None  #: its trainer
    paused: int = 0  #: time in which all steps waited for an update [ns]
    _ready: int = 0  #: no step begins before [ns]
    _wanted: dict[SeqId, int] = field(default_factory=dict)  #: drafts, of whom: asked in a step
    _drafted: bool = False  #: the step under way, or the last one, verifies drafts

    def noticed(self, now: int, token_of: Callable[[Seq], int]) -> int | None:
        """Somebody comes: what is planned is planned, and nothing else is."""
        return None

    def start(self, now: int) -> int | None:
        """Begin the next step; when it ends [ns], or None with nothing to do."""
        if self._ready > now:
            return self._wait(now)
        if not self.control.has_work:
            self._drafted = False  # whoever comes next finds nothing to wait for
            self._teach(now)
            return None
        plan, self._ahead = self._ahead, None
        if plan is not None and plan.spans:
            return self._go(plan, now, self.cost, Estimate())
        clock, self.drafter.spent = self.drafter.clock, Estimate()
        wanted, self._wanted = self._wanted, {}
        if not wanted:
            self._teach(now)
            if self._ready > now:
                return self._wait(now)
            wanted = self.speculation.lengths(self.control)
        clock.now = now / NS
        drafts = self.speculation.propose(self.control, wanted) if wanted else {}
        if drafts:
            self.control.draft(drafts)
        late = self.late if wanted or self._drafted else self.cost
        plan = self.control.plan(clock.now)
        return self._go(plan, now, late, self.drafter.spent) if plan.spans else None

    def _teach(self, now: int) -> None:
        """Nothing is drafted and nothing judged: the trainer has its turn, and may take time."""
        clock = self.drafter.clock
        clock.now = now / NS
        self.speculation.between_steps(self.control)
        self._ready = now + round((clock.now - now / NS) * NS)

    def _wait(self, now: int) -> int:
        """An update is made between steps: none begins before it has ended."""
        self._run = Run(StepShape(), now, None)
        self._run.take(Estimate(host=(self._ready - now) / NS))
        self.version += 1
        return self._run.end

    def _go(self, plan: StepPlan, now: int, cost: CostModel, drafting: Estimate) -> int:
        """Run a planned step, after what drafting for it takes; its end [ns]."""
        self._run = Run(self._shape(plan), now, plan)
        price = self._partway(plan) if plan.partial else cost.step(self._run.shape)
        if self._ahead_of_host and plan.drafts:
            price = replace(price, host=max(0.0, price.host - drafting.seconds))
        parts = [drafting, price]
        if self.learner is not None:
            parts.append(Estimate(host=price.seconds * (self.learner.slowdown - 1.0)))
        self._run.take(total(parts))
        self.version += 1
        self._drafted = bool(plan.drafts)
        if self.overlap and not self._drafted:
            self._teach(now)
            self._wanted = self.speculation.lengths(self.control)
            if not self._wanted and self.control.has_work:
                self._ahead = self.control.plan(self.drafter.clock.now)
        return self._run.end

    @property
    def _ahead_of_host(self) -> bool:
        """Whether the host works while the device drafts."""
        drafts_itself = self.drafter.cost is not None
        return self.overlap and drafts_itself and not self.speculation.length.looks

    def _shape(self, plan: StepPlan) -> StepShape:
        """A draft is judged by the logits of the row before it: each is a row of the head."""
        context = self.control.context
        shape = shape_of((context(s), s.length, s.wants_logits) for s in plan.spans)
        return replace(shape, n_logits=shape.n_logits + sum(s.drafts for s in plan.spans))

    def finish(self, now: int, token_of: Callable[[Seq], int]) -> list[Progress]:
        """Commit what the step that ends now has brought; who made progress."""
        run = self._run
        assert run is not None and run.end == now, "a run ends when it said it would"
        self._run = None
        if run.plan is None:
            self.paused += now - run.start
            return []
        tokens = []
        for span in run.plan.spans:
            seq = self.control.seqs.get(span.seq)
            if seq is None or not span.wants_logits:
                tokens.append(list[int]())
                continue
            stood = self.drafter.stand(seq, span.drafts) if span.drafts else 0
            tokens.append([token_of(seq)] * (stood + 1))
        result, progress = self._record(run, run.plan, tokens)
        self.speculation.observe(run.plan, result, (now - run.start) / NS)
        more = [one for one in progress if len(one.tokens) > 1]
        self.watcher.accepted([one.seq for one in more], [len(one.tokens) - 1 for one in more])
        for one in progress:
            if one.finish is not None:
                self.speculation.forget(one.seq)
        return progress

    def abort(self, request: str, now: int) -> list[Seq]:
        """See `Instance`."""
        return self._forgotten(self.control.abort(request, now / NS))

    def unstick(self, now: int) -> Seq | None:
        """See `Instance`."""
        seq = Instance.unstick(self, now)
        self._forgotten([] if seq is None else [seq])
        return seq

    def _forgotten(self, seqs: list[Seq]) -> list[Seq]:
        for seq in seqs:
            self.speculation.forget(seq)
        return seqs
