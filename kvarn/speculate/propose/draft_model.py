"""A smaller model of the same vocabulary drafts token by token (arXiv 2211.17192, section 3).

It has a runner, pages and a prefix index of its own: whatever befalls the target's KV (preemption,
swapping, eviction) does not touch the drafter's, which catches up by itself, in chunks of the
step's budget. Each token's probability under it is the confidence that length controls stop by;
with an acceptance head it is the head's word, which comes one token late: until then its own.

Where its steps are captured, several tokens of greedy drafts are one replay (`kvarn.runner.chain`):
the length control has its in-round say when they are there, and before the next replay. Where it
has none, and the target's steps are captured, too, nobody waits for them before they are verified;
and in any case the next drafts are begun behind the step that verifies these (`begun`).

Drafts are its most likely tokens (DELTA). Where they are to be drawn and the request samples, they
are drawn as the request's tokens are, at its temperature, top-k, top-p and min-p, and verification
is told the distributions; but not for a request with a seed, whose tokens must not depend on what
is drafted.

Regime: predictable text at small batches, where a step costs little more for several rows than for
one and the drafter a small part of it. Loses where the target is not bound by memory (large
batches), and against model-free proposers on text that repeats itself.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvarn.core.part import Cap, Part
from kvarn.core.plan import Draft, SeqId, Span, StepPlan
from kvarn.core.seq import Seq
from kvarn.kernels.attention import Ints
from kvarn.kv.manager import KVManager
from kvarn.models.decoder import Decoder
from kvarn.runner.chain import Chains
from kvarn.runner.drafting import DraftSampler
from kvarn.runner.executor import Runner
from kvarn.runner.inflight import InFlight
from kvarn.runner.state import DRAFTED
from kvarn.speculate.part import Ask, LengthControl, Verified
from kvarn.speculate.propose.begun import Ahead
from kvarn.speculate.propose.following import Following, alike, likeliest
from kvarn.speculate.propose.making import (
    Making,
    launch,
    parted,
    replay,
)
from kvarn.speculate.train.head import AcceptanceHead


class DraftModel(Part):
    """Drafts with a model: once through it for what is new, and once for each token more."""

    name, kind, paper = "draft", "proposer", "2211.17192"
    needs = frozenset({Cap.PAGED_KV})
    regime = (
        "Predictable text at small batches, with a drafter that costs a few percent of the target; "
        "in trees (draft_shape) a weaker drafter, too. Loses at large batches, and on repetitions "
        "that a suffix tree finds for nothing."
    )

    def __init__(
        self,
        runner: Runner,
        kv: KVManager,
        budget: int,
        max_seqs: int,
        draws: DraftSampler | None = None,
        head: AcceptanceHead | None = None,
        chains: Chains | None = None,
    ) -> None:
        """`budget`: positions of one forward pass; `max_seqs`: rows of the runner's image.

        `draws`: the runner's sampler, where drafts are to be drawn; `head`: says what is accepted;
        `chains`: the runner's, where it has captured steps and nobody looks at single passes.
        """
        self.runner, self.kv, self.budget, self.max_seqs = runner, kv, budget, max_seqs
        self.draws, self.head, self.chains = draws, head, chains
        if head is not None:
            runner.watcher = self._judge
        self.target: Runner | None = None  #: whose captured steps drafts go to
        self._own: dict[int, float] = {}  # by image row: the drafter's word on its newest token
        self._accepted: dict[int, float] = {}  # by image row: the head's word on the one before
        self.following = Following(kv, max_seqs, likeliest if draws is None else alike)
        self.ahead = Ahead(self.following)
        self.passes = 0

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        """Catch up, then draft while somebody goes on; empty where the drafter is behind."""
        self.following.now += 1.0
        self.ahead.taken.clear()
        wanted = {ask.seq.id for ask in asks}
        drafts, made = dict[SeqId, Making](), dict[SeqId, Draft]()
        plan = self._plan()
        spare = self.budget
        for ask in asks:
            begun = self.ahead.take(ask, control)
            if begun is not None:
                made[ask.seq.id] = begun
                continue
            follower = self.following.follow(ask, plan, wanted, self.runner.image)
            if follower is None or spare < 1:
                continue
            seq = follower.seq
            count = min(len(seq.tokens) - seq.computed, spare)
            spare -= count
            caught_up = seq.computed + count == len(seq.tokens)
            plan.spans.append(Span(seq.id, seq.computed, count, 0, caught_up))
            seq.computed += count
            if caught_up:
                drafts[seq.id] = Making(follower, ask.most, Draft())
        self.ahead.begun.clear()  # what was not taken now follows nothing any more
        if plan.spans:
            self._make(plan, drafts, control)
        made |= {seq: one.draft for seq, one in drafts.items()}
        return [made.get(ask.seq.id) or Draft() for ask in asks]

    def _make(self, plan: StepPlan, drafts: dict[SeqId, Making], control: LengthControl) -> None:
        """Read what is new, and draft for those who have caught up."""
        if self.chains is not None and all(one.greedy for one in drafts.values()):
            self._chain(self.chains, plan, drafts, control)
        else:
            self._run(plan, drafts)
            self._go_on(drafts, control)

    def begin(self, step: InFlight) -> None:
        """Have the next drafts made behind a step of the target's that verifies the last ones."""
        self.ahead.book(self.runner.image)
        if self.target is None or self.chains is None or self.obstacle:
            return
        plan = StepPlan(self.passes + 1, stops=self.following.gone)
        self.ahead.begin(step, self.target, self.runner, self.chains, plan)
        if self.ahead.begun:
            self.passes, self.following.gone = plan.step, []

    @property
    def obstacle(self) -> str:
        """Why no draft is begun before it is known what stands of the one before; "": some are."""
        if self.target is None or self.chains is None:
            return "steps of the target and chains of the drafter must be captured, on one device"
        if self.head is not None:
            return "an acceptance head says within a round where drafts end"
        if any(group.window is not None for group in self.runner.groups):
            return "the drafter has sliding windows"
        return ""

    def behind(self, seq: Seq) -> int:
        """Tokens without KV; of a prompt all, though its beginning may lie in the prefix index."""
        follower = self.following.followers.get(seq.id)
        known = 0 if follower is None else min(follower.seq.computed, follower.known)
        return len(seq.tokens) - known

    def observe(self, records: Sequence[Verified]) -> None:
        """Nothing to learn: the next round compares the tokens themselves."""

    def forget(self, seq: Seq) -> None:
        """Its whole pages stay for prefix hits."""
        if seq.id in self.following.followers:
            self.following.drop(seq.id)

    def renew(self, decoder: Decoder, keep_kv: bool) -> None:
        """Draft with other weights from now on; not while it drafts.

        Whatever KV is idle goes: it would serve new sequences for ever. With `keep_kv` sequences
        that are followed keep theirs, made by the weights before; else they catch up from nothing.
        """
        if not keep_kv:
            for seq_id in list(self.following.followers):
                self.following.drop(seq_id)
        self.kv.clear(self.following.now)
        self.runner.renew(decoder)

    # steps

    def _plan(self) -> StepPlan:
        self.passes += 1
        return StepPlan(
            self.passes, stops=self.following.gone
        )  # rows that become free until it runs too

    def _run(self, plan: StepPlan, drafts: dict[SeqId, Making]) -> None:
        """One forward pass; every span that caught up brings a token."""
        self.following.gone = []
        result = self.runner.run(plan)
        for i, span in enumerate(plan.spans):
            if not span.wants_logits:
                continue
            extra = result.extras.get(i)
            if not result.tokens[i] or extra is None or not extra.logprobs:
                drafts[span.seq].most = 0  # a fault of the drafter's logits ends the draft only
                continue
            one, row = drafts[span.seq], self.runner.image.row(span.seq)
            own = math.exp(extra.logprobs[0].logprob)
            if self.head is not None:
                if one.draft.tokens:
                    one.draft.confidence[-1] = self._accepted[row]
                self._own[row] = own
            one.draft.confidence.append(own)
            one.draft.tokens.append(result.tokens[i][0])
            if self.draws is not None:
                q = self.draws.q.get(row)
                one.q += [] if q is None else [q]

    def _chain(
        self, chains: Chains, plan: StepPlan, drafts: dict[SeqId, Making], control: LengthControl
    ) -> None:
        """Drafts by replays, behind a pass for those who are more than two tokens behind: the last
        of a draft has no KV, which the next one makes if it stands."""
        behind, last = parted(plan.spans, drafts)
        if behind or not last:
            plan.spans, self.following.gone = behind, []
            self.runner.run(plan)
            plan = self._plan()
        longest = max((one.most for one in drafts.values()), default=0)
        unseen = self.target is not None and not control.looks and longest <= DRAFTED
        while last:
            plan.spans, self.following.gone = last, []
            batch = self.runner.lay_out(plan)
            making = [drafts[last[i].seq] for i in batch.spans.tolist()]
            if unseen and self.head is None:
                launch(chains, batch, making)
                return
            last = replay(chains, batch, making, control, self.head is not None)
            plan = self._plan() if last else plan

    def _judge(self, rows: Ints, hidden: Tensor) -> None:
        """What the head says of the tokens that a pass has consumed."""
        assert self.head is not None
        image, places = self.runner.image, rows.tolist()
        own = torch.tensor([self._own.get(row, 1.0) for row in places])
        drawn = [int(image.requests[row].sampling.temperature > 0) for row in places]
        said = self.head.accepted(hidden, own, torch.tensor(drawn, device=hidden.device))
        self._accepted = dict(zip(places, said.tolist()))

    def _go_on(self, drafts: dict[SeqId, Making], control: LengthControl) -> None:
        """A token more for all whose draft is not long enough, until there is nobody left."""
        going = list(drafts.values())
        while True:
            going = [
                one
                for one in going
                if len(one.draft.tokens) < one.most and control.goes_on(one.draft.confidence)
            ]
            if not going:
                break
            plan = self._plan()
            for one in going:
                seq = one.follower.seq
                plan.spans.append(Span(seq.id, seq.computed, 1))
                seq.computed += 1
            self._run(plan, drafts)
        for one in drafts.values():
            one.follower.drafted = list(one.draft.tokens)
            one.draft.q = torch.stack(one.q) if one.q else None
