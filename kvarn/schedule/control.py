"""`ControlPlane`: everything that is decided, for one engine. The left half of the step.

The real engine and the simulator drive the same object; only the executor and the clock differ:

    plan = control.plan(now)
    result = executor.run(plan)
    progress = control.apply(plan, result, now)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kvarn.core.errors import QueueFull
from kvarn.core.keep import Filter, Keep, Select
from kvarn.core.output import EngineStats, FinishReason
from kvarn.core.plan import Draft, SeqId, Span, SpanResult, StepPlan, StepResult
from kvarn.core.request import Request
from kvarn.core.seq import Seq, Status
from kvarn.kv.manager import KVManager
from kvarn.schedule import Scheduler
from kvarn.schedule.planner import Planner, Queues

#: what stays of a request's KV, by group; (): all of it
Keeps = Callable[[Request], tuple[Keep, ...]]
#: what is read of it; None: all that stays
Selects = Callable[[Request], Select | None]
#: what says which tokens of a prompt go on; None: they all do
Filters = Callable[[Request], Filter | None]


def keep_all(request: Request) -> tuple[Keep, ...]:
    """Every position of every request."""
    return ()


def see_all(request: Request) -> Select | None:
    """Every row sees all that stays."""
    return None


def take_whole(request: Request) -> Filter | None:
    """Every token of every prompt goes on."""
    return None


@dataclass(slots=True)
class Progress:
    """What a step brought to one sequence."""

    seq: Seq
    tokens: list[int]  #: newly committed
    finish: FinishReason | None = None
    stop: int | None = None  #: the token that ended it
    extra: SpanResult | None = None


@dataclass(slots=True, frozen=True)
class Capacity:
    """Limits of one engine."""

    budget: int  #: positions computed in one step
    max_seqs: int  #: sequences that run at once
    max_len: int  #: longest sequence [tokens]
    max_queue: int  #: sequences that may wait


@dataclass(slots=True)
class Counters:
    """What has happened so far."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    verify_steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    queue_time: float = 1.0  #: moving average of the time to admission [s]


