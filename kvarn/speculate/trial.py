"""Length controls on recorded or made-up acceptance, in modelled time: no model, no clock.

A stream says of every position whether a draft that reaches it would be accepted there; a round at
position t with k drafts brings the accepted ones and one token more. All streams run in one batch
from their first round to their last. The control sees what it sees in an engine: costs learnt from
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

    seconds: float = 0.0
    plain_seconds: float = 0.0  #: without drafts
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    #: by round: (tokens asked for, accepted) of the first stream; (0, 0): it was not drafted for
    first: list[tuple[int, int]] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """Over no drafts."""
        return self.plain_seconds / self.seconds


def play(control: LengthControl, streams: Sequence[Stream], times: Costs, most: int = 16) -> Played:
    """Run the streams to their ends; the control learns the times as an engine would."""
    seqs = [Seq(i, Request(str(i), [0]), 0, [0], 0, (0, i)) for i in range(len(streams))]
    at, costs, played = [0] * len(streams), Measured(), Played()
    for steps in range(max((len(one.accepted) for one in streams), default=0)):
        left = sum(1 for one in streams if len(one.accepted) > steps)
        played.plain_seconds += times.step(left)
    while live := [i for i, one in enumerate(streams) if at[i] < len(one.accepted)]:
        lengths = [0] * len(live)
        if not control.rests():
            room = [min(most, len(streams[i].accepted) - at[i] - 1) for i in live]
            can = [place for place, tokens in enumerate(room) if tokens > 0]
            if can:
                round_ = Round(
                    [seqs[live[p]] for p in can], [room[p] for p in can], len(live) - len(can),
                    costs,
                )  # fmt: skip
                for place, asked in zip(can, control.plan(round_), strict=True):
                    lengths[place] = min(asked, room[place])
        records = [
            _judged(i, streams[i], at[i], length, control)
            for i, length in zip(live, lengths, strict=True)
        ]
        _account(played, control, records, times, costs)
        for record in records:
            at[record.seq] += record.accepted + 1
            if at[record.seq] >= len(streams[record.seq].accepted):
                control.forget(record.seq)
    return played


def _judged(seq: int, stream: Stream, at: int, length: int, control: LengthControl) -> Verified:
    """One sequence's round: drafted as far as the control lets it, then judged."""
    sure = list(stream.confidence[at : at + length])
    if stream.confidence:
        count = 0
        while count < length and control.goes_on(sure[:count]):
            count += 1
        length, sure = count, sure[:count]
    judged = stream.accepted[at : at + length]
    accepted = next((i for i, good in enumerate(judged) if not good), length)
    return Verified(seq, length, accepted, sure or [1.0] * length)


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
    first = next((one for one in records if one.seq == 0), None)
    if first is not None:
        played.first.append((first.drafted, first.accepted))
