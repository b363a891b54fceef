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
from dataclasses import replace

import torch
from torch import Tensor

from kvarn.core.part import Cap, Part
from kvarn.core.plan import Draft, SeqId, SeqStart, Span, StepPlan, TableEdit
from kvarn.core.request import SamplingParams
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
from kvarn.speculate.propose.begun import Begun, begin
from kvarn.speculate.propose.making import (
    Follower,
    Making,
    launch,
    parted,
    promise,
    replay,
)
from kvarn.speculate.train.head import AcceptanceHead

#: most likely token, with its probability
GREEDY = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, logprobs=0)


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
        self._begun: dict[SeqId, Begun] = {}
        self._taken: list[tuple[Making, Begun]] = []  # of these, what the step under way verifies
        self._own: dict[int, float] = {}  # by image row: the drafter's word on its newest token
        self._accepted: dict[int, float] = {}  # by image row: the head's word on the one before
        self._followers: dict[SeqId, Follower] = {}
        self._gone: list[SeqId] = []  # rows that the runner must forget
        self.passes = 0
        self._now = 0.0  # order of use, for the eviction of prefixes

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        """Catch up, then draft while somebody goes on; empty where the drafter is behind."""
        self._now += 1.0
        wanted = {ask.seq.id for ask in asks}
        self._taken.clear()
        drafts, begun, self._begun = dict[SeqId, Making](), self._begun, {}
        made = dict[SeqId, Making]()
        plan = self._plan()
        spare = self.budget
        for ask in asks:
            before = begun.get(ask.seq.id)
            if before and before.follows(self._followers.get(ask.seq.id), ask.seq):
                made[ask.seq.id] = self._made(before, ask, control)
                continue
            follower = self._follow(ask, plan, wanted)
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
        if not plan.spans:
            pass
        elif self.chains is not None and all(one.greedy for one in drafts.values()):
            self._chain(self.chains, plan, drafts, control)
        else:
            self._run(plan, drafts)
            self._go_on(drafts, control)
        drafts |= made
        return [drafts[ask.seq.id].draft if ask.seq.id in drafts else Draft() for ask in asks]

    def begin(self, step: InFlight) -> None:
        """Have the next drafts made behind a step of the target's that verifies the last ones."""
        for one, before in self._taken:
            follower, seq = one.follower, one.follower.seq
            if self._followers.get(seq.id) is not follower:
                continue
            self._correct(follower)
            seq.computed = len(seq.tokens) + before.count - 1
            follower.drafted, follower.late = one.draft.tokens, one.draft.late
        self._taken.clear()
        windows = any(group.window is not None for group in self.runner.groups)
        if self.target is None or self.chains is None or self.head is not None or windows:
            return
        plan, self._gone = self._plan(), []
        self._begun = begin(
            step, self.target, self.runner, self.chains, self.kv, plan, self._followers, self._now
        )

    def _made(self, before: Begun, ask: Ask, control: LengthControl) -> Making:
        """A draft that was begun. What stood before it is booked when this has been handed over:
        the device waits."""
        one = Making(before.follower, ask.most, Draft())
        before.follower.asked, before.follower.goal = ask.most, ask.seq.goal
        if control.looks:
            draft, said = one.draft, before.late.saying.wait()[before.late.at]
            for token, logprob, _ in said[: ask.most]:
                if draft.tokens and not control.goes_on(draft.confidence):
                    break
                draft.tokens.append(token)
                draft.confidence.append(math.exp(logprob))
        else:
            promise(one, before.late, min(before.count, ask.most))
        self._taken.append((one, before))
        return one

    def behind(self, seq: Seq) -> int:
        """Tokens without KV; of a prompt all, though its beginning may lie in the prefix index."""
        follower = self._followers.get(seq.id)
        known = 0 if follower is None else min(follower.seq.computed, follower.known)
        return len(seq.tokens) - known

    def observe(self, records: Sequence[Verified]) -> None:
        """Nothing to learn: the next round compares the tokens themselves."""

    def forget(self, seq: Seq) -> None:
        """Its whole pages stay for prefix hits."""
        if seq.id in self._followers:
            self._drop(seq.id)

    def renew(self, decoder: Decoder, keep_kv: bool) -> None:
        """Draft with other weights from now on; not while it drafts.

        Whatever KV is idle goes: it would serve new sequences for ever. With `keep_kv` sequences
        that are followed keep theirs, made by the weights before; else they catch up from nothing.
        """
        if not keep_kv:
            for seq_id in list(self._followers):
                self._drop(seq_id)
        self.kv.clear(self._now)
        self.runner.renew(decoder)

    # followers

    def _follow(self, ask: Ask, plan: StepPlan, wanted: set[SeqId]) -> Follower | None:
        """The follower of a sequence with pages for its known tokens and its draft, if they fit."""
        follower = self._followers.get(ask.seq.id)
        if follower is None:
            follower = self._begin(ask.seq, wanted)
            fresh = True
        else:
            self._correct(follower)
            fresh = False
        if follower is None:
            return None
        follower.asked, follower.goal = ask.most, ask.seq.goal
        seq, edits = follower.seq, list[TableEdit]()
        end = len(seq.tokens) + ask.most
        if end > seq.capacity:
            found = self.kv.reserve(seq, end, self._now)
            if found is None:
                self._drop(seq.id, started=not fresh)
                return None
            edits = found
        if fresh:
            tables = [list(table) for table in seq.tables]
            plan.starts.append(
                SeqStart(seq.id, seq.request, seq.index, list(seq.tokens), seq.prompt_len, tables)
            )
        else:
            plan.edits += edits
        return follower

    def _begin(self, target: Seq, wanted: set[SeqId]) -> Follower | None:
        if len(self._followers) >= self.max_seqs:
            idle = next((seq for seq in self._followers if seq not in wanted), None)
            if idle is None:
                return None
            self._drop(idle)
        request = replace(target.request, sampling=self._sampling(target.request.sampling))
        seq = Seq(target.id, request, target.index, target.tokens, 1 << 60, target.order)
        match = self.kv.lookup(seq)
        self.kv.attach(seq, match, self._now)
        follower = self._followers[target.id] = Follower(seq, len(seq.tokens))
        return follower

    def _sampling(self, wanted: SamplingParams) -> SamplingParams:
        """How drafts for a request that is sampled like this are chosen."""
        if self.draws is None or wanted.temperature == 0 or wanted.seed is not None:
            return GREEDY
        return replace(
            GREEDY,
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            top_p=wanted.top_p,
            min_p=wanted.min_p,
        )

    def _correct(self, follower: Follower) -> None:
        """Put what the target committed in place of what was drafted."""
        follower.settle()
        seq, known = follower.seq, follower.known
        image, new = self.runner.image, seq.tokens[known:]
        agreed = 0
        for mine, theirs in zip(follower.drafted or (), new):
            if mine != theirs:
                break
            agreed += 1
        # the last token is fed again where its KV is there (its draft was not verified): its
        # logits are what the next draft begins with
        seq.computed = min(seq.computed, known + agreed, len(seq.tokens) - 1)
        if new:
            image.commit(image.row(seq.id), known, new)
        else:
            image.truncate(image.row(seq.id), known)
        follower.known, follower.drafted = len(seq.tokens), None
        if seq.computed // self.kv.page_size > seq.published:
            self.kv.publish(seq, self._now)

    def _drop(self, seq_id: SeqId, started: bool = True) -> None:
        """Give the pages of a follower back; its row too, once the runner hears of it."""
        follower = self._followers.pop(seq_id)
        self.kv.release(follower.seq, self._now)
        if started:
            self._gone.append(seq_id)

    # steps

    def _plan(self) -> StepPlan:
        self.passes += 1
        return StepPlan(self.passes, stops=self._gone)  # rows that become free until it runs too

    def _run(self, plan: StepPlan, drafts: dict[SeqId, Making]) -> None:
        """One forward pass; every span that caught up brings a token."""
        self._gone = []
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
            plan.spans, self._gone = behind, []
            self.runner.run(plan)
            plan = self._plan()
        longest = max((one.most for one in drafts.values()), default=0)
        unseen = self.target is not None and not control.looks and longest <= DRAFTED
        while last:
            plan.spans, self._gone = last, []
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
