"""The books of `survival`: what drafts may lose, when they are tried, and what came of them."""

import math
from dataclasses import dataclass

KEEP = 0.97  #: weight of the past at each judged token of a sequence, and at each draft
SHARE = 0.0075  #: of the time without drafts, what may be lost by trying them
FIRST, MOST = 2.0, 3.0  #: what the account holds at first, and at most, for many sequences
LUCK = 1.0  #: both are larger by this over the root of their number: the tokens of few are luck
DEAREST = 2.0  #: a round loses no more than this: longer ones compiled something, say

TRIAL, LENGTHS = 3, (3, 1, 5, 2)  #: rounds of a trial, and the lengths of trials, in turn
SHORTEST_PAUSE, LONGEST_PAUSE = 8, 256  #: rounds between two trials, doubled each time


@dataclass(slots=True)
class Account:
    """What may still be lost [plain steps]."""

    holds: float = 0.0
    most: float = 0.0  #: 0 before the first round
    owes: float = 0.0  #: for prompts that were read

    def open(self, seqs: int) -> None:
        """So many sequences run now."""
        luck = 1.0 + LUCK / math.sqrt(seqs)
        if self.most == 0.0:
            self.holds = FIRST * luck
        self.most = MOST * luck

    @property
    def full(self) -> bool:
        """Whether nothing more can be paid in."""
        return self.holds >= self.most

    def add(self, gain: float) -> None:
        """Pay in, what is owed first, or out."""
        repaid = min(self.owes, max(gain, 0.0))
        self.owes -= repaid
        self.holds = min(self.most, self.holds + max(gain - repaid, -DEAREST))

    def borrow(self, loss: float) -> None:
        """What a round has lost that read prompts."""
        self.owes += loss


@dataclass(slots=True)
class Trials:
    """When drafts are tried against the estimates, and at which length."""

    left: int = 0  #: rounds of the one under way
    seqs: int = 0  #: that take part
    wait: int = 0  #: rounds to the next
    pause: int = SHORTEST_PAUSE  #: rounds after that one
    count: int = 0

    @property
    def length(self) -> int:
        """Of the trial under way, or else of the next."""
        return LENGTHS[self.count % len(LENGTHS)]

    def repays(self) -> None:
        """Drafts pay without a trial: where they cease to, the next one comes soon."""
        self.pause = SHORTEST_PAUSE

    def goes_on(self) -> None:
        """A round of the trial is made."""
        self.left -= 1
        if self.left == 0:
            self.count += 1
            self.wait, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)


@dataclass(slots=True)
class Past:
    """Judged tokens and those of them that stood; old ones count less and less."""

    accepted: float = 0.0
    judged: float = 0.0

    def fade(self, weight: float) -> None:
        """They count for less."""
        self.accepted *= weight
        self.judged *= weight

    def add(self, accepted: int, judged: int, keep: float) -> None:
        """Some more; `keep`: the weight of the past at each."""
        self.fade(keep**judged)
        self.accepted += accepted
        self.judged += judged

    @property
    def share(self) -> float:
        """Of judged tokens, those that stood."""
        return self.accepted / self.judged


@dataclass(slots=True)
class Shape:
    """Tokens of drafts and their levels; old drafts count less and less."""

    tokens: float = 0.0
    levels: float = 0.0

    def add(self, tokens: int, levels: int) -> None:
        """One draft more."""
        self.tokens = KEEP * self.tokens + tokens
        self.levels = KEEP * self.levels + levels

    @property
    def width(self) -> float:
        """Tokens a level: 1 of chains."""
        return self.tokens / self.levels if self.levels else 1.0
