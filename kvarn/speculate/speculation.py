"""`Speculation`: one engine's rounds. Asks the length control, then the proposer; reports back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvarn.core.plan import Draft, SeqId, StepPlan, StepResult
from kvarn.core.seq import Seq
from kvarn.schedule.control import ControlPlane
from kvarn.speculate.costs import Measured
from kvarn.speculate.part import Ask, LengthControl, Proposer, Round, Trainer, Verified
from kvarn.speculate.records import Listener
from kvarn.speculate.records import records as judged


@dataclass(slots=True)
class Speculation:
    """A proposer, a length control, and what both cost."""

    proposer: Proposer
    length: LengthControl
    most: int  #: longest draft [tokens]
    clock: Callable[[], float]
    costs: Measured = field(default_factory=Measured)
    trainer: Trainer | None = None
    listeners: list[Listener] = field(default_factory=list)  #: hear of every draft judged
    _drafting: float = 0.0  #: seconds of the drafting that the step under way verifies
    _drafts: dict[SeqId, Draft] = field(default_factory=dict)  #: that it verifies

    def between_steps(self, control: ControlPlane) -> None:
        """Before a step is planned: nothing is drafted, and no draft waits for its judgement."""
        if self.trainer is not None:
            self.trainer.between_steps(bool(control.queues.waiting), self.clock())

    def lengths(self, control: ControlPlane) -> dict[SeqId, int]:
        """Tokens to draft for whom in this round; empty: a step as without speculation.

        It may be asked while a step is in flight: sequences count as they will be after it.
        """
        if self.length.rests():
            return {}
        running = control.queues.running
        spare = control.budget - len(running)
        seqs, room, others = list[Seq](), list[int](), 0
        for seq in running:
            most = min(self.most, seq.goal - len(seq.tokens) - seq.pending, spare)
            ready = seq.generates and seq.todo == 1 and seq.filter is None
            if ready and most > 0:
                seqs.append(seq)
                room.append(most)
            else:
                others += seq.todo
        if not seqs:
            return {}
        wanted = self.length.plan(Round(seqs, room, others, self.costs))
        found = dict[SeqId, int]()
        for seq, most, asked in zip(seqs, room, wanted, strict=True):
            count = min(asked, most, spare)
            if count > 0:
                found[seq.id] = count
                spare -= count
        return found

    def propose(self, control: ControlPlane, lengths: Mapping[SeqId, int]) -> dict[SeqId, Draft]:
        """Drafts of at most these lengths. No step is in flight."""
        asks = [
            Ask(seq, min(lengths[seq.id], seq.goal - len(seq.tokens)))
            for seq in control.queues.running
            if seq.id in lengths and seq.todo == 1 and seq.goal > len(seq.tokens)
        ]
        began = self.clock()
        drafts = self.proposer.propose(asks, self.length) if asks else []
        self._drafting = self.clock() - began
        self._drafts = {
            ask.seq.id: draft.first(ask.most)
            for ask, draft in zip(asks, drafts, strict=True)
            if draft.tokens
        }
        tokens = sum(len(draft.tokens) for draft in self._drafts.values())
        if tokens:
            self.costs.saw_draft(tokens, self._drafting)
        return self._drafts

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """A step came back, `seconds` after the one before it, drafting included."""
        if not plan.drafts:
            if plan.n_tokens == len(plan.spans) and plan.spans[-1].wants_logits:
                self.costs.saw_step(plan.n_tokens, seconds - self._drafting)
            self._drafting = 0.0
            return
        records = [
            Verified(
                span.seq, span.drafts, max(0, len(tokens) - 1),
                self._drafts[span.seq].confidence[: span.drafts] if span.drafts else [],
            )
            for span, tokens in zip(plan.spans, result.tokens, strict=True)
            if span.wants_logits and tokens
        ]  # fmt: skip
        if all(span.wants_logits and span.length == span.drafts + 1 for span in plan.spans):
            self.costs.saw_step(plan.n_tokens, seconds - self._drafting)
        if self.trainer is not None:
            self.trainer.observe(plan, result)
        if self.listeners:
            for record in judged(plan, result, self._drafts):
                for listener in self.listeners:
                    listener(record)
        self.length.observe(records, seconds - self._drafting, self._drafting)
        self.proposer.observe(records)
        self._drafting, self._drafts = 0.0, {}

    def forget(self, seq: Seq) -> None:
        """The sequence has ended."""
        self.length.forget(seq.id)
        self.proposer.forget(seq)
        if self.trainer is not None:
            self.trainer.forget(seq)

    def close(self) -> None:
        """Stop what goes on beside the steps."""
        if self.trainer is not None:
            self.trainer.close()
