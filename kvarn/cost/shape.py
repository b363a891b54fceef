"""`StepShape` goes in, `Estimate` comes out: the words of every cost model. Plain data."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Protocol

#: (rows, positions attended) of spans with several rows; positions include the rows' own
Chunk = tuple[int, int]


@dataclass(slots=True, frozen=True)
class StepShape:
    """What of a step decides its time. Rows of single positions are summed up, not listed."""

    chunks: tuple[Chunk, ...] = ()  #: spans of more than one row: (rows, context after them)
    n_decode: int = 0  #: spans of one row
    decode_sum: int = 0  #: positions that those rows attend to, their own included, all together
    decode_max: int = 0  #: the most that one of them attends to
    n_logits: int = 0  #: rows that go through the output head

    @property
    def n_tokens(self) -> int:
        """Rows of the step."""
        return self.n_decode + sum(rows for rows, _ in self.chunks)

    @property
    def n_seqs(self) -> int:
        """Sequences of the step."""
        return self.n_decode + len(self.chunks)


def shape_of(spans: Iterable[tuple[int, int, bool]]) -> StepShape:
    """The shape of a step whose spans are (first position, rows, wants logits)."""
    chunks, n, total, most, logits = [], 0, 0, 0, 0
    for start, rows, wants in spans:
        logits += wants
        if rows > 1:
            chunks.append((rows, start + rows))
        else:
            n += 1
            total += start + 1
            if start >= most:
                most = start + 1
    return StepShape(tuple(chunks), n, total, most, logits)


@dataclass(slots=True)
class Estimate:
    """Time of a step by term [s], and how well it is known.

    The terms follow each other on the device; `host` is what the device waits for the host.
    """

    host: float = 0.0  #: planning, launching and sampling that computation does not hide
    linear: float = 0.0  #: products with weights, embeddings and norms among them
    prefill: float = 0.0  #: attention of spans with several rows
    decode: float = 0.0  #: attention of spans of one row
    experts: float = 0.0  #: mixture-of-experts layers
    comm: float = 0.0  #: collectives between ranks
    #: share of the seconds that lie inside measured data; the rest is extrapolated or analytic
    confidence: float = 0.0
    joules: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.host + self.linear + self.prefill + self.decode + self.experts + self.comm


def total(parts: Iterable[Estimate]) -> Estimate:
    """What follows each other, as one: terms and energy add up, confidence is by time."""
    found, sure = Estimate(), 0.0
    for part in parts:
        for one in fields(Estimate):
            setattr(found, one.name, getattr(found, one.name) + getattr(part, one.name))
        sure += part.confidence * part.seconds
    found.confidence = sure / found.seconds if found.seconds else 0.0
    return found


class CostModel(Protocol):
    """Prices steps of one model on one instance (all its ranks together)."""

    name: str  #: what `kvarn sim` and results call it

    def step(self, shape: StepShape) -> Estimate:
        """Time and energy of a step; a pure function."""
        ...

    def idle_watts(self) -> float:
        """Power of the instance while it waits [W]."""
        ...
