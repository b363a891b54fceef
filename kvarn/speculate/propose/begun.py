"""Drafts that are begun behind a step that still verifies those before.

Once a step with drafts has been handed over, the next drafts are launched behind it, for the
sequences that it drafted for and as long as was asked last: the device finds what stands, and goes
on from there (`kvarn.runner.late`). What the length control says when it knows what stood counts
all the same: a draft that it wants shorter is cut, and one that it does not want is dropped. So a
length grows a round later, and a round without drafts comes after one that was made for nothing.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from kvarn.core.plan import Draft, SeqId, Span, StepPlan
from kvarn.core.seq import Seq
from kvarn.runner.chain import Chains, LateDraft
from kvarn.runner.executor import Runner
from kvarn.runner.image import Image
from kvarn.runner.inflight import InFlight
from kvarn.runner.late import Verified, judge, verified
from kvarn.runner.state import DRAFTED
from kvarn.speculate.part import Ask, LengthControl
from kvarn.speculate.propose.following import Following
from kvarn.speculate.propose.making import Follower, promise


@dataclass(slots=True)
class Begun:
    """A draft behind a step in flight."""

    follower: Follower
    step: InFlight
    span: int  #: of the step's plan
    late: LateDraft
    count: int  #: tokens

    def follows(self, follower: Follower | None, seq: Seq) -> bool:
        """Whether what is known of `seq` is what was known then, and what the step brought."""
        new = len(self.step.outcome.tokens[self.span])
        return follower is self.follower and len(seq.tokens) == self.follower.known + new

    def said(self, most: int, control: LengthControl) -> Draft:
        """As much of it as is wanted; waited for where the control looks at it."""
        draft = Draft()
        if not control.looks:
            promise(draft, self.late, min(self.count, most))
            return draft
        for token, logprob, _ in self.late.saying.words[self.late.at][:most]:
            if draft.tokens and not control.goes_on(draft.confidence):
                break
            draft.tokens.append(token)
            draft.confidence.append(math.exp(logprob))
        return draft


@dataclass(slots=True)
class Ahead:
    """The drafts that are begun, by sequence, and what of them is being verified."""

    following: Following
    begun: dict[SeqId, Begun] = field(default_factory=dict)
    taken: list[tuple[Draft, Begun]] = field(default_factory=list)

    def take(self, ask: Ask, control: LengthControl) -> Draft | None:
        """The draft of a sequence, if one was begun that follows what is known now."""
        found = self.begun.pop(ask.seq.id, None)
        if found is None or not found.follows(self.following.of(ask.seq.id), ask.seq):
            return None
        found.follower.wants(ask)
        draft = found.said(ask.most, control)
        self.taken.append((draft, found))
        return draft

    def book(self, image: Image) -> None:
        """What stood before the drafts that were taken; once these have been handed over, since
        the device waits for that."""
        for draft, found in self.taken:
            follower, seq = found.follower, found.follower.seq
            if self.following.of(seq.id) is follower:
                self.following.correct(follower, image)
                seq.computed = len(seq.tokens) + found.count - 1
                follower.drafted, follower.late = draft.tokens, draft.late
        self.taken.clear()

    def begin(
        self, step: InFlight, target: Runner, drafter: Runner, chains: Chains, plan: StepPlan
    ) -> None:
        """Launch the next drafts behind `step` of the target's runner, with an empty `plan` of the
        drafter's. None are begun where the device cannot judge those before."""
        which = verified(step)
        if which is None or drafter.state is None or target.state is None:
            return
        ready, most = list[int](), list[int]()
        for i, (seq_id, drafts) in enumerate(zip(which.seqs, which.drafts.tolist(), strict=True)):
            follower = self.following.of(seq_id)
            count = 0 if follower is None else self._reach(follower, drafts, plan)
            if follower is not None and count:
                plan.spans.append(Span(seq_id, len(follower.seq.tokens) - 1, 2))
                ready.append(i)
                most.append(count)
        if ready:
            self._launch(step, which.only(ready), most, target, drafter, chains, plan)

    def _reach(self, follower: Follower, drafts: int, plan: StepPlan) -> int:
        """Tokens to draft behind `drafts` that are being verified, with pages for all; or 0."""
        seq, known, count = follower.seq, follower.known, follower.asked
        end = known + drafts + 1 + count
        drawn = seq.request.sampling.temperature > 0
        if drawn or count > DRAFTED or end > follower.goal:
            return 0
        if known < 2 or known != len(seq.tokens):
            return 0
        edits = self.following.kv.reserve(seq, end, self.following.now)
        if edits is None:
            return 0
        plan.edits += edits
        return count

    def _launch(
        self, step: InFlight, which: Verified, most: list[int], target: Runner, drafter: Runner,
        chains: Chains, plan: StepPlan,
    ) -> None:  # fmt: skip
        """Behind the last token that is known: what of the drafts behind that stands moves it."""
        assert drafter.state is not None and target.state is not None
        batch = drafter.lay_out(plan)
        batch.tokens = np.tile([-1, -2], len(which.seqs))  # as `judge` leaves them
        judge(step, which, target.state, batch.rows, drafter.state)
        saying = chains.launch(batch, np.array(most, np.int64), [], batch.rows.tolist())
        for at, (seq, span, count) in enumerate(zip(which.seqs, which.spans, most, strict=True)):
            late = LateDraft(saying, at)
            self.begun[seq] = Begun(self.following.followers[seq], step, span, late, count)
