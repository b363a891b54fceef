"""`Speculation`: one engine's rounds. Asks the length control, then the proposer; reports back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvarn.core.plan import Draft, Late, SeqId, StepPlan, StepResult
from kvarn.core.seq import Seq
from kvarn.schedule.control import ControlPlane
from kvarn.speculate.costs import Measured
from kvarn.speculate.part import Ask, LengthControl, Proposer, Round, Trainer
from kvarn.speculate.records import Listener, records


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
    captures: Callable[[], int] = int  #: made so far: a round with one says nothing of others
    #: told of a step with drafts that was just handed over: the next ones may begin behind it
    begin: Callable[[Any], None] = lambda step: None
    _drafting: float = 0.0  #: seconds of the drafting that the step under way verifies
    _drafts: dict[SeqId, Draft] = field(default_factory=dict)  #: that it verifies
    _late: list[Late] = field(default_factory=list)  #: of these, what is still being made
    _work: tuple[int, int, int, int] = (0, 0, 0, 0)  #: drafts, longest, tokens read, asked for
    _asked: bool = False  #: drafts were asked for, so that it was planned late
    _captured: int = 0  #: captures before they were

    def between_steps(self, control: ControlPlane) -> None:
        """Before a step is planned: nothing is drafted, and no draft waits for its judgement."""
        if self.trainer is not None:
            queues = control.queues
            self.trainer.between_steps(bool(queues.waiting), bool(queues.running), self.clock())

    def lengths(self, control: ControlPlane) -> dict[SeqId, int]:
        """Tokens to draft for whom in this round; empty: a step as without speculation.

        It may be asked while a step is in flight: sequences count as they will be after it.
        """
        if self.length.rests():
            return {}
        began = self.clock()
        found = self._wanted(control)
        if not found:
            self.costs.saw_look(self.clock() - began)
        return found

    def _wanted(self, control: ControlPlane) -> dict[SeqId, int]:
        """Tokens to draft for whom, as the length control says."""
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
        behind = [self.proposer.behind(seq) for seq in seqs]
        wanted = self.length.plan(Round(seqs, room, others, self.costs, behind))
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
        behind, self._captured = self._behind(asks), self.captures()
        began = self.clock()
        drafts = self.proposer.propose(asks, self.length) if asks else []
        self._drafting, self._asked = self.clock() - began, True
        self._drafts = {
            ask.seq.id: draft.first(ask.most)
            for ask, draft in zip(asks, drafts, strict=True)
            if draft.tokens
        }
        most = max((len(draft.tokens) for draft in self._drafts.values()), default=0)
        self._work = len(self._drafts), most, behind - self._behind(asks), len(asks)
        self._late = [one.late for one in self._drafts.values() if one.late is not None]
        if not self._late:
            self._saw_draft()
        return self._drafts

    def _saw_draft(self) -> None:
        """Learn from what the drafting under way took."""
        if self.captures() == self._captured:
            seqs, most, read, asked = self._work
            self.costs.saw_draft(seqs, most, self._drafting, read, asked)

    def _settle(self) -> None:
        """What was made while the step before was verified is there: it took the device's time."""
        if self._late:
            self._drafting = max(one.seconds for one in self._late)
            self._late = []
            for draft in self._drafts.values():
                draft.settle()
            self._saw_draft()

    def _behind(self, asks: list[Ask]) -> int:
        """Tokens that the proposer has not read, of all of them."""
        return sum(self.proposer.behind(ask.seq) for ask in asks)

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """A step came back, `seconds` after the one before it, drafting included."""
        if self._asked:
            self._settle()
        asked, seconds = self._asked, seconds - self._drafting
        pure = self._saw(plan, seconds)
        if not asked:
            return
        heard = records(plan, result, self._drafts)
        judged = [record for record in heard if record.draft.tokens] if self.listeners else []
        for listener in self.listeners if judged else ():
            listener(judged)
        verified = [record.verified() for record in heard]
        self.length.observe(verified, seconds if pure else 0.0, self._drafting)
        self.proposer.observe(verified)
        self._drafting, self._drafts, self._asked = 0.0, {}, False

    def _saw(self, plan: StepPlan, seconds: float) -> bool:
        """Learn from the step's time; whether it says anything of others."""
        decodes = all(one.wants_logits and one.length == one.drafts + 1 for one in plan.spans)
        if not decodes or (self._asked and self.captures() != self._captured):
            self.costs.saw_other(ahead=not self._asked)
            return False
        if plan.drafts:
            self.costs.saw_verifying(plan.n_tokens, seconds)
        else:
            self.costs.saw_plain(plan.n_tokens, seconds, ahead=not self._asked)
        return True

    def forget(self, seq: Seq) -> None:
        """The sequence has ended; what is said of a draft in flight is of no use to anybody."""
        self._drafts.pop(seq.id, None)
        self.length.forget(seq.id)
        self.proposer.forget(seq)
        if self.trainer is not None:
            self.trainer.forget(seq)

    def close(self) -> None:
        """Stop what goes on beside the steps."""
        if self.trainer is not None:
            self.trainer.close()
