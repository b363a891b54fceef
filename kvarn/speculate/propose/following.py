"""The sequences that a drafting model follows: pages of its own for each, and what it knows of it.

Whatever befalls the target's KV does not touch the drafter's. A follower has the target's tokens as
far as it has seen them and what it drafted behind; where others were committed, the next draft
begins at the first that differs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kvarn.core.plan import SeqId, SeqStart, StepPlan, TableEdit
from kvarn.core.request import SamplingParams
from kvarn.core.seq import Seq
from kvarn.kv.manager import KVManager
from kvarn.runner.image import Image
from kvarn.speculate.part import Ask
from kvarn.speculate.propose.making import Follower

#: most likely token, with its probability
GREEDY = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, logprobs=0)


def likeliest(wanted: SamplingParams) -> SamplingParams:
    """Drafts are the likeliest tokens, whatever the request wants."""
    return GREEDY


def alike(wanted: SamplingParams) -> SamplingParams:
    """Drafts are drawn as the request's tokens are, but for one with a seed."""
    if wanted.temperature == 0 or wanted.seed is not None:
        return GREEDY
    return replace(
        GREEDY,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        min_p=wanted.min_p,
    )


@dataclass(slots=True)
class Following:
    """Followers by sequence, at most `max_seqs`: as many as the runner's image has rows."""

    kv: KVManager
    max_seqs: int
    sampling: Callable[
        [SamplingParams], SamplingParams
    ]  #: how drafts for such a request are chosen
    followers: dict[SeqId, Follower] = field(default_factory=dict)
    gone: list[SeqId] = field(default_factory=list)  #: rows that the runner must forget
    now: float = 0.0  #: order of use, for the eviction of prefixes

    def of(self, seq: SeqId) -> Follower | None:
        """The follower of a sequence."""
        return self.followers.get(seq)

    def follow(self, ask: Ask, plan: StepPlan, wanted: set[SeqId], image: Image) -> Follower | None:
        """The follower of a sequence with pages for its known tokens and its draft, if they fit."""
        follower = self.followers.get(ask.seq.id)
        if follower is None:
            follower = self._begin(ask.seq, wanted)
            fresh = True
        else:
            self.correct(follower, image)
            fresh = False
        if follower is None:
            return None
        follower.wants(ask)
        seq, edits = follower.seq, list[TableEdit]()
        end = len(seq.tokens) + ask.most
        if end > seq.capacity:
            found = self.kv.reserve(seq, end, self.now)
            if found is None:
                self.drop(seq.id, started=not fresh)
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
        if len(self.followers) >= self.max_seqs:
            idle = next((seq for seq in self.followers if seq not in wanted), None)
            if idle is None:
                return None
            self.drop(idle)
        request = replace(target.request, sampling=self.sampling(target.request.sampling))
        seq = Seq(target.id, request, target.index, target.tokens, 1 << 60, target.order)
        match = self.kv.lookup(seq)
        self.kv.attach(seq, match, self.now)
        follower = self.followers[target.id] = Follower(seq, len(seq.tokens))
        return follower

    def correct(self, follower: Follower, image: Image) -> None:
        """Put what the target committed in place of what was drafted."""
        follower.settle()
        seq, known = follower.seq, follower.known
        new = seq.tokens[known:]
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
            self.kv.publish(seq, self.now)

    def drop(self, seq_id: SeqId, started: bool = True) -> None:
        """Give the pages of a follower back; its row too, once the runner hears of it."""
        follower = self.followers.pop(seq_id)
        self.kv.release(follower.seq, self.now)
        if started:
            self.gone.append(seq_id)
