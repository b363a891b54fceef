"""Length controls on recorded or made-up acceptance, in modelled time: no model, no clock.

A stream says of every position whether a draft that reaches it would be accepted there; a round at
position t with k drafts brings the accepted ones and one token more; where drafts are trees, it is
a level of them that is accepted. All streams run in one batch
of constant size. The control sees what it sees in an engine: costs learnt from
the steps that were made, and records of those that judged drafts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.speculate.costs import Measured
from kvarn.speculate.part import Costs, LengthControl, Round, Verified


@dataclass(slots=True)
class Stream:
    """One sequence: by position, whether a draft is accepted, and how sure the proposer is."""

    accepted: Sequence[bool]
    confidence: Sequence[float] = ()  #: empty: the proposer drafts whatever is asked
    width: int = 1  #: tokens a level of its drafts; 1: chains

    @classmethod
    def of_runs(cls, runs: Iterable[int]) -> "Stream":
        """From accepted counts of rounds whose drafts were longer than these."""
        return cls([good for run in runs for good in [True] * run + [False]])

    @classmethod
    def drawn(cls, shares: Iterable[tuple[float, int]], chance: Random) -> "Stream":
        """Independent positions: so many with such a share accepted, then others."""
        return cls([chance.random() < share for share, count in shares for _ in range(count)])


@dataclass(slots=True)
class Roofline:
    """Step times of a memory-bound model that becomes compute-bound: `Costs` that are known.

    Rows up to `read / row` are free. The defaults are in steps, not of any machine.
    """

    read: float = 1.0  #: reading the weights [s]
    row: float = 0.01  #: computing one position [s]
    fixed: float = 0.05  #: launches, sampling [s]
    token: float = 0.0  #: one round of drafting one token for everybody [s]

    def step(self, rows: int) -> float:
        """A step of `rows` positions [s]."""
        return self.fixed + max(self.read, self.row * rows)

    def draft(self, seqs: int, most: int) -> float:
        """Drafting up to `most` tokens for each [s]."""
        return self.token * most


@dataclass(slots=True)
class Played:
    """What a control made of the streams."""

    plain_seconds: float  #: of the same tokens without drafts
    seconds: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    #: by round: (tokens drafted, accepted) of the first stream
    first: list[tuple[int, int]] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """Over no drafts."""
        return self.plain_seconds / self.seconds


def play(control: LengthControl, streams: Sequence[Stream], times: Costs, most: int = 16) -> Played:
    """As many tokens as the streams hold; the control learns the times as an engine would.

    The batch stays full: a stream that ends begins again, as another sequence.
    """
    n, tokens = len(streams), sum(len(one.accepted) for one in streams)
    seqs = [_sequence(i) for i in range(n)]
    at, costs, played = [0] * n, Measured(), Played(tokens / n * times.step(n))
    while played.rounds * n + played.accepted < tokens:
        left = [len(one.accepted) - position for one, position in zip(streams, at, strict=True)]
        lengths = _planned(control, seqs, [min(most, one - 1) for one in left], costs)
        records = [
            _judged(seq.id, stream, position, length, control)
            for seq, stream, position, length in zip(seqs, streams, at, lengths, strict=True)
        ]
        _account(played, control, records, times, costs)
        for i, record in enumerate(records):
            at[i] += record.accepted + 1
            if at[i] >= len(streams[i].accepted):
                control.forget(record.seq)
                seqs[i], at[i] = _sequence(record.seq + n), 0
    return played


def _sequence(number: int) -> Seq:
    return Seq(number, Request(str(number), [0]), 0, [0], 0, (0, number))


def _planned(
    control: LengthControl, seqs: Sequence[Seq], room: Sequence[int], costs: Costs
) -> list[int]:
    """What the control asks for, for those that have room."""
    lengths = [0] * len(seqs)
    can = [i for i, most in enumerate(room) if most > 0]
    if control.rests() or not can:
        return lengths
    round_ = Round([seqs[i] for i in can], [room[i] for i in can], len(seqs) - len(can), costs)
    for i, asked in zip(can, control.plan(round_), strict=True):
        lengths[i] = min(asked, room[i])
    return lengths


def _judged(seq: int, stream: Stream, at: int, length: int, control: LengthControl) -> Verified:
    """One sequence's round: drafted as far as the control lets it, then judged."""
    sure = list(stream.confidence[at : at + length])
    if stream.confidence:
        count = 0
        while count < length and control.goes_on(sure[:count]):
            count += 1
        length, sure = count, sure[:count]
    depth = -(-length // stream.width)
    judged = stream.accepted[at : at + depth]
    accepted = next((i for i, good in enumerate(judged) if not good), depth)
    return Verified(seq, length, accepted, sure or [1.0] * length, depth, min(accepted + 1, depth))


def _account(
    played: Played, control: LengthControl, records: list[Verified], times: Costs, costs: Measured
) -> None:
    """Time of the round, and what the control is told of it."""
    drafted = sum(one.drafted for one in records)
    rows, longest = len(records) + drafted, max(one.drafted for one in records)
    step = times.step(rows)
    draft = times.draft(sum(1 for one in records if one.drafted), longest) if drafted else 0.0
    costs.saw_step(rows, step)
    if drafted:
        costs.saw_draft(drafted, draft)
        control.observe(records, step, draft)
    played.seconds += step + draft
    played.rounds += 1
    played.drafted += drafted
    played.accepted += sum(one.accepted for one in records)
    played.first.append((records[0].drafted, records[0].accepted))
