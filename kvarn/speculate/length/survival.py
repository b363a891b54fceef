"""A budget for the whole batch: draft where a token is likely to survive, while that pays.

Position i of a draft survives with probability a^i, a being what the sequence's drafts have been
accepted with. The tokens of all sequences are taken in falling order of survival; of every number
of them, the one with the most expected tokens a second is drafted, by the measured times of steps
and drafts. None is a candidate like any other. (Utility-driven speculation, arXiv 2506.20675, has
the criterion, per request; the budget over a batch is ours, as are the constants.)

Where none wins, drafts are tried again after a pause that doubles with every failure, so that what
speculation costs where it does not pay tends to nothing.

Regime: the default. It needs times that repeat; on a machine whose steps vary by more than drafts
gain, it decides by noise.
"""

from collections.abc import Sequence
from heapq import heappop, heappush

from kvarn.core.part import Cap, Part
from kvarn.core.plan import SeqId
from kvarn.speculate.part import Round, Verified

PRIOR = 0.5  #: acceptance of a drafted token, while nothing has been seen
KEEP = 0.9  #: weight of the past in a sequence's acceptance, and in that of all
PAYS = 1.03  #: speculation must promise this many times the tokens a second of none
FIRST_PAUSE, LONGEST_PAUSE = 8, 512  #: rounds without drafts after a failure
REFRESH = 50  #: rounds after which one without drafts measures the plain step again
LEARN = 12  #: rounds of drafts before times are believed
LONGEST_TRIAL = 4  #: draft of these rounds, from 1 token on [tokens]


class Survival(Part):
    """Tokens by survival, their number by the measured cost of a step."""

    name, kind = "survival", "draft-length"
    needs = frozenset({Cap.STEP_TIMES})
    regime = "The default: never much slower than no drafts, at any batch size."

    def __init__(self) -> None:
        self._share: dict[SeqId, float] = {}
        self._all = PRIOR  # for sequences that have not been drafted for
        self._resting = 0  # rounds left without drafts
        self._pause = FIRST_PAUSE
        self._tried = 0  # rounds with drafts since the last rest
        self._round = 0
        self._least = 0.0  # survival below which a token costs more than it brings

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
            length = 1 + self._tried % LONGEST_TRIAL
            return [min(length, room) for room in round_.room]
        lengths, ratio = self._best(round_, rows)
        if ratio >= PAYS:
            self._pause = FIRST_PAUSE
            return lengths
        self._resting, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self._tried = LEARN - 2  # two rounds of drafts before the next judgement
        return none

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
            if one.drafted == 0:
                continue
            drafted = True
            judged = min(one.accepted + 1, one.drafted)
            weight = KEEP**judged
            share = one.accepted / judged
            self._share[one.seq] = weight * self._of(one.seq) + (1 - weight) * share
            self._all = weight * self._all + (1 - weight) * share
        self._tried += drafted

    def forget(self, seq: SeqId) -> None:
        """Drop what is known of it."""
        self._share.pop(seq, None)

    def _of(self, seq: SeqId) -> float:
        return self._share.get(seq, self._all)

    def _best(self, round_: Round, rows: int) -> tuple[list[int], float]:
        """The lengths with the most tokens a second, and their gain over none."""
        costs, n = round_.costs, len(round_.seqs)
        shares = [self._of(seq.id) for seq in round_.seqs]
        heap = list[tuple[float, int, int]]()
        for place, share in enumerate(shares):
            heappush(heap, (-share, place, 1))
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
                heappush(heap, (survival * shares[place], place, length + 1))
        lengths = [0] * n
        for place in taken[:best]:
            lengths[place] += 1
        self._least *= 0.5  # a draft's own confidence may say more than its sequence's past
        return lengths, best_rate / plain
