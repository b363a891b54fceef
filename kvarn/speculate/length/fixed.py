"""The same number of drafted tokens for everybody, always: the baseline of adaptive control.

Regime: stationary acceptance at one batch size, with the number found by a sweep. Loses as soon as
either changes: at large batches every fixed length above 0 is slower than no speculation.
"""

from collections.abc import Sequence

from kvarn.core.part import Part
from kvarn.core.plan import SeqId
from kvarn.speculate.part import Round, Verified


class Fixed(Part):
    """As many tokens as there is room for: `draft_tokens` is the number."""

    name, kind, paper = "fixed", "draft-length", "2211.17192"
    regime = "The baseline. Best where nothing changes; slower than no drafts at large batches."
    looks = False

    def rests(self) -> bool:
        """Never."""
        return False

    def plan(self, round_: Round) -> list[int]:
        """All the room there is."""
        return list(round_.room)

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """Always."""
        return True

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        """Nothing to learn."""

    def forget(self, seq: SeqId) -> None:
        """Nothing is kept."""