class ControlPlane:
    """Requests, queues, pages and plans of one engine."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv: KVManager,
        capacity: Capacity,
        keeps: Keeps = keep_all,
        selects: Selects = see_all,
        filters: Filters = take_whole,
    ) -> None:
        self.scheduler = scheduler
        self.kv = kv
        self.capacity = capacity
        self.keeps = keeps
        self.selects = selects
        self.filters = filters
        self.budget = capacity.budget  #: positions of a step; lower after running out of memory
        self.max_seqs = capacity.max_seqs  #: sequences that run at once; likewise
        self.queues = Queues()
        self.seqs: dict[SeqId, Seq] = {}
        self._by_request: dict[str, list[Seq]] = {}
        self._gone: list[SeqId] = []  # left since the last plan: the executor must forget them
        self._drafted: list[SeqId] = []  # since the last plan
        self._next_seq = 0
        self.steps = 0
        self.counters = Counters()

    # requests

    def add(self, request: Request) -> list[Seq]:
        """Queue a request (already validated) as `n` sequences."""
        n = request.sampling.n
        if len(self.queues.waiting) + n > self.capacity.max_queue + self.free_places:
            raise QueueFull(
                f"the queue is full ({self.capacity.max_queue} waiting); try again later",
                retry_after=max(1.0, round(self.counters.queue_time)),
            )
        seqs: list[Seq] = []
        for index in range(n):
            seq = self._new_seq(request, index)
            seq.sibling = seqs[0] if seqs else None
            seqs.append(seq)
            self.seqs[seq.id] = seq
            self.queues.enqueue(seq)
        self._by_request[request.id] = seqs
        return seqs

    @property
    def free_places(self) -> int:
        """Sequences that could run beside those that do; they need no place in the queue."""
        return self.max_seqs - len(self.queues.running)

    def _new_seq(self, request: Request, index: int) -> Seq:
        params = request.sampling
        room = self.capacity.max_len - len(request.prompt)
        outputs = room if params.max_tokens is None else min(params.max_tokens, room)
        if request.pooling is not None:
            outputs = 0
        generates = outputs > 0
        stops = set(params.stop_token_ids)
        if not params.ignore_eos or params.grammar is not None:  # a grammar ends by eos
            stops.update(request.eos_ids)
        rule = self.filters(request) if generates else None
        seq = Seq(
            id=self._next_seq,
            request=request,
            index=index,
            tokens=list(request.prompt),
            goal=len(request.prompt) + max(outputs - 1, 0),
            order=(request.priority, self._next_seq),
            generates=generates,
            stops=frozenset(stops),
            keep=self.keeps(request) if generates and rule is None else (),
            select=self.selects(request),
            filter=rule,
        )
        self._next_seq += 1
        return seq

    def abort(self, request_id: str, now: float) -> list[Seq]:
        """Drop a request; its pages are free at once, its rows leave with the next plan."""
        seqs = [s for s in self._by_request.get(request_id, []) if s.status is not Status.FINISHED]
        for seq in seqs:
            self.finish(seq, "abort", now)
        return seqs

    def finish(self, seq: Seq, reason: FinishReason, now: float, keep: bool = True) -> None:
        """End a sequence. `keep=False`: what it computed last must not serve prefix hits."""
        self.queues.remove(seq)
        if seq.status is Status.RUNNING:
            self.kv.release(seq, now, keep)
            self._gone.append(seq.id)
        seq.status = Status.FINISHED
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        del self.seqs[seq.id]
        siblings = self._by_request[seq.request.id]
        if all(s.status is Status.FINISHED for s in siblings):
            del self._by_request[seq.request.id]

    def knows(self, request_id: str) -> bool:
        """Whether the request is open."""
        return request_id in self._by_request

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs, or the executor has rows to forget."""
        return bool(self.seqs or self._gone)

    # the step

    def draft(self, drafts: Mapping[SeqId, Draft]) -> None:
        """Have the next plan verify these continuations of running sequences, and no later one."""
        for seq, draft in drafts.items():
            self.seqs[seq].draft = draft
        self._drafted = list(drafts)

    def plan(self, now: float) -> StepPlan:
        """Decide the next step."""
        plan = StepPlan(self.steps, stops=self._gone)
        self._gone = []
        self.steps += 1
        step = Planner(plan, self.queues, self.kv, self.budget, self.max_seqs, now)
        self.scheduler.plan(step, now)
        step.compact()
        for seq_id in self._drafted:
            self.seqs[seq_id].draft = None
        self._drafted = []
        count = self.counters
        count.preemptions += len(step.preempted)
        count.verify_steps += bool(plan.drafts)
        for seq in step.admitted:
            count.prompt_tokens += len(seq.request.prompt)
            count.cached_tokens += seq.cached
            count.queue_time += 0.1 * (now - seq.request.arrival - count.queue_time)
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[Progress]:
        """Commit what the step gave: tokens, ends, first-token times."""
        progress = []
        extras = result.extras
        for i, span in enumerate(plan.spans):
            seq = self.seqs.get(span.seq)
            if seq is None:
                continue  # it ended while this step was in flight
            extra = extras.get(i) if extras else None
            if extra is not None and extra.error is not None:
                self.finish(seq, "error", now)
                progress.append(Progress(seq, [], "error", None, extra))
            elif span.layers:
                if extra is not None and extra.choice is not None and seq.filter is not None:
                    self._go_on(seq, extra.choice.positions, now)
            elif span.wants_logits:
                seq.pending -= 1
                if span.drafts:
                    self._settle(seq, span.drafts, len(result.tokens[i]) - 1)
                progress.append(self._commit(seq, result.tokens[i], extra, now))
            elif not seq.generates and span.start + span.length >= seq.goal:
                reason: FinishReason = "length" if seq.request.pooling is None else "stop"
                self.finish(seq, reason, now)
                progress.append(Progress(seq, [], reason, None, extra))
            elif extra is not None:
                progress.append(Progress(seq, [], None, None, extra))
        return progress

    def _go_on(self, seq: Seq, chosen: list[int], now: float) -> None:
        """What goes on of a prompt is known: it waits for its place again, and so do siblings."""
        if seq.status is Status.RUNNING:
            self._leave(seq, now)
            self.queues.enqueue(seq)
        keep = self.keeps(seq.request)
        seq.go_on(chosen, keep)
        for other in self._by_request[seq.request.id]:
            if other.filter is not None and other.status is Status.WAITING:
                other.go_on(chosen, keep)

    def _settle(self, seq: Seq, drafts: int, accepted: int) -> None:
        """Of `drafts` positions computed at the end of `seq`, only the `accepted` first count."""
        seq.computed -= drafts - accepted
        self.counters.drafted_tokens += drafts
        self.counters.accepted_tokens += accepted

    def skip(self, steps: int) -> None:
        """Count decode steps of every running sequence that were taken at once (`coast`).

        Nobody is told of those that left before: there is no plan to say it.
        """
        self._gone = []
        self.steps += steps
        self.counters.output_tokens += steps * len(self.queues.running)
        last = self.steps - 1
        for seq in self.queues.running:
            seq.planned_step, seq.planned_from = last, seq.computed - 1

    def _commit(
        self, seq: Seq, tokens: list[int], extra: SpanResult | None, now: float
    ) -> Progress:
        """Append new tokens up to the first that ends the sequence."""
        if seq.first_token_at is None:
            seq.first_token_at = now
        known = seq.tokens
        for i, token in enumerate(tokens):
            known.append(token)
            if token in seq.stops and seq.n_output > seq.request.sampling.min_tokens:
                return self._end(seq, tokens[: i + 1], "stop", token, extra, now)
            if len(known) > seq.goal:
                return self._end(seq, tokens[: i + 1], "length", None, extra, now)
        self.counters.output_tokens += len(tokens)
        return Progress(seq, tokens, None, None, extra)

    def _end(
        self,
        seq: Seq,
        tokens: list[int],
        reason: FinishReason,
        stop: int | None,
        extra: SpanResult | None,
        now: float,
    ) -> Progress:
        self.counters.output_tokens += len(tokens)
        self.finish(seq, reason, now)
        return Progress(seq, tokens, reason, stop, extra)

    def fail(self, plans: Iterable[StepPlan], now: float) -> list[Seq]:
        """A step broke: end every sequence in `plans`, and distrust what they computed."""
        broken: dict[SeqId, Seq] = {}
        for plan in plans:
            for span in plan.spans:
                if span.seq in self.seqs:
                    broken[span.seq] = self.seqs[span.seq]
        for seq in broken.values():
            self.finish(seq, "error", now, keep=False)
        self.kv.clear(now)
        return list(broken.values())

    def retreat(self, plans: Iterable[StepPlan], now: float) -> list[Seq]:
        """The device had no room for steps: put their sequences back, and plan smaller ones.

        Returns those that ended because no smaller step could hold them. Pages are all intact, but
        what the steps should have computed is not there, so nothing of it may serve prefix hits.
        """
        ended = []
        for plan in plans:
            large = plan.n_tokens > len(plan.spans)
            if large:
                self.budget = max(plan.n_tokens // 2, 1)
            elif len(plan.spans) > 1:
                self.max_seqs = len(plan.spans) // 2
            for span in plan.spans:
                seq = self.seqs.get(span.seq)
                if seq is None:
                    continue
                seq.pending -= span.wants_logits
                if plan.n_tokens == 1:
                    self.finish(seq, "error", now, keep=False)
                    ended.append(seq)
                elif seq.status is Status.RUNNING:
                    self._put_back(seq, now)
        self.kv.clear(now)
        return ended

    def _put_back(self, seq: Seq, now: float) -> None:
        """A running sequence waits again and will be computed anew."""
        self._leave(seq, now)
        seq.preemptions += 1
        self.counters.preemptions += 1
        self.queues.enqueue(seq)

    def _leave(self, seq: Seq, now: float) -> None:
        """A running sequence gives all up, and none of it may serve prefix hits."""
        self.queues.remove(seq)
        self.kv.release(seq, now, keep=False)
        self._gone.append(seq.id)

    def clear_prefixes(self, now: float) -> None:
        """Forget every cached prefix that nobody uses."""
        self.kv.clear(now)

    # what is there

    def context(self, span: Span) -> int:
        """Positions that the first row of a planned `span` reads beside its own, for prices."""
        seq = self.seqs.get(span.seq)
        if seq is None:
            return span.start  # it ended after the step was planned
        if seq.select is not None:
            return seq.select.seen(seq.prompt_len, span.start)
        if not seq.keep and not self.kv.has_heads:
            return span.start  # windows of whole layers are the cost model's own business
        return int(self.kv.seen(seq, span.start))

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        count = self.counters
        return EngineStats(
            running=len(self.queues.running),
            waiting=len(self.queues.waiting),
            kv_pages=self.kv.pages[0],
            kv_pages_used=self.kv.held(0),
            kv_pages_cached=self.kv.idle(0),
            preemptions=count.preemptions,
            prompt_tokens=count.prompt_tokens,
            cached_tokens=count.cached_tokens,
            output_tokens=count.output_tokens,
            drafted_tokens=count.drafted_tokens,
            accepted_tokens=count.accepted_tokens,
            verify_steps=count.verify_steps,
            steps=self.steps,
            finished=dict(count.finished),
        )

    def check_integrity(self) -> list[str]:
        """Differences found (and repaired) between the page books and a recount."""
        return self.kv.check_integrity(self.queues.running)
