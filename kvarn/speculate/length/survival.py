"""A budget for the whole batch: draft where a token is likely to survive, while that pays.

Position i of a draft survives with probability a^i, a being what the sequence's drafts have been
accepted with, drawn towards the acceptance of all: the largest of many noisy shares is luck. Where
drafts are trees, of w tokens a level so far, it is a level that survives, and its tokens share
that. The tokens of all sequences are taken in falling order of survival; of the numbers of them,
the one with the most expected tokens a second is drafted, by the measured times of steps with
drafts. None is a candidate like any other, by the measured times of steps without, which are
planned ahead and so cost less than such a step with no drafts in it.

An account bounds what may be lost (ours; the measure is the utility of arXiv 2506.20675 over the
batch). It is kept in plain steps. Every round without drafts pays `SHARE` of a step into it; every
round with drafts pays in what it gained over plain steps, or takes out what it lost, by the tokens
and the time that it really took. Drafts that the estimates speak for are made while the account is
not empty. Where the estimates speak against them, or know nothing, they are tried, `TRIAL` rounds
at one length for everybody, when the account can pay for that. So all that is ever lost is what the
account began with and `SHARE` of the time, whatever the estimates say.

Regime: the default. It needs times that repeat: what drafts gain must show within some dozen rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvarn.core.part import Cap, Part
from kvarn.core.plan import SeqId
from kvarn.speculate.part import Costs, Round, Verified

PRIOR, WEIGHT = 0.5, 12  #: acceptance of a drafted token while nothing has been seen; judged tokens
KEEP, KEEP_ALL = 0.97, 0.998  #: weight of the past at each judged token: a sequence's, of all
OTHERS = 16  #: judged tokens that the acceptance of all counts as in a sequence's own
FOUND = 0.95  #: weight of the past in the share of asked tokens that the proposer finds, by round
PAYS = 1.02  #: drafts must promise this many times the tokens a second of none
SHARE = 0.01  #: of the time without drafts, what may be lost by trying them
FIRST, MOST = 3.0, 6.0  #: the account's beginning, and its most [plain steps]
DEAREST = 2.0  #: a round loses no more than this [plain steps]: longer ones were a capture, say
TRIAL, LENGTHS = 3, (3, 1, 5, 2)  #: rounds of a trial, and the lengths of trials, in turn
LEAST_LOSS = 0.05  #: of a round on trial, at least, as far as the estimates know [plain steps]
PLAIN = 4  #: rounds without drafts that measure the plain step: the first does not count
REFRESH = 200  #: rounds with drafts after which it is measured again
GRID = 24  #: numbers of drafted tokens that are compared
LOOK = 16  #: once in so many rounds another number is drafted, to learn its time:
ASIDE = 0.8, 1.25, 0.6  #: these shares of the best one, in turn


@dataclass(slots=True)
class _Past:
    """Judged tokens and those of them that stood; old ones count less and less."""

    accepted: float = 0.0
    judged: float = 0.0

    def fade(self, weight: float) -> None:
        self.accepted *= weight
        self.judged *= weight

    def add(self, accepted: int, judged: int, keep: float) -> None:
        self.fade(keep**judged)
        self.accepted += accepted
        self.judged += judged


@dataclass(slots=True)
class _Shape:
    """Tokens of drafts and their levels; old drafts count less and less."""

    tokens: float = 0.0
    levels: float = 0.0

    def add(self, tokens: int, levels: int) -> None:
        self.tokens = KEEP * self.tokens + tokens
        self.levels = KEEP * self.levels + levels

    @property
    def width(self) -> float:
        """Tokens a level: 1 of chains."""
        return self.tokens / self.levels if self.levels else 1.0


class Survival(Part):
    """Tokens by survival, their number by the measured cost of a step."""

    name, kind = "survival", "draft-length"
    needs = frozenset({Cap.STEP_TIMES})
    regime = (
        "The default: gives drafts up where they do not pay, and loses at most some hundredth of "
        "the time by finding out. Loses to the best fixed length where that is known."
    )

    def __init__(self) -> None:
        self._past: dict[SeqId, _Past] = {}
        self._all = _Past(PRIOR * WEIGHT, WEIGHT)  # of every sequence, those that ended too
        self._shape = _Shape()
        self._found = 1.0  # of the tokens asked for, the share that the proposer finds
        self._account = FIRST
        self._resting = 0  # rounds left that measure the plain step
        self._since = 0  # rounds with drafts since it was measured
        self._trial = 0  # rounds left of the trial under way
        self._trials = 0
        self._round = 0
        self._asked = 0  # tokens, in the round under way; 0: none
        self._least = 0.0  # survival below which a token costs more than it brings
        self._plain = 0.0  # the step without drafts, of the round under way [s]
        self._back = 0.0  # what going back to such steps costs [plain steps]

    def rests(self) -> bool:
        """While the plain step is measured."""
        self._round += 1
        if self._resting == 0 and self._since >= REFRESH:
            self._rest()
        if self._resting == 0:
            return False
        self._resting -= 1
        self._goes_plain()
        return True

    def plan(self, round_: Round) -> list[int]:
        """Tokens for each sequence; all 0 while drafts do not pay."""
        n, costs = len(round_.seqs), round_.costs
        if not costs.knows(n):
            self._rest()
            self._goes_plain()
            return [0] * n
        self._plain = costs.step(n)
        self._back = min(costs.back() / self._plain, DEAREST)
        lengths, gain = self._best(round_)
        if self._trial == 0 and gain < PAYS and self._can_try(costs, n):
            self._trial = TRIAL
        if self._trial > 0:
            lengths = [min(self._tried, room) for room in round_.room]
            self._trial -= 1
            self._trials += self._trial == 0
        elif gain < PAYS or self._account <= 0.0:
            lengths = [0] * n
        if not any(lengths):
            self._goes_plain()
            return lengths
        self._since += 1
        self._asked = sum(lengths)
        return lengths

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """While what has been drafted is likely enough to stand."""
        reach = 1.0
        for sure in confidence:
            reach *= sure
        return reach >= self._least

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        """Acceptance by sequence: of the tokens that were judged, how many stood."""
        drafted = tokens = 0
        for one in records:
            tokens += one.accepted + 1
            if one.drafted == 0:
                past = self._past.get(one.seq)
                if past is not None:  # who is not drafted for comes back to the acceptance of all
                    past.fade(KEEP)
                continue
            drafted += one.drafted
            self._past.setdefault(one.seq, _Past()).add(one.accepted, one.judged, KEEP)
            self._all.add(one.accepted, one.judged, KEEP_ALL)
            self._shape.add(one.drafted, one.depth)
        if self._asked:
            share = min(1.0, drafted / self._asked)
            self._found = FOUND * self._found + (1.0 - FOUND) * share
        if self._asked and step > 0.0 and records:
            loss = (step + draft) / self._plain - tokens / len(records)
            self._account = min(MOST, self._account - min(loss, DEAREST))

    def forget(self, seq: SeqId) -> None:
        """Drop what is known of it."""
        self._past.pop(seq, None)

    @property
    def _tried(self) -> int:
        """Length of the trial under way, or of the next."""
        return LENGTHS[self._trials % len(LENGTHS)]

    def _rest(self) -> None:
        self._resting, self._since = PLAIN - 1, 0

    def _goes_plain(self) -> None:
        """A round without drafts."""
        self._account = min(MOST, self._account + SHARE - (self._back if self._asked else 0.0))
        self._asked = 0

    def _can_try(self, costs: Costs, n: int) -> bool:
        """Whether the account pays for a trial of the next length."""
        share, length = self._all.accepted / self._all.judged, self._tried
        levels = range(1, int(length / self._shape.width) + 1)
        tokens = 1.0 + self._found * sum(share**i for i in levels)
        seconds = costs.verifying(n * (1 + length)) + costs.draft(n, length)
        loss = max(seconds / self._plain - tokens, LEAST_LOSS)
        return self._account >= TRIAL * loss + self._back

    def _of(self, seq: SeqId, share: float) -> float:
        """Acceptance to expect: its own as far as it is known, else that of all."""
        past = self._past.get(seq)
        if past is None:
            return share
        return (past.accepted + OTHERS * share) / (past.judged + OTHERS)

    def _best(self, round_: Round) -> tuple[list[int], float]:
        """The lengths with the most tokens a second, and their gain over none."""
        costs, n = round_.costs, len(round_.seqs)
        all_, tokens = self._all.accepted / self._all.judged, list[tuple[float, int]]()
        width = self._shape.width
        for place, seq in enumerate(round_.seqs):
            share = reach = self._of(seq.id, all_)
            for count in range(1, round_.room[place] + 1):
                tokens.append((reach / width, place))
                if int(count / width) > int((count - 1) / width):  # the next has a new level
                    reach *= share
        tokens.sort(reverse=True)
        best, best_rate, self._least = 0, n / self._plain, 1.0
        expected, taken, longest = float(n), 0, [0] * n
        for part in range(1, GRID + 1):
            count = len(tokens) * part // GRID
            for reach, place in tokens[taken:count]:
                expected += self._found * reach
                longest[place] += 1
            taken = count
            asked = int(self._found * count)
            seconds = costs.verifying(n + asked) + costs.draft(n, -(-asked // n))
            if expected / seconds > best_rate and count:
                best, best_rate, self._least = count, expected / seconds, tokens[count - 1][0]
        if self._round % LOOK == 0:  # between two known sizes a step is cheaper than the line
            aside = ASIDE[self._round // LOOK % len(ASIDE)]
            best = min(int(best * aside), len(tokens))
        lengths = [0] * n
        for _, place in tokens[:best]:
            lengths[place] += 1
        self._least *= 0.5  # a draft's own confidence may say more than its sequence's past
        return lengths, best_rate * self._plain / n
