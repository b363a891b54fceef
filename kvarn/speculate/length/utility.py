"""Utility-driven lengths (Cascade, arXiv 2506.20675): tokens gained over time paid, none included.

The utility of a length is the tokens of a round over its time, in steps without drafts; it is the
ratio of speeds itself, so below 1 drafts hurt. A sequence tests a few lengths for a few rounds
each, keeps the best for a while, and tests again. Where no length reaches 1 it goes without drafts,
twice as long after every such test: this is what bounds the harm.

In a batch (ours; the paper has one sequence) a step is shared. Each sequence owns an equal slice of
the step without drafts, and what drafts add to it is charged by the tokens drafted. At most one in
`TESTERS` sequences tests at once; the others keep what the last test found. One gate judges the
whole batch by what it measures, and stops everybody where the sum does not pay.

Regime: where verification costs much and acceptance is stable for tens of rounds, as with experts
of a mixture. Loses to a fixed length on short answers, which end before their tests do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvarn.core.part import Cap, Part
from kvarn.core.plan import SeqId
from kvarn.speculate.part import Round, Verified

TRIAL = 4  #: rounds at one length (paper)
TRIALS = 4  #: lengths of one test, at most (paper)
SET = 16  #: rounds of what a test has found (paper)
LONGEST_SET = 1024  #: rounds without drafts, at most: what changes is noticed (ours)
MOST = 7  #: longest draft (paper) [tokens]
FIRST = 3  #: length that the first test begins with (ours) [tokens]
ALIKE = 0.10  #: a change of utility that ends a test (paper)
TESTERS = 10  #: one in so many sequences tests at once (ours)
SHORTEST = 0.1  #: slice that a round counts as at least: a time that is shorter is an error (ours)
REFRESH = 100  #: rounds after which one without drafts times the plain step again (paper)


@dataclass(slots=True)
class _Trial:
    """Rounds at one length: what they brought and took, in tokens and slices of plain steps."""

    length: int
    rounds: int = 0  #: planned
    seen: int = 0  #: of these, verified
    tokens: int = 0
    slices: float = 0.0

    @property
    def utility(self) -> float:
        """Tokens by time. A round in which nothing was found to draft is a plain one."""
        plain = self.rounds - self.seen
        return (self.tokens + plain) / (self.slices + plain)


@dataclass(slots=True)
class _State:
    """A sequence tests (`trials` is not empty), keeps a length, or waits for its turn to test."""

    trials: list[_Trial] = field(default_factory=list)
    length: int = 0  #: kept between tests
    left: int = 0  #: rounds that it is kept for
    span: int = SET  #: rounds of the last of these
    begin: int = FIRST  #: length that the next test begins with


class Utility(Part):
    """State by sequence, and a gate for the batch."""

    name, kind, paper = "utility", "draft-length", "2506.20675"
    needs = frozenset({Cap.STEP_TIMES})
    regime = (
        "Costly verification and acceptance that is stable for tens of rounds, at small batches. "
        "Loses to the best fixed length on short answers, which end before their tests do."
    )
    looks = False

    def __init__(self) -> None:
        self._states: dict[SeqId, _State] = {}
        self._found = 0  # length that the last test found, for sequences that wait to test
        self._gate = _Gate()
        self._round = 0
        self._idle = 0  # rounds for which nobody drafts or tests
        self._rested = 0  # of these, gone by since the last plan
        self._plain = 0.0  # the step without drafts, of the round under way [s]

    def rests(self) -> bool:
        """While nobody drafts; and now and then, to time the plain step."""
        self._round += 1
        if self._round % REFRESH == 0:
            return True
        if self._idle > 0:
            self._idle -= 1
            self._rested += 1
            return True
        return False

    def plan(self, round_: Round) -> list[int]:
        """The length that each sequence tests or keeps."""
        n = len(round_.seqs)
        self._plain = round_.costs.step(round_.others + n)
        if self._plain == 0.0:
            return [0] * n
        states = [self._states.setdefault(seq.id, _State()) for seq in round_.seqs]
        for state in states:
            state.left -= self._rested
            if state.trials:
                self._go_on(state)
        self._rested = 0
        turns = max(1, n // TESTERS) - sum(1 for state in states if state.trials)
        lengths = list[int]()
        for state, room in zip(states, round_.room, strict=True):
            if not state.trials and state.left <= 0 and turns > 0:
                state.trials = [_Trial(state.begin)]
                turns -= 1
            lengths.append(min(self._next(state), room))
        self._rest(states, lengths)
        return lengths

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """To the planned length."""
        return True

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        """Charge the step and its drafts to those that were drafted for; judge the batch."""
        drafted = sum(one.drafted for one in records)
        if drafted == 0 or self._plain == 0.0 or step == 0.0:
            return
        n = len(records)
        added = (step + draft - self._plain) / self._plain * n  # slices, over those of plain rows
        for one in records:
            state = self._states.get(one.seq)
            if state is None or not state.trials or one.drafted == 0:
                continue
            trial = state.trials[-1]
            trial.seen += 1
            trial.tokens += one.accepted + 1
            trial.slices += max(SHORTEST, 1.0 + added * one.drafted / drafted)
        if n > 1:
            tokens = n + sum(one.accepted for one in records)
            self._idle = max(self._idle, self._gate.closed_for(tokens, n + added))

    def forget(self, seq: SeqId) -> None:
        """Drop what is known of it. A server that has become empty begins anew."""
        self._states.pop(seq, None)
        if not self._states:
            self._idle = self._rested = 0
            self._gate = _Gate()

    def _next(self, state: _State) -> int:
        """The length of the coming round."""
        if state.trials:
            state.trials[-1].rounds += 1
            return state.trials[-1].length
        if state.left <= 0:
            return self._found
        state.left -= 1
        return state.length

    def _go_on(self, state: _State) -> None:
        """The next trial of a test, or its end."""
        if state.trials[-1].rounds < TRIAL:
            return
        length = _climb([(trial.length, trial.utility) for trial in state.trials])
        if length is not None:
            state.trials.append(_Trial(length))
            return
        best = max(state.trials, key=lambda trial: trial.utility)
        if best.utility >= 1.0:
            state.length = state.begin = best.length
            state.span = SET
        else:
            state.length, state.begin = 0, 1  # what lost with one token is not tried with more
            state.span = min(2 * state.span, LONGEST_SET)
        state.left, self._found = state.span, state.length
        state.trials = []

    def _rest(self, states: Sequence[_State], lengths: Sequence[int]) -> None:
        """If nobody drafts: for how long."""
        if not any(lengths) and not any(state.trials for state in states):
            self._idle = max(0, min(state.left for state in states))


def _climb(trials: Sequence[tuple[int, float]]) -> int | None:
    """The length to try after these (length, utility); None: the test ends.

    Below 1 the length is halved (the paper lowers it by some step), so that a test that fails costs
    two trials. Above, it is a neighbour of the best so far, the longer one first.
    """
    length, utility = trials[-1]
    tried = {one for one, _ in trials}
    if len(trials) == TRIALS or (length == 1 and utility < 1.0):
        return None
    if all(found < 1.0 for _, found in trials):
        return length // 2
    if len(trials) > 1 and abs(utility - trials[-2][1]) <= ALIKE * trials[-2][1]:
        return None
    best, _ = max(trials, key=lambda trial: trial[1])
    return next((k for k in (best + 1, best - 1) if 1 <= k <= MOST and k not in tried), None)


@dataclass(slots=True)
class _Gate:
    """What the batch as a whole gains, over windows of rounds with drafts."""

    rounds: int = 0
    tokens: float = 0.0
    slices: float = 0.0
    pause: int = SET  #: rounds without drafts after the last window that lost

    def closed_for(self, tokens: float, slices: float) -> int:
        """A round brought and took so much; rounds without drafts that follow."""
        self.rounds += 1
        self.tokens += tokens
        self.slices += slices
        if self.rounds < SET:
            return 0
        lost = self.tokens < self.slices
        self.rounds, self.tokens, self.slices = 0, 0.0, 0.0
        self.pause = min(2 * self.pause, LONGEST_SET) if lost else SET
        return self.pause if lost else 0
