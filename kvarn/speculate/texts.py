"""Proposers and length controls played over texts that a model wrote, without the model.

Greedy decoding says the same whatever was drafted for it. So a text that was written once tells the
fate of every draft, and what a proposer and a control make of it is exact: the rounds (steps that
bring tokens) and the tokens drafted in each are those of an engine that serves the requests one
after the other. What they take is then a matter of prices.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from kvarn.core.plan import Draft
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.speculate.chains import Chain
from kvarn.speculate.part import Ask, Costs, LengthControl, Proposer, Round, Verified
from kvarn.speculate.trial import Roofline

_serial = count(1)


@dataclass(slots=True)
class Told:
    """What one text or several took; the first token of each comes with its prompt."""

    tokens: int = 0  #: decoded, the first ones left out
    drafts: Counter[int] = field(default_factory=Counter)  #: rounds by the tokens drafted in them

    @property
    def rounds(self) -> int:
        """Steps that brought tokens."""
        return self.drafts.total()

    @property
    def drafted(self) -> int:
        """Tokens that were verified."""
        return sum(length * rounds for length, rounds in self.drafts.items())

    @property
    def accepted(self) -> int:
        """Of these, the ones that stood: a round brings them and one more."""
        return self.tokens - self.rounds

    def seconds(self, costs: Costs) -> float:
        """By prices of steps and drafts."""
        return sum(rounds * _round(length, costs) for length, rounds in self.drafts.items())

    def speedup(self, costs: Costs) -> float:
        """Over no drafts."""
        return self.tokens * costs.step(1) / self.seconds(costs)

    def __add__(self, other: "Told") -> "Told":
        return Told(self.tokens + other.tokens, self.drafts + other.drafts)


def _round(length: int, costs: Costs) -> float:
    """One sequence's step with so many drafts, and the drafting [s]."""
    if length == 0:
        return costs.step(1)
    return costs.verifying(1 + length) + costs.draft(1, length)


def tell(
    proposer: Proposer,
    control: LengthControl,
    prompt: Sequence[int],
    answer: Sequence[int],
    most: int,
    costs: Costs | None = None,
    knows: bool = False,
    salt: str = "",
) -> Told:
    """One request. `costs`: what the control sees, and pays; `knows`: drafts end where they fail;
    `salt`: of the request, who shares what was said before (`Suffix`)."""
    costs, number = costs or Roofline(), next(_serial)
    known, text = [*prompt, *answer[:1]], [*prompt, *answer]
    request = Request(str(number), list(prompt), cache_salt=salt)
    seq = Seq(number, request, 0, known, len(text), (0, number))
    told = Told(len(answer) - 1)
    while len(known) < len(text):
        draft = _drafted(proposer, control, seq, min(most, len(text) - len(known) - 1), costs)
        stands, left = 0, text[len(known) :]
        while stands < len(draft.tokens) and draft.tokens[stands] == left[stands]:
            stands += 1
        if knows:
            draft = draft.first(stands)
        record = Verified(number, len(draft.tokens), stands, draft.confidence)
        if record.drafted:
            asked = costs.draft(1, record.drafted)
            control.observe([record], costs.verifying(1 + record.drafted), asked)
            proposer.observe([record])
        told.drafts[record.drafted] += 1
        known += left[: stands + 1]
    proposer.forget(seq)
    control.forget(number)
    return told


def _drafted(
    proposer: Proposer, control: LengthControl, seq: Seq, room: int, costs: Costs
) -> Draft:
    """What the round verifies."""
    if control.rests() or room < 1:
        return Draft()
    behind = [proposer.behind(seq)]
    length = min(room, control.plan(Round([seq], [room], 0, costs, behind))[0])
    if length < 1:
        return Draft()
    return proposer.propose([Ask(seq, length)], control)[0].first(length)


class Recorded:
    """A proposer that says what a drafting model said from each place of one text."""

    def __init__(self, chains: Sequence[Chain], first: int, text: Sequence[int]) -> None:
        """`chains`: from the place `first` of the text on, its prompt counted."""
        self.chains, self.first, self.text = chains, first, text

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        """As far as the control lets it."""
        return [self._draft(len(ask.seq.tokens), ask.most, control) for ask in asks]

    def behind(self, seq: Seq) -> int:
        """Nothing."""
        return 0

    def observe(self, records: Sequence[Verified]) -> None:
        """Nothing to learn."""

    def forget(self, seq: Seq) -> None:
        """Nothing is kept."""

    def _draft(self, place: int, most: int, control: LengthControl) -> Draft:
        chain = self.chains[place - self.first]
        room, length = min(most, len(chain.said)), 1
        while length < room and control.goes_on([*chain.said[: length - 1], chain.own[length - 1]]):
            length += 1
        right = list(self.text[place : place + min(length, chain.stands)])
        wrong = [-1] * (length - len(right))  # what it was does not matter
        return Draft(right + wrong, None, chain.said[:length])
