"""GammaTune (arXiv 2504.00030, algorithm 1): the next length from the last accepted count.

A round in which everything was accepted makes the next one `delta` longer and leaves the average
alone; any other moves the average towards what was accepted and falls back to it at once. So
lengths grow step by step and shrink in one. GammaTune+ also stops a round as soon as the proposer
is less sure of its next token than `tau`. A tree was accepted whole where its longest path was; the
average is of depths, and the length has room for trees as wide as the last one.

Regime: acceptance that changes within a request (code, then talk). Gains nothing over the best
fixed length where acceptance is stationary, and knows no costs: at large batches it is slower than
no speculation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvarn.core.part import Part
from kvarn.core.plan import SeqId
from kvarn.speculate.part import Round, Verified


@dataclass(slots=True)
class _State:
    length: int  #: of the next draft [tokens]
    average: float  #: of accepted tokens, rounds that were accepted whole left out


@dataclass(slots=True)
class Rates:
    """The paper gives none of these; they are ours."""

    eta: float = 0.3  #: weight of the last round in the average
    delta: int = 2  #: growth after a round that was accepted whole [tokens]
    least: int = 1  #: shortest draft [tokens]
    most: int = 16  #: longest draft [tokens]
    first: int = 4  #: draft of a new sequence [tokens]


class GammaTune(Part):
    """State by sequence; it outlives preemption."""

    name, kind, paper = "gammatune", "draft-length", "2504.00030"
    regime = "Acceptance that changes within a request, at small batches. Blind to costs."
    looks = False

    def __init__(self, rates: Rates | None = None) -> None:
        self.rates = rates or Rates()
        self._states: dict[SeqId, _State] = {}

    def rests(self) -> bool:
        """Never."""
        return False

    def plan(self, round_: Round) -> list[int]:
        """The length that each sequence has come to."""
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
                state.length = min(one.drafted + rates.delta, rates.most)
                continue
            moved = (1 - rates.eta) * state.average + rates.eta * one.accepted
            state.average = min(max(moved, rates.least), rates.most)
            state.length = min(math.ceil(state.average * one.drafted / one.depth), rates.most)

    def forget(self, seq: SeqId) -> None:
        """Drop its state."""
        self._states.pop(seq, None)

    def _state(self, seq: SeqId) -> _State:
        first = self.rates.first
        return self._states.setdefault(seq, _State(first, float(first)))


class GammaTunePlus(GammaTune):
    """With the stop inside a round."""

    name = "gammatune-plus"
    regime = "As gammatune, for proposers that know how sure they are. Blind to costs."
    looks = True
    tau = 0.4  #: least confidence of a token that is kept

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """While the last token was likely enough."""
        return not confidence or confidence[-1] >= self.tau
