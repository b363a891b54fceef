"""`SharedLink`: transfers that share a link fairly, in virtual time. A pure state machine.

With k transfers under way each goes at a k-th of the speed (processor sharing); two that start
together take twice as long each. The link is held for the bytes and for every piece of a transfer;
the latency after them passes beside other transfers and holds nothing. A transfer leaves on a
whole nanosecond, so each may cost the link up to one.
"""

import heapq
from dataclasses import dataclass, field

from kvarn.cost.link import Link
from kvarn.sim.heap import NS

#: parts of a nanosecond in which service is counted, so that shares of it never drift visibly
_FINE = 1 << 32


@dataclass(slots=True)
class _Transfer:
    """One transfer, from its start to its arrival."""

    n_bytes: int
    work: int  #: link time it needs [ns / _FINE]
    goal: int  #: service per transfer at which it leaves the link [ns / _FINE]
    arrives: int | None = None  #: when its last byte is there [ns]; None while on the link


@dataclass(slots=True)
class SharedLink:
    """A link and the transfers on it. Times are integer ns and never go back."""

    link: Link
    moved: float = 0.0  #: bytes of arrived transfers, and of cancelled ones what they got
    _now: int = 0  #: [ns]
    _service: int = 0  #: link time that each transfer there from the start had [ns / _FINE]
    _all: dict[str, _Transfer] = field(default_factory=dict)
    _queue: list[tuple[int, str]] = field(default_factory=list)  #: on the link, by goal
    _flying: list[tuple[int, str]] = field(default_factory=list)  #: off it, by arrival

    def __len__(self) -> int:
        return len(self._all)

    def start(self, now: int, id: str, n_bytes: int, calls: int = 1) -> None:
        """Begin to move `n_bytes` in `calls` pieces; `ValueError` if `id` is under way."""
        if id in self._all:
            raise ValueError(f"transfer {id!r} is under way on link {self.link.name!r}")
        if n_bytes < 0 or calls < 0:
            raise ValueError(f"a transfer needs bytes and calls >= 0, got {n_bytes}, {calls}")
        self._advance(now)
        work = round(self.link.occupied(n_bytes, calls) * NS) * _FINE
        self._all[id] = _Transfer(n_bytes, work, self._service + work)
        heapq.heappush(self._queue, (self._service + work, id))

    def next_end(self) -> int | None:
        """When the next transfer arrives if none starts before [ns]; None with none under way."""
        ends = [self._flying[0][0]] if self._flying else []
        if self._queue:
            ends.append(self._leaves() + self._latency)
        return min(ends, default=None)

    def finish(self, now: int) -> list[str]:
        """Ids that have arrived by `now`, in the order of arrival."""
        self._advance(now)
        done = []
        while self._flying and self._flying[0][0] <= now:
            _, id = heapq.heappop(self._flying)
            self.moved += self._all.pop(id).n_bytes
            done.append(id)
        return done

    def cancel(self, now: int, id: str) -> None:
        """Stop a transfer; what it had is lost, the others go on faster. `KeyError` if unknown."""
        self._advance(now)
        transfer = self._all.pop(id)
        if transfer.arrives is None:
            self._queue.remove((transfer.goal, id))
            heapq.heapify(self._queue)
            left = transfer.goal - self._service
            self.moved += transfer.n_bytes * (1 - left / transfer.work)
        else:
            self._flying.remove((transfer.arrives, id))
            heapq.heapify(self._flying)
            self.moved += transfer.n_bytes

    @property
    def _latency(self) -> int:
        return round(self.link.latency * NS)

    def _leaves(self) -> int:
        """When the first transfer leaves the link [ns], rounded up."""
        left = (self._queue[0][0] - self._service) * len(self._queue)
        return self._now + max(0, -(-left // _FINE))

    def _advance(self, now: int) -> None:
        """Serve until `now`; whoever is through on the way leaves the link at its own time."""
        if now < self._now:
            raise ValueError(f"{now} ns is before the link's clock ({self._now} ns)")
        while self._queue and (end := self._leaves()) <= now:
            self._service += (end - self._now) * _FINE // len(self._queue)
            self._now = end
            while self._queue and self._queue[0][0] <= self._service:
                _, id = heapq.heappop(self._queue)
                self._all[id].arrives = end + self._latency
                heapq.heappush(self._flying, (end + self._latency, id))
        if self._queue:
            self._service += (now - self._now) * _FINE // len(self._queue)
        self._now = now
