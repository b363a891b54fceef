"""Drafts of no meaning, at no cost: what verification itself costs, measured on random weights.

With `synthetic_acceptance` a share of them is accepted, so that the speed of a proposer of that
quality, and of cost zero, can be told before it exists. It never shows quality.
"""

from collections.abc import Sequence

from kvarn.core.part import Part
from kvarn.core.plan import Draft
from kvarn.core.seq import Seq
from kvarn.speculate.part import Ask, LengthControl, Verified


class Synthetic(Part):
    """Repeats the last token; sure of each by the share that is accepted."""

    name, kind = "synthetic", "proposer"
    regime = "Measurements on random weights only. As a proposer it loses everywhere."

    def __init__(self, acceptance: float = 0.5) -> None:
        self.acceptance = acceptance

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        """As many tokens as are wanted."""
        return [self._draft(ask.seq, ask.most, control) for ask in asks]

    def _draft(self, seq: Seq, most: int, control: LengthControl) -> Draft:
        draft = Draft()
        while len(draft.tokens) < most and control.goes_on(draft.confidence):
            draft.tokens.append(seq.tokens[-1])
            draft.confidence.append(self.acceptance)
        return draft

    def behind(self, seq: Seq) -> int:
        """It reads nothing."""
        return 0

    def observe(self, records: Sequence[Verified]) -> None:
        """Nothing to learn."""

    def forget(self, seq: Seq) -> None:
        """Nothing is kept."""
