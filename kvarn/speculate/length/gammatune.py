"""GammaTune (arXiv 2504.00030, algorithm 1): the next length from the last accepted count.

A round in which everything was accepted makes the next one `delta` longer and leaves the average
alone; any other moves the average towards what was accepted and falls back to it at once. So
lengths grow step by step and shrink in one. GammaTune+ also stops a round as soon as the proposer
is less sure of its next token than `tau`. A tree was accepted whole where its longest path was; the
average is of depths, and the length has room for trees as wide as the last one.

The paper gives no constants, and none are right for free drafts and for dear ones: with a growth of
two tokens, drafts that cost nothing and are accepted with 0.85 each came to 0.55 of the best fixed
length's speed, for the average leaves whole successes out and so lies below what could be drafted.
Here `delta` tokens cost about a third of a step, and a draft is longer than the average by what
costs a fourteenth, by measured times; the rule itself is the paper's. `eta` is large so that two or
three failures, not six, lead from long drafts to the lengths of a poor stretch.

Regime: acceptance that changes within a request (code, then talk). Where it is stationary the best
fixed length is faster by up to an eighth: lengths that vary about the best one lose on either side,
and the stop of GammaTune+ makes up for it. It always drafts: at large batches it is slower than no
speculation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvarn.core.part import Cap, Part
from kvarn.core.plan import SeqId
from kvarn.speculate.part import Costs, Round, Verified

GROWTH, SPARE = 0.35, 0.07  #: what `delta` and `above` tokens cost, in steps (ours)
SPAN = 8  #: tokens of a draft whose cost is looked up
#: growth, and draft of a new sequence, while costs are not known; what is accepted of it [tokens]
DELTA, FIRST = 2, 4


@dataclass(slots=True)
class _State:
    length: int  #: of the next draft [tokens]
    average: float  #: of accepted tokens, rounds that were accepted whole left out


@dataclass(slots=True)
class Rates:
    """The paper gives none of these; they are ours."""

    eta: float = 0.7  #: weight of the last round in the average
    delta: int | None = None  #: growth after a whole success; None: by costs [tokens]
    above: int | None = None  #: drafted beyond the average; None: by costs [tokens]
    least: int = 1  #: shortest draft, and least average [tokens]
    most: int = 16  #: longest draft [tokens]
    first: int | None = None  #: draft of a new sequence; None: by costs [tokens]


class GammaTune(Part):
    """State by sequence; it outlives preemption."""

    name, kind, paper = "gammatune", "draft-length", "2504.00030"
    needs = frozenset({Cap.STEP_TIMES})
    regime = (
        "Acceptance that changes within a request, at small batches. Loses to the best fixed "
        "length where it does not, and to no drafts at large batches: it always drafts."
    )
    looks = False

    def __init__(self, rates: Rates | None = None) -> None:
        self.rates = rates or Rates()
        self._states: dict[SeqId, _State] = {}
        self._delta, self._above, self._first = DELTA, 0, FIRST
        self._follow(None)

    def rests(self) -> bool:
        """Never."""
        return False

    def plan(self, round_: Round) -> list[int]:
        """The length that each sequence has come to."""
        seqs = len(round_.seqs)
        self._follow(price_of(round_.costs, round_.others + seqs, seqs))
        return [
            min(self._state(seq.id).length, room)
            for seq, room in zip(round_.seqs, round_.room, strict=True)
        ]

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """To the planned length."""
        return True

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        """Longer after a whole success, else back to the average."""
        rates = self.rates
        for one in records:
            if one.drafted == 0:
                continue
            state = self._state(one.seq)
            if one.accepted == one.depth:
                state.length = min(one.drafted + self._delta, rates.most)
                continue
            moved = (1 - rates.eta) * state.average + rates.eta * one.accepted
            state.average = min(max(moved, rates.least), rates.most)
            wide = math.ceil(state.average * one.drafted / one.depth)
            state.length = min(wide + self._above, rates.most)

    def forget(self, seq: SeqId) -> None:
        """Drop its state."""
        self._states.pop(seq, None)

    def _follow(self, price: float | None) -> None:
        """What is not given follows what a drafted token costs, in steps; None: not known."""
        rates = self.rates
        if price is not None:
            self._delta = self._first = max(rates.least, _worth(GROWTH, price, rates.most))
            self._above = _worth(SPARE, price, rates.most)
        self._delta = self._delta if rates.delta is None else rates.delta
        self._above = self._above if rates.above is None else rates.above
        self._first = self._first if rates.first is None else rates.first

    def _state(self, seq: SeqId) -> _State:
        state = self._states.get(seq)
        if state is None:
            known = self.rates.first or min(FIRST, self._first)
            state = self._states[seq] = _State(self._first, float(known))
        return state


def price_of(costs: Costs, rows: int, seqs: int) -> float | None:
    """One token more of everybody's draft, in steps of `rows` rows; None: not known."""
    step = costs.verifying(rows)
    if step == 0.0:
        return None
    judging = costs.verifying(rows + SPAN * seqs) - step
    return (costs.draft(seqs, SPAN) + max(0.0, judging)) / SPAN / step


def _worth(share: float, price: float, most: int) -> int:
    """Tokens that cost about such a share of a step, up to `most`."""
    return most if share >= price * most else round(share / price)


class GammaTunePlus(GammaTune):
    """With the stop inside a round."""

    name = "gammatune-plus"
    regime = "As gammatune, for proposers that know how sure they are."
    looks = True
    tau = 0.4  #: least confidence of a token that is kept

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """While the last token was likely enough."""
        return not confidence or confidence[-1] >= self.tau
