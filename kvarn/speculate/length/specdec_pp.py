"""The stopping rule of SpecDec++ (arXiv 2405.19715): draft until a rejection is likely enough.

A draft goes on while the probability that any of its tokens is rejected stays below a threshold.
With c1 the cost of a token that is discarded and c2 that of one more verification, stopping is
right from c2 / (c1 + c2) on (the paper's theorem with no difference in the future of the two
prefixes). The paper tunes one number; here both costs are the measured ones, and the threshold lies
between `LEAST` and `GREATEST`. In a batch a discarded token also costs its row of the step that
judges it. While no step without drafts has been seen, which a control that always drafts rarely
allows, the threshold is `UNKNOWN`; that is most of the time where one sequence runs.

The probability of a token is what the proposer reports. The drafting model has the paper's head for
it (`kvarn.speculate.train.head`), whose word comes one token late. In the paper the newest token
counts as accepted, so that a draft is never shorter than two; here the drafter's own probability
stands in for the head's word until that comes.

Regime: proposers that draft token by token and know how sure they are. Loses to a fixed length
where confidence says nothing of acceptance; never says that drafts should not be made at all.
"""

import math
from collections.abc import Sequence

from kvarn.core.errors import ConfigError
from kvarn.core.part import Cap, Part
from kvarn.core.plan import SeqId
from kvarn.speculate.part import Costs, Round, Verified

LEAST, GREATEST = 0.2, 0.8  #: bounds of the threshold where it follows costs (ours)
UNKNOWN = 0.5  #: threshold while times are not known (ours)
LONGEST = 20  #: tokens of a draft (the released configuration)


class SpecDecPP(Part):
    """One threshold for all; nothing is kept by sequence."""

    name, kind, paper = "specdec-pp", "draft-length", "2405.19715"
    needs = frozenset({Cap.STEP_TIMES})
    regime = (
        "Proposers that draft token by token and know how sure they are, at small batches. Loses "
        "where confidence says nothing of acceptance, and at large batches: it always drafts."
    )
    looks = True

    def __init__(self, threshold: float | None = None) -> None:
        """`threshold`: probability of a rejection that ends a draft; None: by measured costs."""
        if threshold is not None and not 0.0 < threshold <= 1.0:
            raise ConfigError(f"a threshold of {threshold} never holds: it is a probability")
        self._tuned = threshold
        self.threshold = UNKNOWN if threshold is None else threshold

    def rests(self) -> bool:
        """Never."""
        return False

    def plan(self, round_: Round) -> list[int]:
        """The longest draft; where it stops is said while it grows."""
        if self._tuned is None:
            rows, seqs = round_.others + len(round_.seqs), len(round_.seqs)
            self.threshold = threshold_of(round_.costs, rows, seqs)
        return [min(LONGEST, room) for room in round_.room]

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """While it is likely enough that all of them are accepted."""
        return 1.0 - math.prod(confidence) < self.threshold

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        """Nothing to learn: costs come with the round."""

    def forget(self, seq: SeqId) -> None:
        """Nothing is kept."""


def threshold_of(costs: Costs, rows: int, seqs: int) -> float:
    """c2 / (c1 + c2) for a step of `rows` rows without drafts, `seqs` sequences drafted for."""
    step, token = costs.step(rows), costs.draft(seqs, 1)
    if step == 0.0:
        return UNKNOWN
    discarded = token + max(0.0, costs.verifying(rows + seqs) - costs.verifying(rows))
    verification = max(0.0, step - token)
    if discarded == 0.0:
        return GREATEST
    return min(max(verification / (discarded + verification), LEAST), GREATEST)
