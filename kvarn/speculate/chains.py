"""Where would drafts have ended? Length rules played over the chains of a text, none of them timed.

At every place of a text that the target wrote greedily, the drafter's whole chain is drafted once.
Any rule that looks at nothing but the words on a chain's tokens can then be played exactly: what it
drafts, what stands of it, how often the target verifies. With t_d the time of a drafted token and
t_T that of a verification, `tokens` tokens take t_d tokens + c1 discarded + c2 verifications, with
c1 = t_d and c2 = t_T - t_d (SpecDec++, arXiv 2405.19715): counts are all that rules differ in.

Regime: one sequence, a step that costs the same with drafts as without. That is near the truth
where the target is bound by memory, and not where rows cost time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvarn.core.errors import ConfigError
from kvarn.core.request import Request, SamplingParams
from kvarn.core.seq import Seq
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.part import Ask
from kvarn.speculate.propose.draft_model import DraftModel

ROWS = 16  #: chains drafted at once
GREEDY = SamplingParams(temperature=0.0)

GoesOn = Callable[[Sequence[float]], bool]  #: see `LengthControl.goes_on`


@dataclass(slots=True)
class Chain:
    """What the drafter says from one place on."""

    said: list[float]  #: the word on each token: of the acceptance head, where there is one
    stands: int  #: leading tokens that are the text's own
    own: list[float]  #: the drafter's probability of each token: until the head's word comes


@dataclass(slots=True)
class Counts:
    """What a rule did to texts; `tokens` leaves out each text's first, which a prompt brings."""

    tokens: int = 0
    verifications: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def discarded(self) -> int:
        """Drafted tokens that did not stand."""
        return self.drafted - self.accepted

    def excess(self, ratio: float) -> float:
        """c1 discarded + c2 verifications, a token, in drafted tokens; `ratio` is c2 / c1."""
        return (self.discarded + ratio * self.verifications) / self.tokens

    def speed(self, ratio: float) -> float:
        """Over no drafts, where a step takes `ratio` + 1 drafted tokens."""
        step = ratio + 1.0
        return self.tokens * step / (self.verifications * step + self.drafted)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.tokens + other.tokens,
            self.verifications + other.verifications,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )


def chains_of(drafter: DraftModel, tokens: Sequence[int], prompt: int, longest: int) -> list[Chain]:
    """The chain at every place of the output of a text, from its second token on.

    `tokens` [prompt + n] are the prompt and what the target wrote; no request of the engine runs.
    Raises `ConfigError` where the drafter has no room for the chain of one place.
    """
    found = dict[int, Chain]()
    places = range(prompt + 1, len(tokens))
    for first in range(0, len(places), ROWS):
        todo = list[Ask]()
        for place in places[first : first + ROWS]:
            known = list(tokens[:place])
            request = Request(f"chain-{place}", known, GREEDY)
            todo.append(Ask(Seq(-place, request, 0, known, 1 << 60, (0, place)), longest))
        rounds = 0
        while todo:
            drafts = drafter.propose(todo, Fixed())
            behind = list[Ask]()  # not caught up within the budget
            for ask, draft in zip(todo, drafts, strict=True):
                place = len(ask.seq.tokens)
                if not draft.tokens:
                    behind.append(ask)
                    continue
                stands, said = _agreed(draft.tokens, tokens[place:]), draft.confidence
                found[place] = Chain(said, stands, said)
                drafter.forget(ask.seq)
            todo, rounds = behind, rounds + 1
            if rounds > ROWS * len(tokens):
                raise ConfigError(
                    f"the drafter has no room for {len(tokens)} tokens and chains of {longest}: "
                    f"raise kv_memory or lower max_seqs"
                )
    return [found[place] for place in places]


def _agreed(drafted: Sequence[int], text: Sequence[int]) -> int:
    count = 0
    for mine, theirs in zip(drafted, text):
        if mine != theirs:
            break
        count += 1
    return count


def play(chains: Sequence[Chain], goes_on: GoesOn, longest: int) -> Counts:
    """One text under a rule that drafts up to `longest` tokens."""
    made, place = Counts(), 0
    while place < len(chains):
        chain = chains[place]
        room = min(longest, len(chain.said), len(chains) - place - 1)
        count = min(1, room)
        while 0 < count < room and goes_on([*chain.said[: count - 1], chain.own[count - 1]]):
            count += 1
        accepted = min(count, chain.stands)
        made += Counts(accepted + 1, 1, count, accepted)
        place += accepted + 1
    return made


def known(chains: Sequence[Chain], longest: int) -> Counts:
    """The limit: who knows what stands drafts that and nothing else."""
    made, place = Counts(), 0
    while place < len(chains):
        count = min(longest, chains[place].stands, len(chains) - place - 1)
        made += Counts(count + 1, 1, count, count)
        place += count + 1
    return made
