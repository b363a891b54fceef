"""`Drafter`: a proposer in virtual time. What it drafts is nothing; what it takes is priced.

A round of drafts is as many passes of the drafting model as the longest has tokens. The first reads
what came since the last round, the prompt at first (but for what the target found in its prefix
cache: the drafter has one too); each further one computes a row of every draft that goes on. That
is what `DraftModel` of the engine does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvarn.core.plan import Draft, SeqId
from kvarn.core.seq import Seq
from kvarn.cost.shape import CostModel, Estimate, StepShape, shape_of, total
from kvarn.sim.acceptance import Acceptance, Luck
from kvarn.speculate.part import Ask, LengthControl, Verified


@dataclass(slots=True)
class Clock:
    """The time that speculation reads [s]; whoever takes time moves it."""

    now: float = 0.0

    def __call__(self) -> float:
        """Seconds of virtual time."""
        return self.now


@dataclass(slots=True)
class Drafter:
    """Drafts chains that stand with the probabilities of `acceptance`.

    It knows these, and nothing of the single token: its confidence is the share.
    """

    acceptance: Acceptance
    cost: CostModel | None  #: of the drafting model; None: drafts cost nothing, nothing is read
    clock: Clock
    luck: Luck = field(default_factory=Luck)
    spent: Estimate = field(default_factory=Estimate)  #: by the last round
    _read: dict[SeqId, int] = field(default_factory=dict)  #: tokens, by sequence

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        """A draft for each ask, as long as the control lets it be; the time passes."""
        drafts = [self._draft(ask, control) for ask in asks]
        self.spent = total(self._passes(asks, drafts))
        self.clock.now += self.spent.seconds
        for ask in asks:
            self._read[ask.seq.id] = len(ask.seq.tokens)
        return drafts

    def _draft(self, ask: Ask, control: LengthControl) -> Draft:
        sure = list[float]()
        while len(sure) < ask.most and control.goes_on(sure):
            sure.append(self.acceptance.share(ask.seq, len(sure)))
        return Draft([0] * len(sure), confidence=sure)  # which tokens they are decides nothing

    def _passes(self, asks: Sequence[Ask], drafts: Sequence[Draft]) -> list[Estimate]:
        """The price of each pass of the drafting model."""
        if self.cost is None:
            return []
        made = [(ask.seq, len(draft.tokens)) for ask, draft in zip(asks, drafts, strict=True)]
        spans = []
        for seq, _ in made:
            start = self._read.get(seq.id, min(seq.cached, len(seq.tokens) - 1))
            spans.append((start, len(seq.tokens) - start, True))
        found = [self.cost.step(shape_of(spans))] if spans else []
        for past in range(1, max((length for _, length in made), default=0)):
            contexts = [len(seq.tokens) + past for seq, length in made if length > past]
            n = len(contexts)
            found.append(self.cost.step(StepShape((), n, sum(contexts), max(contexts), n)))
        return found

    def stand(self, seq: Seq, drafts: int) -> int:
        """How many of the `drafts` that a step has verified behind the sequence's tokens stand."""
        known, count = len(seq.tokens), 0
        while count < drafts and self.luck.at(seq, known + count) < self.acceptance.share(
            seq, count
        ):
            count += 1
        self._read[seq.id] = known + min(count, drafts - 1)  # nobody reads a draft's last token
        return count

    def behind(self, seq: Seq) -> int:
        """Tokens that it has not read; of a prompt all."""
        return 0 if self.cost is None else len(seq.tokens) - self._read.get(seq.id, 0)

    def observe(self, records: Sequence[Verified]) -> None:
        """Nothing to learn."""

    def forget(self, seq: Seq) -> None:
        """The sequence has ended."""
        self._read.pop(seq.id, None)
        self.luck.forget(seq.id)
