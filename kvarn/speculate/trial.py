"""Length controls on recorded or made-up acceptance, in modelled time: no model, no clock.

A stream says of every position whether a draft that reaches it would be accepted there; a round at
position t with k drafts brings the accepted ones and one token more; where drafts are trees, it is
a level of them that is accepted. All streams run in one batch. The control sees what it sees in an
engine: costs learnt from the steps that were made, and records of those that judged drafts.
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
    prompt: int = 0  #: tokens that the proposer reads before it drafts

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
    prompt: float = 0.0  #: the proposer reads one token of a prompt [s]

    def step(self, rows: int) -> float:
        """A step of `rows` positions [s]."""
        return self.fixed + max(self.read, self.row * rows)

    def verifying(self, rows: int) -> float:
        """The same with drafts."""
        return self.step(rows)

    def reach(self) -> int:
        """Any."""
        return 1 << 30

    def draft(self, seqs: int, most: int) -> float:
        """Drafting up to `most` tokens for each [s]."""
        return self.token * most

    def reading(self, tokens: int) -> float:
        """Reading prompts [s]."""
        return self.prompt * tokens

    def back(self) -> float:
        """Nothing."""
        return 0.0

    def look(self) -> float:
        """Nothing."""
        return 0.0

    def knows(self, rows: int) -> bool:
        """Always."""
        return True


@dataclass(slots=True)
class Overlapped:
    """A GPU whose plain steps are replayed and planned ahead, and whose drafted ones are not.

    The times were fitted to an H100 that serves an 8B model, with drafts verified in steps that
    were launched kernel by kernel (`lines` in milliseconds, as in `benchmarks/results`).
    """

    plain: tuple[float, float] = (5.7e-3, 24.5e-6)  #: of a step, and of each row [s]
    verify: tuple[float, float] = (10.2e-3, 34e-6)  #: the same with drafts, the host's part too
    gap: float = 1.5e-3  #: what the host adds where a plan could not be made ahead [s]
    token: float = 0.0  #: drafting one token for everybody [s]
    prompt: float = 0.0  #: the proposer reads one token of a prompt [s]

    def step(self, rows: int) -> float:
        """A plain step behind another one [s]."""
        return self.plain[0] + self.plain[1] * rows

    def verifying(self, rows: int) -> float:
        """A step with drafts, from what it follows to what follows it [s]."""
        return self.verify[0] + self.verify[1] * rows

    def reach(self) -> int:
        """Any."""
        return 1 << 30

    def draft(self, seqs: int, most: int) -> float:
        """Drafting up to `most` tokens for each [s]."""
        return self.token * most

    def reading(self, tokens: int) -> float:
        """Reading prompts [s]."""
        return self.prompt * tokens

    def back(self) -> float:
        """The first plain step is planned late too."""
        return self.gap

    def look(self) -> float:
        """Nothing."""
        return 0.0

    def knows(self, rows: int) -> bool:
        """Always."""
        return True


@dataclass(slots=True)
class Noise:
    """What times are multiplied with: 1 on average, and now and then a stall."""

    spread: float  #: of the logarithm
    chance: Random
    stalls: float = 0.002  #: share of steps
    stall: float = 4.0  #: what these take, in steps

    def __call__(self, seconds: float) -> float:
        """One measurement of a step that takes `seconds` on average."""
        found = self.chance.lognormvariate(-(self.spread**2) / 2, self.spread)
        return seconds * (self.stall if self.chance.random() < self.stalls else found)


@dataclass(slots=True)
class Played:
    """What a control made of the streams."""

    plain_seconds: float = 0.0  #: of the same tokens without drafts
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


def play(
    control: LengthControl,
    streams: Sequence[Stream],
    times: Costs,
    most: int = 16,
    noise: Noise | None = None,
    costs: Measured | None = None,
    ends: bool = False,
) -> Played:
    """As many tokens as the streams hold; the control learns the times as an engine would.

    The batch stays full: a stream that ends begins again, as another sequence. With `ends` it
    becomes empty instead, and every stream is played once. `costs`: what was learnt before.
    """
    game = _Game(control, list(streams), times, most, noise, costs or Measured())
    tokens = sum(len(one.accepted) for one in streams)
    played = game.played
    while game.playing and (ends or played.rounds * len(streams) + played.accepted < tokens):
        game.round(ends)
    if not ends:
        n = len(streams)
        played.plain_seconds = tokens / n * times.step(n)
    else:
        lengths = sorted(len(one.accepted) for one in streams)
        for i, (before, length) in enumerate(zip([0, *lengths], lengths)):
            played.plain_seconds += (length - before) * times.step(len(lengths) - i)
    return played


_serial = iter(range(1 << 62))


def _sequence() -> Seq:
    number = next(_serial)
    return Seq(number, Request(str(number), [0]), 0, [0], 0, (0, number))


class _Game:
    """Rounds of one batch."""

    def __init__(
        self,
        control: LengthControl,
        streams: list[Stream],
        times: Costs,
        most: int,
        noise: Noise | None,
        costs: Measured,
    ) -> None:
        self.control, self.times, self.most, self.noise = control, times, most, noise
        self.costs, self.played = costs, Played()
        self.playing = [(_sequence(), stream) for stream in streams]
        self.at = dict.fromkeys((seq.id for seq, _ in self.playing), 0)
        self.unread = {seq.id: stream.prompt for seq, stream in self.playing}
        self.plain_before = True

    def round(self, ends: bool) -> None:
        """One step of everybody who plays."""
        lengths = self._planned()
        records = [
            _judged(seq.id, stream, self.at[seq.id], length, self.control)
            for (seq, stream), length in zip(self.playing, lengths, strict=True)
        ]
        self._account(records, lengths)
        left = []
        for (seq, stream), record in zip(self.playing, records, strict=True):
            self.at[seq.id] += record.accepted + 1
            seq.tokens += [0] * (record.accepted + 1)
            if self.at[seq.id] < len(stream.accepted):
                left.append((seq, stream))
                continue
            self.control.forget(seq.id)
            if not ends:
                fresh = _sequence()
                self.at[fresh.id], self.unread[fresh.id] = 0, stream.prompt
                left.append((fresh, stream))
        self.playing = left

    def _planned(self) -> list[int]:
        """What the control asks for, for those that have room."""
        room = [
            min(self.most, len(stream.accepted) - self.at[seq.id] - 1)
            for seq, stream in self.playing
        ]
        lengths = [0] * len(room)
        can = [i for i, most in enumerate(room) if most > 0]
        if self.control.rests() or not can:
            return lengths
        seqs, others = [self.playing[i][0] for i in can], len(room) - len(can)
        behind = [self.unread[seq.id] for seq in seqs]
        asked = self.control.plan(Round(seqs, [room[i] for i in can], others, self.costs, behind))
        for i, count in zip(can, asked, strict=True):
            lengths[i] = min(count, room[i])
        return lengths

    def _account(self, records: list[Verified], lengths: list[int]) -> None:
        """Time of the round, and what the control is told of it."""
        times, costs, played, asked = self.times, self.costs, self.played, any(lengths)
        drafted = sum(one.drafted for one in records)
        rows, longest = len(records) + drafted, max(one.drafted for one in records)
        late = times.back() if asked or not self.plain_before else 0.0
        step = times.verifying(rows) if drafted else times.step(rows) + late
        some, read = sum(1 for one in records if one.drafted), 0
        draft = times.draft(some, longest)
        for (seq, _), count in zip(self.playing, lengths, strict=True):
            if count:
                read, self.unread[seq.id] = read + self.unread[seq.id], 0
        draft += times.reading(read)
        if self.noise is not None:
            step, draft = self.noise(step), self.noise(draft)
        if drafted:
            costs.saw_verifying(rows, step)
            costs.saw_draft(some, longest, draft, read)
        else:
            costs.saw_plain(rows, step, ahead=not asked)
        if asked:
            self.control.observe(records, step, draft)
        self.plain_before = not asked
        played.seconds += step + draft
        played.rounds += 1
        played.drafted += drafted
        played.accepted += sum(one.accepted for one in records)
        played.first.append((records[0].drafted, records[0].accepted))


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
