"""A draft in the making, and what a replay of a drafting model's passes adds to it.

A replay (`kvarn.runner.chain`) gives the likeliest tokens of several passes at once. What a length
control says within a round is heard when they are there: tokens behind its stop are dropped, and
there is another replay where it goes on.
"""

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from kvarn.core.plan import LATE, Draft, Late, SeqId, Span
from kvarn.core.seq import Seq
from kvarn.runner.batch import Batch
from kvarn.runner.chain import Chains, LateDraft, Said
from kvarn.runner.image import Image
from kvarn.speculate.part import Ask, LengthControl

#: tokens of a draft that are one replay; fewer where a head was trained to say where drafts end
AT_ONCE, JUDGED_AT_ONCE = 8, 4


@dataclass(slots=True)
class Follower:
    """A sequence as the drafter knows it; `seq.tokens` is the target's own list."""

    seq: Seq
    known: int = 0  #: leading tokens that the drafter's image holds as the target has them
    drafted: list[int] | None = None  #: what it proposed after these
    late: Late | None = None  #: who will know that
    asked: int = 0  #: tokens that were wanted last
    goal: int = 0  #: tokens that the target's sequence may come to

    def wants(self, ask: Ask) -> None:
        """Remember what is asked for its sequence."""
        self.asked, self.goal = ask.most, ask.seq.goal

    def settle(self) -> None:
        """Wait for what it proposed, if that is still being made."""
        if self.late is not None:
            self.drafted, self.late = self.late.said()[0], None


@dataclass(slots=True)
class Making:
    """A draft in the making."""

    follower: Follower
    most: int
    draft: Draft
    q: list[Tensor] = field(default_factory=list)  #: [vocab] of each token that was drawn

    @property
    def greedy(self) -> bool:
        """Whether its tokens are the likeliest ones."""
        return self.follower.seq.request.sampling.temperature == 0.0


def parted(spans: Iterable[Span], drafts: Container[SeqId]) -> tuple[list[Span], list[Span]]:
    """What of these spans a replay cannot begin with, and what it begins with: of those who are
    drafted for the last two tokens, or the last one."""
    behind, last = list[Span](), list[Span]()
    for span in spans:
        own = min(span.length, 2) if span.seq in drafts else 0
        before = span.length - own
        if before:
            behind.append(Span(span.seq, span.start, before, 0, False))
        if own:
            last.append(Span(span.seq, span.start + before, own))
    return behind, last


def replay(
    chains: Chains, batch: Batch, making: Sequence[Making], control: LengthControl, judged: bool
) -> list[Span]:
    """Some more tokens for each span of a batch; the spans that go on behind them.

    `judged`: a head says within the replay whether tokens will be accepted.
    """
    at_once = JUDGED_AT_ONCE if judged else AT_ONCE
    most = [min(one.most - len(one.draft.tokens), at_once) for one in making]
    sure = [one.draft.confidence[-1] if one.draft.tokens else 1.0 for one in making]
    found = chains.launch(batch, np.array(most, np.int64), sure).words
    spans = list[Span]()
    for one, count, said in zip(making, most, found, strict=True):
        seq = one.follower.seq
        seq.computed += count - 1
        whole = len(said) == count  # else a fault ends it
        if _take(one, said, control, judged, chains.image) and whole:
            spans.append(Span(seq.id, seq.computed, 1))
            seq.computed += 1
    return spans


def launch(chains: Chains, batch: Batch, making: Sequence[Making]) -> None:
    """All tokens of each span's draft in one replay, which nobody waits for."""
    most = [one.most for one in making]
    saying = chains.launch(batch, np.array(most, np.int64), [])
    for at, (one, count) in enumerate(zip(making, most, strict=True)):
        one.follower.seq.computed += count - 1
        promise(one.draft, LateDraft(saying, at), count)
        one.follower.late = one.draft.late


def promise(draft: Draft, late: LateDraft, count: int) -> None:
    """It is so many tokens that are still being made."""
    draft.tokens, draft.confidence, draft.late = [LATE] * count, [1.0] * count, late


def _take(one: Making, said: Said, control: LengthControl, judged: bool, image: Image) -> bool:
    """Of what a replay says, what the control wants; whether it wants more."""
    draft, seq = one.draft, one.follower.seq
    known = len(draft.tokens)
    for token, logprob, word in said:
        if draft.tokens:
            if not control.goes_on(draft.confidence):
                break
            if judged:
                draft.confidence[-1] = word
        draft.tokens.append(token)
        draft.confidence.append(math.exp(logprob))
    one.follower.drafted, new = draft.tokens[:], draft.tokens[known:]
    if not new or len(draft.tokens) >= one.most or not control.goes_on(draft.confidence):
        return False
    image.commit(image.row(seq.id), len(seq.tokens) + known, new)
    return True
