"""`Trace`: requests in one normal form, whatever file or generator they came from. Plain data."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace


@dataclass(slots=True, frozen=True)
class TraceRequest:
    """One request as lengths and content ids; no text and no token."""

    id: str
    at: float  #: arrival [s after the start of the trace]
    n_in: int  #: prompt [tokens]
    n_out: int  #: answer [tokens]
    #: content of the prompt by block, chained: equal ids mean equal whole prefixes; () if unknown
    blocks: tuple[int, ...] = ()
    session: str | None = None  #: conversation
    turn: int = 0  #: place in the conversation, from 0
    parent: str | None = None  #: request whose answer this one follows
    think: float = 0.0  #: from the parent's end to this arrival in a closed loop [s]
    kind: str = ""  #: class of the request, where the source names one


@dataclass(slots=True, frozen=True)
class Trace:
    """Requests in order of arrival, and how they came to be."""

    name: str  #: of the source; generated traces are called `synthetic-...`
    requests: tuple[TraceRequest, ...]
    block_size: int = 512  #: positions that one entry of `blocks` stands for [tokens]
    chain: tuple[str, ...] = field(default=())  #: transformations applied, in order
    skipped: int = 0  #: malformed rows left out (only where the user allowed it)

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[TraceRequest]:
        return iter(self.requests)

    @property
    def span(self) -> float:
        """From the first to the last arrival [s]."""
        return self.requests[-1].at - self.requests[0].at if self.requests else 0.0

    def changed(self, step: str, requests: tuple[TraceRequest, ...]) -> "Trace":
        """The same trace after one more transformation, which `step` names with its numbers."""
        return replace(self, requests=requests, chain=(*self.chain, step))
