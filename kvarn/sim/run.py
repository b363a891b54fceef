"""What came of each simulated request, and of all: plain data for results, traces and plots."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvarn.core.seq import Seq
from kvarn.cost.shape import StepShape
from kvarn.sim.heap import NS
from kvarn.sim.instance import Gaps, Instance

MOST_SLOTS = 2048  #: of the curve of pages in use, by instance


@dataclass(slots=True)
class Record:
    """One request's way through the cluster. Times in ns of virtual time."""

    id: str
    arrival: int
    n_in: int  #: [tokens]
    n_out: int = 0  #: tokens generated, by all of its sequences
    instance: int = -1  #: where it went; -1: nowhere
    why: str = ""  #: what spoke for that instance, or why it was refused
    first: int | None = None  #: first token
    last: int | None = None  #: last token
    end: int | None = None  #: when it had completed; None: it did not
    cached: int = 0  #: prompt tokens found in the prefix cache
    preemptions: int = 0
    error: str = ""
    #: between steps that brought tokens [s], where kept; sequence after sequence as they end
    gaps: "array[float] | tuple[()]" = ()


@dataclass(slots=True)
class _Stream:
    """The tokens of one sequence so far; its request's record learns of them at its end."""

    first: int  #: [ns]
    last: int = 0  #: [ns]
    tokens: int = 0
    gaps: "array[float]" = field(default_factory=lambda: array("d"))  #: [s]


@dataclass(slots=True)
class StepRow:
    """One step, or a run of decode steps, of an instance, for traces and plots."""

    instance: str
    start: int  #: [ns]
    end: int  #: [ns]
    shape: StepShape  #: of the first step
    running: int  #: sequences in the batch queue at its end
    waiting: int
    held: int  #: KV pages that sequences hold


@dataclass(slots=True)
class PageUse:
    """KV pages that the sequences of an instance hold, over time, in bounded memory.

    Time is cut into slots of equal width; each keeps the most pages held in it and the last count.
    When there are too many slots, they become twice as wide.
    """

    width: int = NS // 1000  #: of a slot [ns]
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)  #: (most, last) by number

    def saw(self, at: int, pages: int) -> None:
        """`pages` are held from `at` [ns] on; times do not decrease."""
        slot = at // self.width
        most = max(pages, self.slots[slot][0]) if slot in self.slots else pages
        self.slots[slot] = (most, pages)
        if len(self.slots) > MOST_SLOTS:
            self._widen()

    def curve(self) -> Iterator[tuple[float, int]]:
        """(seconds, pages): at the start of each seen slot the most, at its end the last count."""
        for slot, (most, last) in self.slots.items():
            yield slot * self.width / NS, most
            yield (slot + 1) * self.width / NS, last

    def _widen(self) -> None:
        self.width *= 2
        wider: dict[int, tuple[int, int]] = {}
        for slot, (most, last) in self.slots.items():
            wider[slot // 2] = (max(most, wider.get(slot // 2, (0, 0))[0]), last)
        self.slots = wider


@dataclass(slots=True)
class Tally:
    """A watcher that keeps what results need: times by request, gaps between tokens by length.

    Every gap by its request (`keep_gaps`) takes 8 bytes a token; the counts by length take next to
    nothing, however long the run.
    """

    records: dict[str, Record] = field(default_factory=dict)
    #: tokens by the gap before them [us]; several that one step brought are one
    gaps: Counter[int] = field(default_factory=Counter)
    steps: list[StepRow] | None = None  #: filled only where asked for
    keep_gaps: bool = True
    page_use: dict[str, PageUse] | None = None  #: by instance; filled only where asked for
    _streams: dict[Seq, _Stream] = field(default_factory=dict)  #: of sequences that run

    def committed(
        self, instance: Instance, seqs: Sequence[Seq], first: int, last: int, gaps: Gaps
    ) -> None:
        """Each of `seqs` got tokens, from `first` to `last`; the gaps between are alike for all."""
        counts, streams, tokens = self.gaps, self._streams, 1
        kept = array("d")
        for gap, times in gaps:
            tokens += times
            counts[round(gap / 1000)] += times * len(seqs)
            if self.keep_gaps:
                kept.extend([gap / NS] * times)
        before, gap_us = -1, 0
        for seq in seqs:
            stream = streams.get(seq)
            if stream is None:
                streams[seq] = stream = _Stream(first)
            else:
                gap = first - stream.last
                if gap != before:  # else as the sequence before
                    before, gap_us = gap, round(gap / 1000)
                counts[gap_us] += 1
                if self.keep_gaps:
                    stream.gaps.append(gap / NS)
            if kept:
                stream.gaps.extend(kept)
            stream.tokens += tokens
            stream.last = last
        if self.page_use is not None:
            self._see_pages(self.page_use, instance, last)

    def accepted(self, seqs: Sequence[Seq], tokens: Sequence[int]) -> None:
        """They came at one time: there is no gap between them."""
        for seq, more in zip(seqs, tokens, strict=True):
            self._streams[seq].tokens += more

    def stepped(self, instance: Instance, shape: StepShape, start: int, end: int) -> None:
        """Keep the step, if steps are wanted, and the pages held during it."""
        if self.page_use is not None:
            self._see_pages(self.page_use, instance, start)
        if self.steps is not None:
            control = instance.control
            running, waiting = len(control.queues.running), len(control.queues.waiting)
            row = StepRow(instance.name, start, end, shape, running, waiting, control.kv.held(0))
            self.steps.append(row)

    def ended(self, seq: Seq, now: int, error: str = "") -> None:
        """A sequence left its instance."""
        record = self.records[seq.request.id]
        record.cached, record.preemptions, record.error = seq.cached, seq.preemptions, error
        record.end = None if error else now
        stream = self._streams.pop(seq, None)
        if stream is not None:
            record.n_out += stream.tokens
            if record.first is None or stream.first < record.first:
                record.first = stream.first
            record.last = max(stream.last, record.last or 0)
            record.gaps = record.gaps + stream.gaps if record.gaps else stream.gaps or ()

    def _see_pages(self, use: dict[str, PageUse], instance: Instance, at: int) -> None:
        use.setdefault(instance.name, PageUse()).saw(at, instance.control.kv.held(0))


@dataclass(slots=True)
class Outcome:
    """A whole simulation."""

    records: list[Record]  #: in order of arrival
    gaps: Counter[int]  #: tokens by the gap before them [us]
    steps: list[StepRow] | None
    instances: list[Instance]
    end: int  #: last event [ns]
    page_use: dict[str, PageUse] | None = None  #: by instance, where asked for

    @property
    def seconds(self) -> float:
        """From the start to the last event [s]."""
        return self.end / NS

    @property
    def joules(self) -> float:
        """Energy of all instances: in their steps, and idle between them."""
        total = 0.0
        for one in self.instances:
            total += one.joules + one.cost.idle_watts() * (self.end - one.busy) / NS
        return total
