"""`LoggedControl`: a control plane that writes down every call that can change a decision.

A record is a dict of plain values, one a call, in the order of the calls: what came in, when, and
for plans what was decided. Decisions follow from these calls alone, so whoever repeats them on an
equal control plane must see equal plans (`kvarn replay`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from kvarn.core.output import FinishReason
from kvarn.core.plan import Draft, SeqId, StepPlan, StepResult
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.kv.manager import KVManager
from kvarn.schedule import Scheduler
from kvarn.schedule.control import Capacity, ControlPlane, Filters, Keeps, Progress, Selects

Write = Callable[[dict[str, Any]], None]
Result = TypeVar("Result")


class LoggedControl(ControlPlane):
    """The same decisions, and a record of each call from outside to `write`."""

    def __init__(
        self, scheduler: Scheduler, kv: KVManager, capacity: Capacity, keeps: Keeps,
        selects: Selects, filters: Filters, write: Write,
    ) -> None:  # fmt: skip
        super().__init__(scheduler, kv, capacity, keeps, selects, filters)
        self._write = write
        self._depth = 0  # calls that this class makes of itself are consequences, not causes

    def _record(self, call: str, **said: Any) -> None:
        if self._depth == 0:
            self._write({"call": call, **said})

    def add(self, request: Request) -> list[Seq]:
        """Record and queue a request; one that is refused is refused again."""
        self._record("add", request=request)
        return super().add(request)

    def abort(self, request_id: str, now: float) -> list[Seq]:
        """Record and drop a request."""
        self._record("abort", id=request_id, now=now)
        return self._within(super().abort, request_id, now)

    def finish(self, seq: Seq, reason: FinishReason, now: float, keep: bool = True) -> None:
        """Record and end a sequence."""
        self._record("finish", seq=seq.id, reason=reason, now=now, keep=keep)
        super().finish(seq, reason, now, keep)

    def draft(self, drafts: Mapping[SeqId, Draft]) -> None:
        """Record and take in drafts; of one that is still being made, its length (tokens of -1)."""
        said = {seq: [draft.tokens, draft.parents] for seq, draft in drafts.items()}
        self._record("draft", drafts=said)
        super().draft(drafts)

    def plan(self, now: float) -> StepPlan:
        """Decide the next step, and record it whole."""
        plan = super().plan(now)
        self._record("plan", now=now, plan=as_record(plan))
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[Progress]:
        """Record and commit what a step gave."""
        errors = {i: extra.error for i, extra in result.extras.items() if extra.error}
        more = {}
        if plan.partial:
            more["choices"] = {i: x.choice for i, x in result.extras.items() if x.choice}
        self._record(
            "apply", step=plan.step, now=now, tokens=result.tokens, errors=errors,
            seconds=result.seconds, **more,
        )  # fmt: skip
        return self._within(super().apply, plan, result, now)

    def fail(self, plans: Iterable[StepPlan], now: float) -> list[Seq]:
        """Record and bear a step that broke."""
        plans = list(plans)
        self._record("fail", steps=[plan.step for plan in plans], now=now)
        return self._within(super().fail, plans, now)

    def retreat(self, plans: Iterable[StepPlan], now: float) -> list[Seq]:
        """Record and bear a step that did not fit."""
        plans = list(plans)
        self._record("retreat", steps=[plan.step for plan in plans], now=now)
        return self._within(super().retreat, plans, now)

    def clear_prefixes(self, now: float) -> None:
        """Record and forget every cached prefix that nobody uses."""
        self._record("clear", now=now)
        super().clear_prefixes(now)

    def check_integrity(self) -> list[str]:
        """Record and recount: a repair changes which page is taken next."""
        self._record("check")
        return super().check_integrity()

    def _within(self, call: Callable[..., Result], *arguments: Any) -> Result:
        self._depth += 1
        try:
            return call(*arguments)
        finally:
            self._depth -= 1


def as_record(plan: StepPlan) -> dict[str, Any]:
    """A plan as plain values.

    Of a start's request and known tokens, which other records hold, only the id and the number.
    """
    record = {
        "step": plan.step,
        "stops": list(plan.stops),
        "starts": [
            [s.seq, s.request.id, s.index, len(s.tokens), s.prompt_len, s.tables]
            for s in plan.starts
        ],
        "edits": [[e.seq, e.group, e.at, e.pages] for e in plan.edits],
        "copies": [[c.group, c.source, c.target] for c in plan.copies],
        "spans": [[s.seq, s.start, s.length, s.drafts, s.wants_logits] for s in plan.spans],
    }
    if plan.partial:
        record["layers"] = [s.layers for s in plan.spans]
    if plan.compactions:
        record["compactions"] = [[c.seq, c.group, c.kept, c.pages] for c in plan.compactions]
    return record
