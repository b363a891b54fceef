"""A budget for the whole batch: draft where a token is likely to survive, while that pays.

Position i of a draft survives with probability a^i, a being what the sequence's drafts have been
accepted with, drawn towards the acceptance of all: the largest of many noisy shares is luck. Where
drafts are trees, of w tokens a level so far, it is a level that survives, and its tokens share
that. The tokens of all sequences are taken in falling order of survival; of every number of them,
the one with the most expected tokens a second is drafted, by the measured times of steps and
drafts. None is a candidate like any other.

Expectations are held against what came: every few rounds with drafts, the tokens that they brought
and the time that they took are compared with what plain steps would have (the utility of arXiv
2506.20675, over the batch; the budget is ours, as are the constants). Where drafts lose, by either
measure, they are tried again after a pause that doubles with every failure, so that what
speculation costs where it does not pay tends to nothing.

Regime: the default. It needs times that repeat; on a machine whose steps vary by more than drafts
gain, it decides by noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from kvarn.core.part import Cap, Part
from kvarn.core.plan import SeqId
from kvarn.speculate.part import Round, Verified

PRIOR = 0.5  #: acceptance of a drafted token, while nothing has been seen
KEEP, KEEP_ALL = 0.97, 0.998  #: weight of the past at each judged token: a sequence's, of all
OTHERS = 16  #: judged tokens that the acceptance of all counts as in a sequence's own
PAYS = 1.03  #: speculation must promise this many times the tokens a second of none
FIRST_PAUSE, LONGEST_PAUSE = 8, 512  #: rounds without drafts after a failure
REFRESH = 50  #: rounds after which one without drafts measures the plain step again
LEARN = 12  #: rounds of drafts before times are believed
TRIED_SHARE = 8  #: one of so many sequences is drafted for in these rounds
HOPELESS = 0.8, 4  #: below this gain after so many rounds, the rest of them is not waited for
JUDGE = 16  #: rounds of drafts over which they are judged by what they brought
LOOK = 16  #: once in so many rounds another number of tokens is drafted, to learn its time:
ASIDE = 0.8, 1.2, 0.6  #: these shares of the best one, in turn
LONGEST_TRIAL = 4  #: draft of these rounds, from 1 token on [tokens]


@dataclass(slots=True)
class _Made:
    """What rounds with drafts brought, and what plain steps would have."""

    rounds: int = 0
    tokens: int = 0
    plain_tokens: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0


@dataclass(slots=True)
class _Past:
    """Judged places and those of them that stood; old ones count less and less."""

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
        "The default: gives drafts up where they do not pay. Loses to the best fixed length where "
        "that is known, and on machines whose steps vary by more than drafts gain."
    )

    def __init__(self) -> None:
        self._past: dict[SeqId, _Past] = {}
        self._all = _Past(PRIOR * LEARN, LEARN)  # of every sequence, those that ended too
        self._shape = _Shape()
        self._resting = 0  # rounds left without drafts
        self._pause = FIRST_PAUSE
        self._tried = 0  # rounds with drafts since the last rest
        self._round = 0
        self._least = 0.0  # survival below which a token costs more than it brings
        self._plain = 0.0  # the step without drafts, of the round under way [s]
        self._made = _Made()

    def rests(self) -> bool:
        """After drafts did not pay, and now and then to time the plain step."""
        self._round += 1
        if self._round % REFRESH == 0:
            return True
        self._resting -= self._resting > 0
        return self._resting > 0

    def plan(self, round_: Round) -> list[int]:
        """Tokens for each sequence; all 0 while drafts do not pay."""
        rows = round_.others + len(round_.seqs)
        none = [0] * len(round_.seqs)
        if round_.costs.step(rows) == 0.0:
            return none
        if self._tried < LEARN:
            return self._trial(round_)
        lengths, ratio = self._best(round_, rows)
        if ratio >= PAYS:
            self._plain = round_.costs.step(rows)
            return lengths
        self._rest()
        return none

    def _trial(self, round_: Round) -> list[int]:
        """Drafts of 1 to `LONGEST_TRIAL` tokens for a few sequences, in turn."""
        n, length = len(round_.room), 1 + self._tried % LONGEST_TRIAL
        some = max(1, n // TRIED_SHARE)
        first = self._tried * some
        lengths = [0] * n
        for place in range(first, first + some):
            lengths[place % n] = min(length, round_.room[place % n])
        return lengths

    def _rest(self) -> None:
        self._resting, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self._tried = LEARN - 2  # two rounds of drafts before the next judgement
        self._made = _Made()

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """While what has been drafted is likely enough to stand."""
        reach = 1.0
        for sure in confidence:
            reach *= sure
        return reach >= self._least

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        """Acceptance by sequence: of the tokens that were judged, how many stood."""
        drafted = False
        for one in records:
            past = self._past.setdefault(one.seq, _Past())
            if one.drafted == 0:
                past.fade(KEEP)  # who is not drafted for comes back to the acceptance of all
                continue
            drafted = True
            past.add(one.accepted, one.judged, KEEP)
            self._all.add(one.accepted, one.judged, KEEP_ALL)
            self._shape.add(one.drafted, one.depth)
        self._tried += drafted
        if drafted and self._plain:
            self._judge(records, step + draft)

    def _judge(self, records: Sequence[Verified], seconds: float) -> None:
        """Whether the last rounds with drafts were worth it."""
        made = self._made
        made.rounds += 1
        made.plain_tokens += len(records)
        made.tokens += sum(one.accepted + 1 for one in records)
        made.plain_seconds += self._plain
        made.seconds += seconds
        self._plain = 0.0
        gain = made.tokens / made.plain_tokens * made.plain_seconds / made.seconds
        hopeless = made.rounds >= HOPELESS[1] and gain < HOPELESS[0]
        if hopeless or (made.rounds >= JUDGE and gain < 1.0):
            self._rest()
        elif made.rounds >= JUDGE:
            self._pause, self._made = FIRST_PAUSE, _Made()

    def forget(self, seq: SeqId) -> None:
        """Drop what is known of it."""
        self._past.pop(seq, None)

    def _of(self, seq: SeqId) -> float:
        """Acceptance to expect: its own as far as it is known, else that of all."""
        past = self._past.get(seq, _Past())
        share = self._all.accepted / self._all.judged
        return (past.accepted + OTHERS * share) / (past.judged + OTHERS)

    def _best(self, round_: Round, rows: int) -> tuple[list[int], float]:
        """The lengths with the most tokens a second, and their gain over none."""
        costs, n = round_.costs, len(round_.seqs)
        shares, width = [self._of(seq.id) for seq in round_.seqs], self._shape.width
        heap = list[tuple[float, int, int]]()
        for place, share in enumerate(shares):
            heappush(heap, (-share / width, place, 1))
        plain = n / costs.step(rows)
        taken, expected, longest, drafting = list[int](), float(n), 0, set[int]()
        best, best_rate, self._least = 0, plain, 1.0
        while heap:
            survival, place, length = heappop(heap)
            taken.append(place)
            drafting.add(place)
            expected -= survival
            longest = max(longest, length)
            seconds = costs.step(rows + len(taken)) + costs.draft(len(drafting), longest)
            if expected / seconds > best_rate:
                best, best_rate, self._least = len(taken), expected / seconds, -survival
            if length < round_.room[place]:
                deeper = int(length / width) > int((length - 1) / width)  # the next has a new level
                heappush(heap, (survival * (shares[place] if deeper else 1), place, length + 1))
        if self._round % LOOK == 0:  # between two known sizes a step is cheaper than the line
            best = int(best * ASIDE[self._round // LOOK % len(ASIDE)])
        lengths = [0] * n
        for place in taken[:best]:
            lengths[place] += 1
        self._least *= 0.5  # a draft's own confidence may say more than its sequence's past
        return lengths, best_rate / plain
