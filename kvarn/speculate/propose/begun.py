"""Drafts that are begun behind a step that still verifies those before.

Once a step with drafts has been handed over, the next drafts are launched behind it, for the
sequences that it drafted for and as long as was asked last: the device finds what stands, and goes
on from there (`kvarn.runner.late`). What the length control says when it knows what stood counts
all the same: a draft that it wants shorter is cut, and one that it does not want is dropped. So a
length grows a round later, and a round without drafts comes after one that was made for nothing.
"""

from dataclasses import dataclass

import numpy as np

from kvarn.core.plan import SeqId, Span, StepPlan
from kvarn.core.seq import Seq
from kvarn.kv.manager import KVManager
from kvarn.runner.chain import Chains, LateDraft
from kvarn.runner.executor import Runner
from kvarn.runner.inflight import InFlight
from kvarn.runner.late import Verified, judge, verified
from kvarn.runner.state import DRAFTED
from kvarn.speculate.propose.making import Follower


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


def begin(
    step: InFlight, target: Runner, drafter: Runner, chains: Chains, kv: KVManager, plan: StepPlan,
    followers: dict[SeqId, Follower], now: float,
) -> dict[SeqId, Begun]:  # fmt: skip
    """Launch the next drafts behind `step` of the target's runner; by sequence. `plan`: an empty
    one of the drafter."""
    which = verified(step)
    if which is None or drafter.state is None or target.state is None:
        return {}
    ready, most = list[int](), list[int]()
    for i, (seq_id, drafts) in enumerate(zip(which.seqs, which.drafts.tolist(), strict=True)):
        follower = followers.get(seq_id)
        if follower is None or follower.known != len(follower.seq.tokens) or follower.known < 2:
            continue
        if follower.seq.request.sampling.temperature > 0:
            continue  # its drafts are drawn
        count = min(follower.asked, DRAFTED)
        end = follower.known + drafts + 1 + count
        edits = None if end > follower.goal else kv.reserve(follower.seq, end, now)
        if edits is None:
            continue
        plan.edits += edits
        plan.spans.append(Span(seq_id, follower.known - 1, 2))
        ready.append(i)
        most.append(count)
    if not ready:
        return {}
    return _launched(step, which.only(ready), most, target, drafter, chains, plan, followers)


def _launched(
    step: InFlight, which: Verified, most: list[int], target: Runner, drafter: Runner,
    chains: Chains, plan: StepPlan, followers: dict[SeqId, Follower],
) -> dict[SeqId, Begun]:  # fmt: skip
    """Behind the last token that is known: what of the drafts behind that stands moves it on."""
    assert drafter.state is not None and target.state is not None
    batch = drafter.lay_out(plan)
    batch.tokens = np.tile([-1, -2], len(which.seqs))  # as `judge` finds them
    judge(step, which, target.state, batch.rows, drafter.state)
    saying = chains.launch(batch, np.array(most, np.int64), [], batch.rows.tolist())
    return {
        seq: Begun(followers[seq], step, span, LateDraft(saying, at), count)
        for at, (seq, span, count) in enumerate(zip(which.seqs, which.spans, most, strict=True))
    }
