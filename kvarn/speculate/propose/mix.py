"""Two proposers: the model-free one where it expects to do better than the other usually does.

The rule of SuffixDecoding (2411.04975, hybrid): a draft found in text is taken if its score, the
tokens it expects to be accepted, is above what the other proposer's drafts are accepted for.
"""

from collections.abc import Sequence

from kvarn.core.errors import ConfigError
from kvarn.core.part import Part
from kvarn.core.plan import Draft, SeqId
from kvarn.core.seq import Seq
from kvarn.speculate.part import Ask, LengthControl, Proposer, Verified

START = 1.0  #: accepted tokens a draft that the other is trusted for at first
WEIGHT = 0.05  #: of the latest draft in the running mean


class Mix(Part):
    """Asks `free` first and `other` for the sequences that are left."""

    name, kind, paper = "mix", "proposer", "2411.04975"
    regime = (
        "Traffic of which some repeats earlier text and some does not. Loses to the drafting model "
        "alone, by a little, where nothing repeats, and to the suffix tree alone where all does."
    )

    def __init__(self, free: Proposer, other: Proposer) -> None:
        if free is other:
            raise ConfigError("a mix takes two proposers; these are one and the same")
        self.free, self.other = free, other
        self.typical = START  #: running mean of the tokens accepted of a draft by `other`
        self._from_free: set[SeqId] = set()  #: sequences whose last draft is `free`'s

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        """One draft for each ask, from one or the other."""
        drafts = self.free.propose(asks, control)
        left = [i for i, draft in enumerate(drafts) if draft.score <= self.typical]
        self._from_free.update(ask.seq.id for ask in asks)
        self._from_free.difference_update(asks[i].seq.id for i in left)
        if left:
            others = self.other.propose([asks[i] for i in left], control)
            for i, draft in zip(left, others, strict=True):
                if draft.tokens:
                    drafts[i] = draft
                elif drafts[i].tokens:  # the other is behind: better this than none
                    self._from_free.add(asks[i].seq.id)
        return drafts

    def behind(self, seq: Seq) -> int:
        """Of the one that has more to read."""
        return max(self.free.behind(seq), self.other.behind(seq))

    def observe(self, records: Sequence[Verified]) -> None:
        """Each proposer learns of its own drafts."""
        mine = [record for record in records if record.seq in self._from_free]
        others = [record for record in records if record.seq not in self._from_free]
        for record in others:
            if record.drafted:
                self.typical += WEIGHT * (record.accepted - self.typical)
        self.free.observe(mine)
        self.other.observe(others)

    def forget(self, seq: Seq) -> None:
        """Both forget it."""
        self._from_free.discard(seq.id)
        self.free.forget(seq)
        self.other.forget(seq)
