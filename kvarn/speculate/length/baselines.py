"""Two rules in wide use, to be beaten: both are in the assisted generation of Hugging Face.

The heuristic makes a draft two tokens longer after a whole success and one shorter after any other
round; the confidence rule ends a draft at the first token that the proposer is not sure of. A third
rule, AdaEDL, bounds acceptance by the entropy of the drafter's distribution. It is not here: what a
proposer reports is the probability of the token alone.
"""

from collections.abc import Sequence

from kvarn.core.part import Part
from kvarn.core.plan import SeqId
from kvarn.speculate.part import Round, Verified

FIRST = 5  #: draft of a new sequence (transformers' default at first) [tokens]
LONGER, SHORTER = 2, 1  #: after a whole success; after any other round [tokens]
SURE = 0.4  #: least confidence that goes on (transformers' default)


class Heuristic(Part):
    """+2 if all were accepted, else -1, at least 1. State by sequence."""

    name, kind = "hf-heuristic", "draft-length"
    regime = "A baseline for small batches; slow to shrink when acceptance falls. Blind to costs."
    looks = False

    def __init__(self) -> None:
        self._lengths: dict[SeqId, int] = {}

    def rests(self) -> bool:
        """Never."""
        return False

    def plan(self, round_: Round) -> list[int]:
        """The length that each sequence has come to."""
        return [
            min(self._lengths.get(seq.id, FIRST), room)
            for seq, room in zip(round_.seqs, round_.room, strict=True)
        ]

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """To the planned length."""
        return True

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        """Longer or shorter."""
        for one in records:
            if one.drafted > 0:
                whole = one.accepted == one.depth
                now = self._lengths.get(one.seq, FIRST)
                self._lengths[one.seq] = now + LONGER if whole else max(1, now - SHORTER)

    def forget(self, seq: SeqId) -> None:
        """Drop its length."""
        self._lengths.pop(seq, None)


class Confidence(Part):
    """All the room there is, up to the first token that the proposer doubts."""

    name, kind = "confidence", "draft-length"
    regime = "A baseline for proposers that know how sure they are. Blind to costs, always drafts."
    looks = True

    def rests(self) -> bool:
        """Never."""
        return False

    def plan(self, round_: Round) -> list[int]:
        """All the room there is."""
        return list(round_.room)

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """While the last token was likely enough."""
        return not confidence or confidence[-1] >= SURE

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        """Nothing to learn."""

    def forget(self, seq: SeqId) -> None:
        """Nothing is kept."""
